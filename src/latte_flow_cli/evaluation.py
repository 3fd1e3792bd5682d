# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `evaluate` and `evaluate ...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Steps
from .verbs import app, load_pipeline, one_line_errors, tell


group = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(group, name="evaluate")


@group.callback()
@one_line_errors
def evaluate(
    context: typer.Context,
    model: Model = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts, the images and the noise.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all results.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Evaluate a checkpoint on the tiny world: accuracy of generated images and of answers."""
    if context.invoked_subcommand is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(
                f"options go after {context.invoked_subcommand!r}, got {', '.join(given)} before."
            )
        return
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(output)!r}.")
    from latte_flow_hf.evaluation import tinyworld
    from latte_flow_hf.files import check_output, write_json

    if output is not None:
        check_output(output, replace=True)
    pipe = load_pipeline(model, device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    generation = tinyworld.evaluate_generation(pipe, tinyworld.generation_prompts(seed), seed, **call)
    variety = tinyworld.evaluate_variety(pipe, "a red circle left of a blue square", **call)
    understanding = tinyworld.evaluate_understanding(pipe, tinyworld.understanding_questions(seed))
    results = {"seed": seed, **call, "generation": generation, "variety": variety, "understanding": understanding}
    lines = [
        f"{name:14}{kind:17}{result['accuracy']:7.1%} of {result['count']}"
        for name, kinds in (("generation", generation), ("understanding", understanding))
        for kind, result in kinds.items()
    ]
    lines.append(
        f"{'variety':14}{variety['num_distinct']} of {variety['num_images']} images of one prompt are distinct, with "
        f"a mean distance of {variety['mean_distance']:.2f} of 255"
    )
    tell(is_json, "\n".join(lines), results)
    if output is not None:
        write_json(results, output)
