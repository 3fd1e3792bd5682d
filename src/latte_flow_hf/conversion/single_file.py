# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline <-> one safetensors file: tensors as `model.NAME` and `vae.NAME`, all other files in its metadata."""

import json
from pathlib import Path, PurePosixPath

from ..cards import pipeline_card
from ..files import HASH_KEY
from ..modeling.configuration_latte_flow import LatteFlowConfig
from .folders import AUTOENCODER, MODEL, autoencoder_on_meta, check_velocity, model_on_meta, read_pipeline
from .plan import Plan, Weights
from .streaming import StoredTensor, check_tensors, format_names, module_tensors, read_metadata, read_safetensors


_PREFIXES = {MODEL: "model.", AUTOENCODER: "vae."}


def to_single_file(source: str | Path) -> Plan:
    """Plan one file that holds the pipeline; a folder without a model card gets one.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if it holds another model, its weights do not fit its configuration, or another file is not
            text.
    """
    pipeline = read_pipeline(source)
    card = pipeline_card(pipeline.config, f"`{pipeline.name}` in one file.")
    small_files = {"README.md": card, **pipeline.small_files}
    for path, content in small_files.items():
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} in {source} is not text and cannot be stored as metadata; remove it.") from error
    tensors = {
        _PREFIXES[stem] + name: tensor for stem, group in pipeline.weights.items() for name, tensor in group.items()
    }

    def check(written: Weights) -> str:
        return check_velocity(pipeline.config, _split(written[""])[MODEL])

    return Plan(small_files, {"": tensors}, check, single_file=True)


def from_single_file(path: str | Path) -> Plan:
    """Plan the folder of a pipeline that is stored in a single file.

    Args:
        path (`str` or `Path`): a file made by `to_single_file`.

    Raises:
        `OSError`: if the file is missing or truncated.
        `ValueError`: if it is not a pipeline, or a path in its metadata leads outside the folder.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path), read_metadata(path)
    for name in ("format", HASH_KEY):
        metadata.pop(name, None)
    outside = [p for p in metadata if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or "\\" in p]
    if outside:
        raise ValueError(f"{path} names files outside the folder: {format_names(outside)}.")
    needed = ("model_index.json", "model/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    missing = [name for name in needed if name not in metadata]
    unknown = [name for name in tensors if not name.startswith(tuple(_PREFIXES.values()))]
    if missing or unknown:
        raise ValueError(
            f"{path} is not a pipeline in one file (missing in its metadata: {format_names(missing) or 'nothing'}; "
            f"tensors of neither model nor vae: {format_names(unknown) or 'none'}); make one with `latte-flow convert "
            "to-single-file`."
        )
    config = LatteFlowConfig.from_dict(json.loads(metadata["model/config.json"]))
    vae = autoencoder_on_meta(json.loads(metadata["vae/config.json"]), path)
    components = _split(tensors)
    weights = {
        MODEL: module_tensors(components[MODEL], model_on_meta(config), path),
        AUTOENCODER: check_tensors(components[AUTOENCODER], vae, path),
    }
    small_files = {name: content.encode() for name, content in metadata.items()}
    return Plan(small_files, weights, lambda written: check_velocity(config, written[MODEL]))


def _split(tensors: dict[str, StoredTensor]) -> Weights:
    """The tensors of each component, under the component's own names."""
    return {
        stem: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for stem, prefix in _PREFIXES.items()
    }
