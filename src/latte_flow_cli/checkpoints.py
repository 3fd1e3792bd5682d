# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `info`, `convert ...` and `publish`."""

import functools
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Model
from .verbs import app, check_source, is_hub_reachable, tell, verb


@verb
def info(
    model: Model = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Also check the weights against the hashes stored in them.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Show the experts of a checkpoint: their intervals, layers and sizes."""
    if model is not None:
        check_source("model", model)
    from latte_flow_hf import tiny_checkpoint
    from latte_flow_hf.checkpoints import describe, inspect_checkpoint, verify

    checkpoint = model or tiny_checkpoint()
    found = inspect_checkpoint(checkpoint)
    verified = verify(checkpoint) if check else []
    event = {**found, "verified": [line.removeprefix("verified").strip() for line in verified]} if check else found
    tell(is_json, "\n".join([*describe(found), *verified]), event)


convert = typer.Typer(
    help="Convert checkpoints from and to other layouts.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(convert, name="convert")


def _conversion(function):
    """Register `convert_x` as the command `convert x`, whose output is checked before the work."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        from latte_flow_hf.files import check_output

        if not kwargs["dry_run"]:
            check_output(kwargs["output"])
        for name in ("source", "template", "backbone", "autoencoder"):
            if name in kwargs:
                check_source(name, kwargs[name])
        return function(*args, **kwargs)

    return verb(checked, convert, function.__name__.removeprefix("convert_").replace("_", "-"))


def _check_safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise typer.BadParameter(f"must be a .safetensors file, got {str(path)!r}.")
    return path


Pipeline = Annotated[str, typer.Argument(help="Folder or hub id of a pipeline.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must not exist.")]
OutputFile = Annotated[
    Path,
    typer.Option("--output", "-o", callback=_check_safetensors, help="The .safetensors file to make; must not exist."),
]
Experts = Annotated[
    int,
    typer.Option(min=1, help="K, the number of experts; must divide the tower's layers, or give --layers-per-expert."),
]


def _parse_numbers(text: str) -> Any:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"must be whole numbers with commas between them, such as 8,7,7,6, got {text!r}.")
    return [int(number) for number in text.split(",")]


LayersPerExpert = Annotated[
    Any,
    typer.Option(parser=_parse_numbers, metavar="N,N,...", help="Number of layers of each expert; equal if left out."),
]
TowerLayers = Annotated[
    Any,
    typer.Option(
        parser=_parse_numbers,
        metavar="I,I,...",
        help="Layers of the backbone that the tower has, by index from 0; all if left out.",
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML file of key pairs; the package's own table if left out."),
]
TowerOnly = Annotated[bool, typer.Option("--tower-only", help="The state dict holds only the tower.")]
ShardSize = Annotated[str, typer.Option(help="Largest weights file, such as 500MB.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")]


def _execute(plan: Any, output: Path, dry_run: bool, max_shard_size: str = "5GB") -> None:
    if dry_run:
        for line in [f"{output} would hold:", *plan.describe(max_shard_size)]:
            typer.echo(line)
    else:
        result = plan.write(output, max_shard_size)
        typer.echo(f"wrote {output}: {result}")


@_conversion
def convert_init(
    backbone: Annotated[str, typer.Argument(help="Folder or hub id of the vision-language model.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder or hub id of the autoencoder.")],
    output: OutputFolder,
    experts: Experts = 4,
    layers_per_expert: LayersPerExpert = None,
    tower_layers: TowerLayers = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights that are new and random.")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A new pipeline from a backbone and an autoencoder."""
    from latte_flow_hf.conversion import initialize

    layers = {"layers_per_expert": layers_per_expert, "tower_layers": tower_layers}
    _execute(initialize(backbone, autoencoder, experts, seed, **layers), output, dry_run, max_shard_size)


@_conversion
def convert_from_original(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A flat state dict: .safetensors, .pt, .pth or .bin."),
    ],
    template: Annotated[str, typer.Argument(help="Folder or hub id of a pipeline for all but the weights.")],
    output: OutputFolder,
    table: Table = None,
    tower_only: TowerOnly = False,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A pipeline from a flat training state dict."""
    from latte_flow_hf.conversion import from_original

    _execute(from_original(checkpoint, template, table, tower_only), output, dry_run, max_shard_size)


@_conversion
def convert_to_original(
    source: Pipeline, output: OutputFile, table: Table = None, tower_only: TowerOnly = False, dry_run: DryRun = False
) -> None:
    """A flat training state dict from a pipeline."""
    from latte_flow_hf.conversion import to_original

    _execute(to_original(source, table, tower_only), output, dry_run)


@_conversion
def convert_regroup(
    source: Pipeline,
    output: OutputFolder,
    experts: Experts,
    layers_per_expert: LayersPerExpert = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """The same pipeline with another number of experts."""
    from latte_flow_hf.conversion import regroup

    _execute(regroup(source, experts, layers_per_expert=layers_per_expert), output, dry_run, max_shard_size)


@_conversion
def convert_extract_backbone(
    source: Pipeline, output: OutputFolder, max_shard_size: ShardSize = "5GB", dry_run: DryRun = False
) -> None:
    """The unchanged backbone as a stock transformers folder."""
    from latte_flow_hf.conversion import extract_backbone

    _execute(extract_backbone(source), output, dry_run, max_shard_size)


@_conversion
def convert_to_single_file(source: Pipeline, output: OutputFile, dry_run: DryRun = False) -> None:
    """A whole pipeline in one file."""
    from latte_flow_hf.conversion import to_single_file

    _execute(to_single_file(source), output, dry_run)


@_conversion
def convert_from_single_file(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file made by `to-single-file`.")],
    output: OutputFolder,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A pipeline from one file."""
    from latte_flow_hf.conversion import from_single_file

    _execute(from_single_file(file), output, dry_run, max_shard_size)


@verb
def publish(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A saved pipeline.")],
    repo_id: Annotated[str, typer.Option(help="Repository user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Add the code, to load it with trust_remote_code=True."),
    ] = False,
) -> None:
    """Upload a pipeline to the hub, with a model card if it has none. Log in with `hf auth login`, or set HF_TOKEN."""
    from latte_flow_hf.pipelines.loading import check_pipeline_files
    from latte_flow_hf.publishing import publish

    check_pipeline_files(folder)
    if not is_hub_reachable():
        raise OSError("the hub cannot be reached; nothing was published.")
    typer.echo(f"published {publish(folder, repo_id, private=private or None, with_code=with_code)}")
