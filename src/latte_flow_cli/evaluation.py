# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `evaluate` and `evaluate ...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Seed, Steps
from .verbs import app, check_device, load_pipeline, one_line_errors, tell, verb


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
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the results.")] = None,
    device: Device = None,
    is_json: Json = False,
) -> None:
    """Image quality: how close generated images are to real ones, how varied, and whether they are copies."""
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(output)!r}.")
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


verb(images, group)
verb(imagenet, group)
