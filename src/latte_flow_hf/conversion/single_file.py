# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A whole pipeline <-> one safetensors file: tensors as `model.NAME` and `vae.NAME`, all else in its metadata."""

import json
from pathlib import Path, PurePosixPath

from ..modeling.configuration_latte_flow import LatteFlowConfig
from .card import pipeline_card
from .folders import AUTOENCODER, MODEL, meta_autoencoder, meta_model, one_velocity, read_pipeline
from .plan import Plan, Weights
from .streaming import StoredTensor, check_tensors, read_metadata, read_safetensors, some


_PREFIXES = {MODEL: "model.", AUTOENCODER: "vae."}


def to_single_file(source: str | Path) -> Plan:
    """Plan one file that holds the pipeline; a folder without a model card gets one.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if it is another kind of model, its weights do not fit its configuration, or a file beside the
            weights is no text.
    """
    pipeline = read_pipeline(source)
    texts = {"README.md": pipeline_card(pipeline.config, f"`{pipeline.name}` in one file."), **pipeline.texts}
    for path, text in texts.items():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} in {source} is no text and cannot go into the metadata; remove it.") from error
    tensors = {
        _PREFIXES[stem] + name: tensor for stem, group in pipeline.weights.items() for name, tensor in group.items()
    }
    check = lambda written: one_velocity(pipeline.config, _split(written[""])[MODEL])  # noqa: E731
    return Plan(texts, {"": tensors}, check, single_file=True)


def from_single_file(path: str | Path) -> Plan:
    """Plan the folder that a single file was made from.

    Raises:
        `OSError`: if there is no such file, or it is cut off.
        `ValueError`: if it is no pipeline, or a path in its metadata leads out of the folder.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path), read_metadata(path)
    metadata.pop("format", None)
    astray = [p for p in metadata if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or "\\" in p]
    if astray:
        raise ValueError(f"{path} names files outside of the folder: {some(astray)}.")
    needed = ("model_index.json", "model/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    missing = [name for name in needed if name not in metadata]
    unknown = [name for name in tensors if not name.startswith(tuple(_PREFIXES.values()))]
    if missing or unknown:
        raise ValueError(
            f"{path} is no pipeline in one file (missing in its metadata: {some(missing) or 'nothing'}; tensors of "
            f"neither model nor vae: {some(unknown) or 'none'}); `latte-flow convert to-single-file` makes one."
        )
    config = LatteFlowConfig.from_dict(json.loads(metadata["model/config.json"]))
    vae = meta_autoencoder(json.loads(metadata["vae/config.json"]), path)
    found = _split(tensors)
    weights = {
        MODEL: check_tensors(found[MODEL], meta_model(config), path),
        AUTOENCODER: check_tensors(found[AUTOENCODER], vae, path),
    }
    texts = {name: text.encode() for name, text in metadata.items()}
    return Plan(texts, weights, lambda written: one_velocity(config, written[MODEL]))


def _split(tensors: dict[str, StoredTensor]) -> Weights:
    """The tensors of each component, under its own names."""
    return {
        stem: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for stem, prefix in _PREFIXES.items()
    }
