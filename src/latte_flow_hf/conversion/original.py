# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A flat training state dict <-> this layout, by a table of names that reads both ways."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from .card import pipeline_card, state_dict_card
from .folders import MODEL, edited, one_velocity, read_pipeline, source_name
from .plan import Plan
from .streaming import check_tensors, read_pickle, read_safetensors, some, untied


class KeyTable:
    """Pairs of patterns, original and ours; in both, `{layer}` stands for a number and `{rest}` for all that follows.

    Args:
        pairs (`list[tuple[str, str]]`): the first one that matches a key counts.
        where (`str`): the table's name in errors.
    """

    def __init__(self, pairs: list[tuple[str, str]], where: str):
        self.pairs, self.where = pairs, where

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> "KeyTable":
        """Read a table from YAML or JSON: a list of pairs.

        Args:
            path (`str` or `Path`, *optional*): the package's own if not given.

        Raises:
            `OSError`: if there is no such file.
            `ValueError`: if it is no list of pairs, or the fields of a pair differ.
        """
        path = Path(path or Path(__file__).with_name("original_keys.yaml"))
        try:
            pairs = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"key table {path} is no YAML: {error}") from error
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"key table {path} must be a list of pairs [original, ours].")
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair)):
                raise ValueError(f"key table {path}: {pair!r} is no pair [original, ours].")
            fields = [sorted(re.findall(r"\{(\w+)\}", item)) for item in pair]
            if fields[0] != fields[1] or fields[0] not in ([], ["layer"], ["rest"], ["layer", "rest"]):
                raise ValueError(
                    f"key table {path}: {pair!r} must have {{layer}} and {{rest}} once on both sides, or on neither."
                )
        return cls([(original, ours) for original, ours in pairs], str(path))

    def to_ours(self, keys: Iterable[str]) -> dict[str, str]:
        """Our names, by the original ones.

        Raises:
            `ValueError`: naming the keys that the table does not list, or leads to the same name, or not back.
        """
        return self._translate(keys, 0)

    def to_original(self, names: Iterable[str]) -> dict[str, str]:
        """The original names, by ours; errors as of `to_ours`."""
        return self._translate(names, 1)

    def _translate(self, keys: Iterable[str], side: int) -> dict[str, str]:
        translated = {key: self._other(key, side) for key in keys}
        unknown = [key for key, other in translated.items() if other is None]
        if unknown:
            raise ValueError(
                f"key table {self.where} does not list {len(unknown)} keys: {some(unknown)}; give a table that does."
            )
        names = {key: other for key, other in translated.items() if other is not None}
        one_way = [f"{key} -> {name}" for key, name in names.items() if self._other(name, 1 - side) != key]
        if one_way:
            raise ValueError(f"key table {self.where} does not lead back from {some(one_way)}; put that line first.")
        return names

    def _other(self, key: str, side: int) -> str | None:
        for pair in self.pairs:
            match = _pattern(pair[side]).fullmatch(key)
            if match:
                return pair[1 - side].format(**match.groupdict())
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
            A pipeline's folder or hub id that gives everything else: configurations, processor, autoencoder.
            `initialize` makes one. Its weights are replaced.
        table (`str` or `Path`, *optional*): a file as of [`KeyTable`]; the package's own if not given.
        tower_only (`bool`, defaults to `False`): the file holds the tower alone; the backbone is the template's.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if the file holds more than tensors, or its keys or shapes are not exactly the template's.
    """
    checkpoint = Path(checkpoint)
    read = read_safetensors if checkpoint.suffix == ".safetensors" else read_pickle
    stored = read(checkpoint)
    pipeline = read_pipeline(template)
    names = KeyTable.from_file(table).to_ours(stored)
    tensors = {names[key]: tensor for key, tensor in stored.items()}
    if tower_only:
        backbone = [key for key, name in names.items() if name.startswith("vlm.")]
        if backbone:
            raise ValueError(f"{checkpoint} holds the backbone too ({some(backbone)}): tower_only must not be set.")
        tensors |= {name: tensor for name, tensor in pipeline.weights[MODEL].items() if name.startswith("vlm.")}
    tensors = check_tensors(untied(tensors, pipeline.model, checkpoint), pipeline.model, checkpoint)
    dtype = functools.reduce(torch.promote_types, [t.dtype for n, t in tensors.items() if n.startswith("tower.")])
    origin = f"The weights of `{source_name(checkpoint)}`; all else is that of `{pipeline.name}`."
    texts = {
        **pipeline.texts,
        "README.md": pipeline_card(pipeline.config, origin),
        # transformers loads in the type that is written here: a file in float32 must not become bfloat16 unasked.
        "model/config.json": edited(pipeline.texts["model/config.json"], dtype=str(dtype).removeprefix("torch.")),
    }
    weights = {**pipeline.weights, MODEL: {name: tensors[name] for name in pipeline.weights[MODEL]}}
    return Plan(texts, weights, lambda written: one_velocity(pipeline.config, written[MODEL]))


def to_original(source: str | Path, table: str | Path | None = None, tower_only: bool = False) -> Plan:
    """Plan the flat state dict of a pipeline's model, one safetensors file; the way back of `from_original`.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.
        table (`str` or `Path`, *optional*): a file as of [`KeyTable`]; the package's own if not given.
        tower_only (`bool`, defaults to `False`): leave the frozen backbone out.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if the table does not list a key.
    """
    pipeline = read_pipeline(source)
    tensors = {n: t for n, t in pipeline.weights[MODEL].items() if n.startswith("tower.") or not tower_only}
    keys = KeyTable.from_file(table).to_original(tensors)
    ours = {key: name for name, key in keys.items()}

    def check(written: dict) -> str:
        return one_velocity(pipeline.config, {ours[key]: tensor for key, tensor in written[""].items()})

    texts = {"README.md": state_dict_card(pipeline.name, pipeline.config)}
    return Plan(texts, {"": {keys[name]: tensor for name, tensor in tensors.items()}}, check, single_file=True)
