# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `evaluate` and `evaluate ...`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Steps
from .verbs import app, load_pipeline, one_line_errors, tell, verb


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
    tinyworld.check_world(pipe)
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
    for kind, result in generation.items():
        accuracies = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in result["categories"].items())
        errors = ", ".join(f"{number} {name}" for name, number in result["errors"].items())
        lines.append(f"{'categories':14}{kind:17}{accuracies}; errors: {errors or 'none'}")
    lines.append(
        f"{'variety':14}{variety['num_distinct']} of {variety['num_images']} images of one prompt are distinct, with "
        f"a mean distance of {variety['mean_distance']:.2f} of 255"
    )
    tell(is_json, "\n".join(lines), results)
    if output is not None:
        write_json(results, output)


def round_trip(
    model: Model = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and the noise.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all results.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Generate images of the tiny world, and ask the same model what it sees in them."""
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(output)!r}.")
    from latte_flow_hf.evaluation import tinyworld
    from latte_flow_hf.evaluation.round_trip import make_round_trip
    from latte_flow_hf.files import check_output, write_json

    if output is not None:
        check_output(output, replace=True)
    pipe = load_pipeline(model, device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    results = make_round_trip(pipe, tinyworld.generation_prompts(seed), seed, **call)
    lines = []
    for kind, result in results.items():
        read = result["oracle_agreement"]
        of_read = "nothing read" if read is None else f"{read:.1%} of {result['oracle_count']} that it reads"
        lines.append(
            f"{kind:17}{result['agreement']:7.1%} of {result['count']} answers agree with the prompt, with the oracle "
            f"{of_read}"
        )
    for verdict in ("right", "wrong"):
        cells = {
            name: sum(result["table"][verdict][name] for result in results.values()) for name in ("agrees", "differs")
        }
        lines.append(
            f"{'image ' + verdict:17}the answer agrees with the prompt {cells['agrees']} times, differs "
            f"{cells['differs']} times"
        )
    event = {"seed": seed, **call, "round_trip": results}
    tell(is_json, "\n".join(lines), event)
    if output is not None:
        write_json(event, output)


def generate(
    suite: Annotated[
        Literal["geneval", "dpg-bench", "wise", "coco", "mjhq"],
        typer.Argument(help="The benchmark: geneval, dpg-bench, wise, coco (COCO-30K) or mjhq (MJHQ-30K)."),
    ],
    prompts: Annotated[
        list[Path],
        typer.Argument(exists=True, help="Its prompts, as its authors publish them; of wise several files."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; its images/ is what the evaluator reads.")],
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image's noise; image i has seed + i.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Only the first prompts, for a trial; run again for all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; faster on a GPU if several.")] = 1,
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Generate the images of a benchmark in the layout that its evaluator reads. Existing ones are kept."""
    from accelerate import PartialState

    from latte_flow_hf.evaluation.prompt_suites import check_suite_folder, generate_suite, read_suite

    check_suite_folder(output)
    texts = read_suite(suite, prompts)
    names: dict[str, str] = {}
    # Each process has its own accelerator, unless a device is given.
    pipe = load_pipeline(model, "cpu" if device is None else device, dtype, lora, fast, names)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    num_new, num_existing = generate_suite(
        pipe, suite, texts, output, seed, num_prompts, batch_size, device, names, **call
    )
    if PartialState().is_main_process:
        images = output / "images"
        event = {"folder": str(images.absolute()), "num_new": num_new, "num_existing": num_existing}
        tell(is_json, f"wrote {images}: {num_new} new files, {num_existing} existed", event)


verb(round_trip, group, "round-trip")
verb(generate, group)
