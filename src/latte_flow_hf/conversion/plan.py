# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a conversion will write, and how it is written: whole or not at all.

Each conversion of this package returns a [`Plan`], which is cheap: it holds names, types and shapes, but no weights.
`describe` is its dry run, `write` carries it out.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from tqdm import tqdm

from ..files import atomic_write, check_hash, check_output
from .streaming import StoredTensor, read_safetensors, read_weights, write_safetensors


MAX_SHARD_SIZE = "5GB"

Weights = dict[str, dict[str, StoredTensor]]


@dataclass
class Plan:
    """Files to write.

    Args:
        small_files (`dict[str, bytes]`): contents of everything but weights, by path in the output folder.
        weights (`dict[str, dict[str, StoredTensor]]`):
            Tensors by the path of their file without its suffix (`"model/model"`); sharded when written.
        check (`Callable[[Weights], str]`):
            Called with the weights as read back from the output; returns a description of the result.
        single_file (`bool`, defaults to `False`):
            The output is one safetensors file: `weights` has the one path `""`, and `small_files` are its metadata.
    """

    small_files: dict[str, bytes]
    weights: Weights
    check: Callable[[Weights], str]
    single_file: bool = False

    def __post_init__(self) -> None:
        # As in `write_root_config`.
        if not self.single_file and {"model_index.json", "model/config.json"} <= self.small_files.keys():
            self.small_files = {**self.small_files, "config.json": self.small_files["model/config.json"]}

    @property
    def num_bytes(self) -> int:
        """Size of the output in bytes, without the headers and indices of weights files (some kilobytes)."""
        return sum(map(len, self.small_files.values())) + sum(_size(tensors) for tensors in self.weights.values())

    def describe(self, max_shard_size: int | str = MAX_SHARD_SIZE) -> list[str]:
        """The dry run: every file with its size in bytes, every tensor with its type and shape.

        Raises:
            `ValueError`: if `max_shard_size` is not a size.
        """
        weights_files, indices = self._shard(max_shard_size)
        prefix = "in the metadata: " if self.single_file else ""
        lines = [f"{prefix}{path}: {len(content):,} bytes" for path, content in (self.small_files | indices).items()]
        for path, tensors in weights_files.items():
            lines.append(f"{path or 'one file'}: {_size(tensors):,} bytes, {len(tensors)} tensors")
            lines += [f"    {name} {str(t.dtype).removeprefix('torch.')} {t.shape}" for name, t in tensors.items()]
        return [*lines, f"{self.num_bytes:,} bytes in all"]

    def write(self, output: str | Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> str:
        """Write everything next to `output` under a temporary name, read it back and compare, then rename.

        Args:
            output (`str` or `Path`): the folder (or the single file) to make.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): largest size of a weights file.

        Returns:
            `str`: what was compared, and the result of the check.

        Raises:
            `ValueError`: if `output` exists or is not a name for a single file, or `max_shard_size` is not a size.
            `OSError`: if the disk has too little space, a source is damaged according to its stored hash, or an output
                reads back differently. Nothing is left behind.
        """
        output = Path(output)
        if self.single_file and output.suffix != ".safetensors":
            raise ValueError(f"output must name a .safetensors file, got {str(output)!r}.")
        check_output(output)
        weights_files, indices = self._shard(max_shard_size)
        check_output(output, self.num_bytes)
        sources = {tensor.file for tensors in self.weights.values() for tensor in tensors.values()}
        for source in sorted(source for source in sources if source is not None):
            # The output gets a hash of its own, which would be right for damaged tensors as well.
            check_hash(source)
        with atomic_write(output) as partial:
            self._write_weights(partial, weights_files)
            if self.single_file:
                written = {"": read_safetensors(partial)}
            else:
                for path, content in (self.small_files | indices).items():
                    (partial / path).parent.mkdir(parents=True, exist_ok=True)
                    (partial / path).write_bytes(content)
                written = {stem: read_weights((partial / stem).parent, Path(stem).name) for stem in self.weights}
            found = self.check(written)
        return f"{sum(map(len, written.values()))} tensors read back and compared; {found}"

    def _shard(self, max_shard_size: int | str) -> tuple[Weights, dict[str, bytes]]:
        """The tensors of each weights file, and the indices of those that are sharded."""
        if self.single_file:
            return self.weights, {}
        weights_files: Weights = {}
        indices: dict[str, bytes] = {}
        for stem, tensors in self.weights.items():
            split = split_weights(stem, tensors, max_shard_size)
            for name, keys in split.filename_to_tensors.items():
                weights_files[str(Path(stem).with_name(name))] = {key: tensors[key] for key in keys}
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                indices[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2).encode() + b"\n"
        return weights_files, indices

    def _write_weights(self, partial: Path, weights_files: Weights) -> None:
        metadata = {"format": "pt"}
        if self.single_file:
            metadata |= {path: content.decode() for path, content in self.small_files.items()}
        total = sum(_size(tensors) for tensors in weights_files.values())
        with tqdm(desc="writing", total=total, unit="B", unit_scale=True) as progress:
            for path, tensors in weights_files.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                write_safetensors(partial / path, tensors, metadata)
                progress.update(_size(tensors))


def split_weights(stem: str, tensors: Mapping[str, Any], max_shard_size: int | str) -> StateDictSplit:
    """Assign tensors to weights files of at most `max_shard_size`, named as huggingface_hub does."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=Path(stem).name + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _size(tensors: dict[str, StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
