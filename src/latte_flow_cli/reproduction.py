# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verb `reproduce`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device
from .verbs import check_device, check_source, verb


RECIPES = Path("recipes/reproduce")


@verb
def reproduce(
    recipe: Annotated[
        Path | None,
        typer.Argument(dir_okay=False, help=f"A YAML file; {RECIPES}/full.yaml, as in a clone, if left out."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{RECIPES}/quick.yaml: minutes, one seed, no verdict on quality.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for runs and report; outputs/ and the recipe's name if left out."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time, with one thread each; all cores if left out, or 1 on a GPU."),
    ] = None,
    device: Device = None,
) -> None:
    """Make the paper's comparisons on the tiny world: train, measure, judge its claims, write a report.

    Started again, the command goes on where it was stopped; when all is measured, it only writes the report again.
    """
    if recipe is not None and quick:
        raise ValueError("give either a recipe or --quick.")
    path = recipe or RECIPES / ("quick.yaml" if quick else "full.yaml")
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist; run the command in a clone, or give the path of a recipe.")
    from latte_flow_hf.reproduction import Reproduction
    from latte_flow_hf.reproduction import reproduce as run_reproduction

    settings = Reproduction.from_yaml(path)
    if settings.pipeline != "tinyworld":
        check_source(f"recipe {path}: pipeline", settings.pipeline)
    if device is not None and ":" in device:
        raise ValueError(
            f"device must be cpu or the kind of the accelerator, got {device!r}; choose one by its "
            "own variable, such as CUDA_VISIBLE_DEVICES."
        )
    folder = output or Path("outputs", f"reproduce-{path.stem}")
    report = run_reproduction(settings, folder, check_device(device), processes, typer.echo)
    typer.echo(f"report: {report.absolute()} and {report.with_suffix('.html').name} beside it")
