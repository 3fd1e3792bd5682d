# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `train` and `distill`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .verbs import check_source, verb


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
