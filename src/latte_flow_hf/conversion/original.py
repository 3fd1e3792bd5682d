# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A flat training state dict <-> a pipeline, by a table of names that is read both ways."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ..cards import pipeline_card, state_dict_card
from ..files import read_yaml
from .folders import MODEL, check_velocity, edit_json, read_pipeline, source_name
from .plan import Plan
from .streaming import StoredTensor, format_names, module_tensors, read_pickle, read_safetensors


class KeyTable:
    """Pairs of patterns: the original name of a tensor, and its name here.

    In both, `{layer}` stands for a number and `{rest}` for everything that follows.

    Args:
        pairs (`list[tuple[str, str]]`): the first pair that matches a name is used.
        name (`str`): the table's name in errors.
    """

    def __init__(self, pairs: list[tuple[str, str]], name: str):
        self.pairs, self.name = pairs, name

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> "KeyTable":
        """Read a table from YAML or JSON: a list of pairs.

        Args:
            path (`str` or `Path`, *optional*): the package's own table if not given.

        Raises:
            `OSError`: if there is no such file.
            `ValueError`: if it is not a list of pairs, or the fields of a pair differ.
        """
        path = Path(path or Path(__file__).with_name("original_keys.yaml"))
        pairs = read_yaml(path, "key table")
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"key table {path} must be a list of pairs [original name, name here].")
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair)):
                raise ValueError(f"key table {path}: {pair!r} is not a pair [original name, name here].")
            fields = [sorted(re.findall(r"\{(\w+)\}", item)) for item in pair]
            if fields[0] != fields[1] or fields[0] not in ([], ["layer"], ["rest"], ["layer", "rest"]):
                raise ValueError(
                    f"key table {path}: {pair!r} must have {{layer}} and {{rest}} once on both sides or on neither."
                )
        return cls([(original, name) for original, name in pairs], str(path))

    def from_original(self, originals: Iterable[str]) -> dict[str, str]:
        """The names here, by the original names.

        Raises:
            `ValueError`: naming those that the table does not list, or whose translation does not lead back to them.
        """
        return self._translate(originals, self.pairs)

    def to_original(self, names: Iterable[str]) -> dict[str, str]:
        """The original names, by the names here; raises the same errors as `from_original`."""
        return self._translate(names, [(name, original) for original, name in self.pairs])

    def _translate(self, names: Iterable[str], pairs: list[tuple[str, str]]) -> dict[str, str]:
        reverse = [(target, source) for source, target in pairs]
        translations: dict[str, str] = {}
        unknown, one_way = [], []
        for name in names:
            translation = _translate_name(name, pairs)
            if translation is None:
                unknown.append(name)
                continue
            translations[name] = translation
            if _translate_name(translation, reverse) != name:
                one_way.append(f"{name} -> {translation}")
        if unknown:
            raise ValueError(
                f"key table {self.name} does not list {len(unknown)} keys: {format_names(unknown)}; use one that does."
            )
        if one_way:
            raise ValueError(
                f"key table {self.name} does not lead back from {format_names(one_way)}; move that line to the top."
            )
        return translations


def _translate_name(name: str, pairs: list[tuple[str, str]]) -> str | None:
    for source, target in pairs:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**match.groupdict())
    return None


@functools.cache
def _pattern(text: str) -> re.Pattern:
    escaped = re.escape(text).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    return re.compile(escaped)


def from_original(
    checkpoint: str | Path, template: str | Path, table: str | Path | None = None, tower_only: bool = False
) -> Plan:
    """Plan a pipeline from a flat training state dict.

    Args:
        checkpoint (`str` or `Path`): `.safetensors`; or `.pt`, `.pth`, `.bin`, read without running code.
        template (`str` or `Path`):
            Folder or hub id of a pipeline that gives everything else: configurations, processor and autoencoder. Make
            one with `initialize`. Its weights are replaced.
        table (`str` or `Path`, *optional*): file of a [`KeyTable`]; the package's own table if not given.
        tower_only (`bool`, defaults to `False`): the file holds only the tower; keep the template's backbone.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if the file holds more than tensors, or its keys or shapes are not exactly the template's.
    """
    checkpoint = Path(checkpoint)
    read = read_safetensors if checkpoint.suffix == ".safetensors" else read_pickle
    stored = read(checkpoint)
    pipeline = read_pipeline(template)
    names = KeyTable.from_file(table).from_original(stored)
    tensors = {names[key]: tensor for key, tensor in stored.items()}
    if tower_only:
        backbone = [key for key, name in names.items() if name.startswith("vlm.")]
        if backbone:
            raise ValueError(
                f"{checkpoint} also holds the backbone ({format_names(backbone)}); do not set tower_only."
            )
        tensors |= {name: tensor for name, tensor in pipeline.weights[MODEL].items() if name.startswith("vlm.")}
    tensors = module_tensors(tensors, pipeline.model, checkpoint)
    dtype, template_dtype = _tower_dtype(tensors), _tower_dtype(pipeline.weights[MODEL])
    origin = f"The weights of `{source_name(checkpoint)}`; everything else is from `{pipeline.name}`."
    model_config = pipeline.small_files["model/config.json"]
    if dtype != template_dtype:
        # transformers loads weights in this type: the template's must not change that of the file. Where both are the
        # same, it may differ from them on purpose, such as float16 on disk that is loaded as float32.
        model_config = edit_json(model_config, dtype=str(dtype).removeprefix("torch."))
    small_files = {
        **pipeline.small_files,
        "README.md": pipeline_card(pipeline.config, origin),
        "model/config.json": model_config,
    }
    weights = {**pipeline.weights, MODEL: tensors}
    return Plan(small_files, weights, lambda written: check_velocity(pipeline.config, written[MODEL]))


def _tower_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for n, t in tensors.items() if n.startswith("tower.")])


def to_original(source: str | Path, table: str | Path | None = None, tower_only: bool = False) -> Plan:
    """Plan the flat state dict of a pipeline's model, one safetensors file; the inverse of `from_original`.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.
        table (`str` or `Path`, *optional*): file of a [`KeyTable`]; the package's own table if not given.
        tower_only (`bool`, defaults to `False`): leave the frozen backbone out.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if the table does not list a key.
    """
    pipeline = read_pipeline(source)
    tensors = {n: t for n, t in pipeline.weights[MODEL].items() if n.startswith("tower.") or not tower_only}
    originals = KeyTable.from_file(table).to_original(tensors)

    def check(written: dict) -> str:
        return check_velocity(pipeline.config, {name: written[""][originals[name]] for name in tensors})

    small_files = {"README.md": state_dict_card(pipeline.name, pipeline.config)}
    weights = {"": {originals[name]: tensor for name, tensor in tensors.items()}}
    return Plan(small_files, weights, check, single_file=True)
