# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a conversion will write, and how it is written: whole or not at all.

Every operation of this package gives a [`Plan`], which is cheap: names, types and shapes, but no weights. `describe`
is its dry run, `write` carries it out.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from .streaming import StoredTensor, read_safetensors, safetensors_header, verify_safetensors, write_safetensors


MAX_SHARD_SIZE = "5GB"

Weights = dict[str, dict[str, StoredTensor]]


@dataclass
class Plan:
    """Files to write.

    Args:
        texts (`dict[str, bytes]`): contents of small files by their path in the output folder.
        weights (`dict[str, dict[str, StoredTensor]]`):
            Tensors by the path of their file without its suffix (`"model/model"`); sharded when written.
        check (`Callable[[Weights], str]`):
            What is tried on the weights as they were written, `weights` read back; tells what it found.
        single_file (`bool`, defaults to `False`):
            The output is one safetensors file: `weights` has the one path `""`, and `texts` go into its metadata.
    """

    texts: dict[str, bytes]
    weights: Weights
    check: Callable[[Weights], str]
    single_file: bool = False

    def describe(self, max_shard_size: int | str = MAX_SHARD_SIZE) -> list[str]:
        """The dry run: every file with its size in bytes, every tensor with its type and shape.

        Raises:
            `ValueError`: if `max_shard_size` is no size.
        """
        if self.single_file:
            lines = [f"in the metadata: {path}, {len(text):,} bytes" for path, text in self.texts.items()]
        else:
            texts = {**self.texts, **self._indices(max_shard_size)}
            lines = [f"{path}: {len(text):,} bytes" for path, text in texts.items()]
        for path, tensors in self._files(max_shard_size).items():
            size = self._size(tensors)
            lines.append(f"{path or 'one file'}: {size:,} bytes, {len(tensors)} tensors")
            lines += [f"    {name} {str(t.dtype).removeprefix('torch.')} {t.shape}" for name, t in tensors.items()]
        return [*lines, f"{self.total_size(max_shard_size):,} bytes in all"]

    def total_size(self, max_shard_size: int | str = MAX_SHARD_SIZE) -> int:
        """In bytes."""
        texts = {} if self.single_file else {**self.texts, **self._indices(max_shard_size)}
        weights = sum(self._size(tensors) for tensors in self._files(max_shard_size).values())
        return sum(len(text) for text in texts.values()) + weights

    def write(self, output: str | Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> str:
        """Write everything beside `output`, read it back and compare, then rename.

        Args:
            output (`str` or `Path`): the folder (or the single file) to make.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): of the weights' files.

        Returns:
            `str`: what the check found.

        Raises:
            `ValueError`: if `output` exists or is no name for a single file, or `max_shard_size` is no size.
            `OSError`: if the disk has too little room, or what was written reads back differently. Nothing stays.
        """
        output = Path(output)
        if self.single_file and output.suffix != ".safetensors":
            raise ValueError(f"output must name a .safetensors file, got {str(output)!r}.")
        if output.exists() or output.is_symlink():
            raise ValueError(f"output {output} exists; give another one, or remove it.")
        needed = self.total_size(max_shard_size)
        parent = next(folder for folder in output.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(f"output {output} takes {needed:,} bytes, but its disk has {free:,} left.")
        partial = output.with_name(output.name + ".partial")
        _remove(partial)
        try:
            hashes = self._write(partial, max_shard_size)
            found = self._verify(partial, max_shard_size, hashes)
            partial.rename(output)
        except BaseException:
            _remove(partial)
            raise
        return found

    def _files(self, max_shard_size: int | str) -> Weights:
        """The tensors of each weights file."""
        if self.single_file:
            return self.weights
        return {
            str(Path(stem).with_name(name)): {key: tensors[key] for key in keys}
            for stem, tensors in self.weights.items()
            for name, keys in split_weights(stem, tensors, max_shard_size).filename_to_tensors.items()
        }

    def _indices(self, max_shard_size: int | str) -> dict[str, bytes]:
        """The index of each set of shards."""
        indices = {}
        for stem, tensors in self.weights.items():
            split = split_weights(stem, tensors, max_shard_size)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                indices[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2).encode() + b"\n"
        return indices

    def _metadata(self) -> dict[str, str]:
        texts = {path: text.decode() for path, text in self.texts.items()} if self.single_file else {}
        return {"format": "pt", **texts}

    def _size(self, tensors: dict[str, StoredTensor]) -> int:
        header = safetensors_header(tensors, self._metadata())
        return len(header) + sum(tensor.nbytes for tensor in tensors.values())

    def _write(self, partial: Path, max_shard_size: int | str) -> dict[str, dict[str, str]]:
        partial.parent.mkdir(parents=True, exist_ok=True)
        hashes = {}
        with self._progress("writing") as progress:
            for path, tensors in self._files(max_shard_size).items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                hashes[path] = write_safetensors(partial / path, tensors, self._metadata(), progress)
        if not self.single_file:
            for path, text in {**self.texts, **self._indices(max_shard_size)}.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(text)
        return hashes

    def _verify(self, partial: Path, max_shard_size: int | str, hashes: dict[str, dict[str, str]]) -> str:
        with self._progress("verifying") as progress:
            for path, tensors in self._files(max_shard_size).items():
                verify_safetensors(partial / path, tensors, hashes[path], progress)
        written: Weights = {stem: {} for stem in self.weights}
        for stem, tensors in self.weights.items():
            names = [""] if self.single_file else split_weights(stem, tensors, max_shard_size).filename_to_tensors
            for name in names:
                file = partial if self.single_file else (partial / stem).with_name(name)
                written[stem] |= read_safetensors(file)
        return f"{sum(map(len, written.values()))} tensors read back, hashes equal; {self.check(written)}"

    def _progress(self, words: str) -> tqdm:
        total = sum(tensor.nbytes for tensors in self.weights.values() for tensor in tensors.values())
        return tqdm(desc=words, total=total, unit="B", unit_scale=True)


def split_weights(stem: str, tensors: dict[str, StoredTensor], max_shard_size: int | str):
    """Which tensors go into which file of `stem`'s, as huggingface_hub has it."""
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=Path(stem).name + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
