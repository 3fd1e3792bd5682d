# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `train`, `distill` and `plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json
from .verbs import check_source, tell, verb


TrainedFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the finished pipeline or adapter; must not exist.")
]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Resume although the recipe or the starting model has changed.")
]


@verb
def train(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file, such as those in recipes/.")
    ],
    output: TrainedFolder,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and logs; defaults to runs/ and the name of the recipe."),
    ] = None,
    allow_changes: AllowChanges = False,
) -> None:
    """Train a model. Started again, the command resumes from the last checkpoint."""
    from latte_flow_hf.training.recipe import Recipe

    _train(recipe, Recipe.from_yaml(recipe), output, work_dir, allow_changes)


@verb
def distill(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file with a section `distillation`.")
    ],
    output: TrainedFolder,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for trajectories, checkpoints and logs; defaults to runs/ and the recipe's name."),
    ] = None,
    allow_changes: AllowChanges = False,
) -> None:
    """Train a model to generate in few steps what a teacher generates in many. Resumes as `train` does."""
    from latte_flow_hf.training.recipe import Recipe

    settings = Recipe.from_yaml(recipe)
    if settings.distillation is None:
        raise ValueError(f"recipe {recipe} has no section `distillation`; use `latte-flow train` for it.")
    _train(recipe, settings, output, work_dir, allow_changes)


def _train(recipe: Path, settings: Any, output: Path, work_dir: Path | None, allow_changes: bool) -> None:
    from accelerate import PartialState

    from latte_flow_hf.files import check_output
    from latte_flow_hf.training import train

    check_output(output)
    sources = {f"model: {name}": getattr(settings.model, name) for name in ("pipeline", "backbone", "autoencoder")}
    if settings.distillation is not None:
        sources["distillation: teacher"] = settings.distillation.teacher
        sources["distillation: student"] = settings.distillation.student
    for name, source in sources.items():
        if source not in (None, "tinyworld"):
            check_source(f"recipe {recipe}: {name}", source)
    result = train.train(settings, work_dir or Path("runs", recipe.stem), output, allow_changes)
    if PartialState().is_main_process:
        typer.echo(f"wrote {result}")


@verb
def plan(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file, such as those in recipes/.")
    ],
    device: Annotated[
        str,
        typer.Option(
            help="a100-40gb, a100-80gb, b200, h100, h200, l40s or rtx4090; any name with --memory-gb and --tflops."
        ),
    ],
    num_devices: Annotated[int, typer.Option(help="Number of devices, each with a process of its own.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the tower: recipes/accelerate/fsdp2.yaml.")] = False,
    utilisation: Annotated[float, typer.Option(help="Share of the peak speed that is reached, up to 1.")] = 0.35,
    num_images: Annotated[int | None, typer.Option(help="Images of the data.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Different prompts of the data; with captions as many as images if left out.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt with its chat template.")] = 32,
    backbone_config: Annotated[
        Path | None, typer.Option(help="Folder with the backbone's config.json, if it is not where the recipe says.")
    ] = None,
    autoencoder_config: Annotated[
        Path | None, typer.Option(help="Folder with the autoencoder's config.json, likewise.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Memory of a device, in place of the data sheet's.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Peak TFLOP/s of a device, in place of the data sheet's.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Tell what a recipe costs before it runs: memory per device, operations, hours, disk, and what does not fit."""
    from latte_flow_hf.training.devices import find_device
    from latte_flow_hf.training.plan import make_plan
    from latte_flow_hf.training.plan_report import plan_text
    from latte_flow_hf.training.published import AUTOENCODERS, BACKBONES
    from latte_flow_hf.training.recipe import Recipe

    settings, found = Recipe.from_yaml(recipe), find_device(device, memory_gb, tflops)
    sources = {
        "pipeline": settings.model.pipeline,
        "backbone": None if backbone_config else settings.model.backbone,
        "autoencoder": None if autoencoder_config else settings.model.autoencoder,
    }
    for name, source in sources.items():
        if source is not None and source not in ("tinyworld", *BACKBONES, *AUTOENCODERS):
            check_source(f"recipe {recipe}: model: {name}", source)
    result = make_plan(
        settings,
        found,
        num_devices,
        fsdp,
        utilisation,
        num_images,
        num_prompts,
        prompt_tokens,
        backbone_config,
        autoencoder_config,
    )
    tell(is_json, plan_text(result, recipe.name), {"recipe": str(recipe), **result.to_dict()})
