# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `evaluate` and `evaluate ...`."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Steps
from .verbs import app, check_device, check_source, load_pipeline, one_line_errors, tell, verb


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


@partial(verb, group=group)
def understanding(
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Tasks of lmms-eval; for the embedded checkpoint, questions about the tiny world if left out.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder with tasks of your own.")
    ] = None,
    model: Model = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the stock backbone; extracted from the model if left out."),
    ] = None,
    simple: Annotated[
        bool, typer.Option("--simple", help="Run tasks as those of simple models, for answers to choose from.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all results.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    is_json: Json = False,
) -> None:
    """Run tasks of lmms-eval on a model and on its stock backbone, and compare scores and answers."""
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(output)!r}.")
    if tasks is None and (model is not None or include_path is not None):
        raise typer.BadParameter("--tasks must name tasks; only those of the embedded checkpoint can be left out.")
    import tempfile

    # lmms-eval prints and logs on stdout, from its import on.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        from latte_flow_hf.files import check_output, write_json

        if output is not None:
            check_output(output, replace=True)
        for name, source in (("model", model), ("backbone", backbone)):
            if source is not None:
                check_source(name, source)
        import lmms_eval  # noqa: F401

        from latte_flow_hf import tiny_checkpoint
        from latte_flow_hf.conversion import extract_backbone
        from latte_flow_hf.evaluation.tinyworld_tasks import QUESTIONS, YES_NO, write_tasks
        from latte_flow_hf.evaluation.understanding import compare_with_backbone, describe, find_tasks

        device = check_device(device)
        names = [QUESTIONS, YES_NO] if simple else [QUESTIONS]
        if tasks is None:
            include_path = Path(scratch, "tasks")
            write_tasks(include_path)
        else:
            names = [name.strip() for name in tasks.split(",")]
        manager = find_tasks(names, include_path)
        checkpoint = model or tiny_checkpoint()
        if backbone is None:
            backbone = str(Path(scratch, "backbone"))
            extract_backbone(checkpoint).write(backbone)
        settings: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": dtype}
        found = compare_with_backbone(checkpoint, backbone, names, manager, scratch, limit, simple, **settings)
    results = {"model": checkpoint, "limit": limit, "simple": simple, **settings, **found}
    tell(is_json, "\n".join(describe(found["tasks"])), results)
    if output is not None:
        write_json(results, output)
