# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `evaluate` and `evaluate ...`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Seed, Steps
from .verbs import app, check_device, check_source, load_pipeline, one_line_errors, tell, verb


Extractor = Annotated[
    str,
    typer.Option(
        metavar="tinyworld|FILE|FOLDER",
        help="Of features: that of the tiny world; the file inception-2015-12-05.pt; or a vision model's folder.",
    ),
]
OptionalExtractor = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FOLDER|tinyworld",
        help="Of features, with --reference: the file inception-2015-12-05.pt for FID, or as in `evaluate images`.",
    ),
]


def _check_json(path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(path)!r}.")
    return path


ResultsFile = Annotated[
    Path | None, typer.Option("--output", "-o", callback=_check_json, help="JSON file for all results.")
]

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
    output: ResultsFile = None,
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


def images(
    generated: Annotated[Path, typer.Argument(help="Folder of images, or .npz file with arr_0.")],
    reference: Annotated[
        Path,
        typer.Argument(help="Real images that were not trained on: a folder, or .npz with arr_0, or mu and sigma."),
    ],
    extractor: Extractor = "tinyworld",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric, may be repeated; all for which there is what they need, if left out."),
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="Images that the model was trained on, to look for copies of them.")
    ] = None,
    nearest_k: Annotated[int, typer.Option(min=1, help="Neighbours, for precision, recall, density, coverage.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once in the extractor.")] = 64,
    output: ResultsFile = None,
    device: Device = None,
    is_json: Json = False,
) -> None:
    """Image quality: how close generated images are to real ones, how varied, and whether they are copies."""
    import torchmetrics  # noqa: F401

    from latte_flow_hf.evaluation import comparison
    from latte_flow_hf.evaluation.features import load_extractor
    from latte_flow_hf.evaluation.image_sets import open_images
    from latte_flow_hf.files import check_output, write_json

    if output is not None:
        check_output(output, replace=True)
    opened, real = open_images(generated), comparison.open_reference(reference)
    results = comparison.compare_images(
        opened,
        real,
        load_extractor(extractor, check_device(device)),
        metric or None,
        comparison.read_prompts_of(opened),
        training,
        nearest_k,
        batch_size,
    )
    tell(is_json, "\n".join(comparison.describe_comparison(results)), results)
    if output is not None:
        write_json(results, output)


def imagenet(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the samples; a stopped run goes on in its folder.")
    ],
    model: Model = None,
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Names of the classes, one per line in the order of labels."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Recipe of the training, for the names and the prompt of the classes."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of a class, {} is its name; that of the recipe, or {}, if left out.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Reference: .npz with mu and sigma, and images arr_0 for precision and recall; or a folder."
        ),
    ] = None,
    extractor: OptionalExtractor = None,
    num_samples: Annotated[int, typer.Option(min=1, help="A multiple of the number of classes.")] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 50,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per shard, a multiple of --batch-size.")] = 500,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width; that of the model if left out.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """FID-50K: class-balanced samples in the layout of ADM's evaluator, and FID, Inception Score, precision, recall.

    Samples by all processes of `accelerate launch`. Without --reference it stops after the samples.
    """
    if (reference is None) != (extractor is None):
        raise typer.BadParameter("--reference and --extractor go together.")
    if classes is None and recipe is None:
        raise typer.BadParameter("give the names of the classes by --classes, --recipe, or both.")
    if reference is not None:
        import torchmetrics  # noqa: F401

    from latte_flow_hf.evaluation import imagenet as samples_50k
    from latte_flow_hf.evaluation.comparison import describe_comparison, open_reference
    from latte_flow_hf.evaluation.features import load_extractor

    names = None if classes is None else samples_50k.read_class_names(classes)
    trained_names = None
    if recipe is not None:
        from latte_flow_hf.training.data import load_class_names
        from latte_flow_hf.training.recipe import Recipe

        data = Recipe.from_yaml(recipe).data
        trained_names, prompt = load_class_names(data), data.prompt if prompt is None else prompt
    real = None if reference is None else open_reference(reference)
    # Each process has its own accelerator, unless a device is given.
    pipe = load_pipeline(model, "cpu" if device is None else device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    prompts = samples_50k.class_prompts(
        names, pipe.model.trained_words, trained_names, "{}" if prompt is None else prompt
    )
    if real is not None and extractor is not None:
        height = size or pipe.default_size
        samples_50k.check_evaluation(num_samples, height, height, real, load_extractor(extractor), prompts)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    samples = samples_50k.generate_class_samples(
        pipe, prompts, output, num_samples, seed, batch_size, shard_size, device, **call
    )
    if samples is None:
        # Another process has the result.
        return
    lines, event = [f"wrote {samples}"], {"samples": str(samples.absolute())}
    if real is not None and extractor is not None:
        results = samples_50k.evaluate_samples(samples, real, load_extractor(extractor, str(pipe.device)))
        lines, event = [*lines, *describe_comparison(results)], {**event, **results}
    tell(is_json, "\n".join(lines), event)


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
    output: ResultsFile = None,
    device: Device = None,
    dtype: Dtype = "float32",
    is_json: Json = False,
) -> None:
    """Run tasks of lmms-eval on a model and on its stock backbone, and compare scores and answers."""
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


def round_trip(
    model: Model = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and the noise.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    output: ResultsFile = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Generate images of the tiny world, and ask the same model what it sees in them."""
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


verb(images, group)
verb(imagenet, group)
verb(understanding, group)
verb(round_trip, group, "round-trip")
verb(generate, group)
