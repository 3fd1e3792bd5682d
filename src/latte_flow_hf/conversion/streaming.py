# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Weights on disk, one tensor in memory at a time.

What is unusual here: a safetensors file is written by hand, header first and then tensor after tensor, since the
library's own writer wants all tensors of a file at once. Reading is the library's.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.modeling_utils import PreTrainedModel, str_to_torch_dtype


_DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}

# The format's own limit: readers refuse a longer header.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is needed.

    Args:
        dtype (`torch.dtype`): its type.
        shape (`tuple[int, ...]`): its shape.
        read (`Callable[[], torch.Tensor]`): gives it, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def data(self) -> memoryview:
        """Its bytes."""
        return self.read().detach().contiguous().flatten().view(torch.uint8).numpy().data

    def sha256(self) -> str:
        return hashlib.sha256(self.data()).hexdigest()


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    # Opened anew for each tensor: pages of a mapped file count as memory until it is closed.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        `OSError`: if there is no such file, or it is cut off.
        `ValueError`: if it holds a type that torch has not.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            unknown = {name: s.get_dtype() for name, s in slices.items() if s.get_dtype() not in str_to_torch_dtype}
            if unknown:
                raise ValueError(f"weights {path} hold tensors of unknown types: {some(unknown)}.")
            return {
                name: StoredTensor(
                    str_to_torch_dtype[s.get_dtype()], tuple(s.get_shape()), partial(_read_tensor, path, name)
                )
                for name, s in slices.items()
            }
    except SafetensorError as error:
        raise OSError(f"weights {path} are cut off or damaged ({error}); save or fetch them again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file that `read_safetensors` has read."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_weights(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of `folder`'s `{stem}.safetensors`, or of the shards that its index names.

    Raises:
        `OSError`: if there are none, a shard is missing or cut off, or does not hold what the index says.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        raise OSError(f"{folder} holds neither {single.name} nor {index.name}; save or fetch its safetensors.")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise OSError(f"index {index} is damaged ({error!r}); save or fetch it again.") from error
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise OSError(f"{index} names {name}, but {folder} does not hold it; save or fetch it again.")
        shard = read_safetensors(folder / name)
        listed = {key for key, value in weight_map.items() if value == name}
        if listed != set(shard):
            raise OSError(f"{index} and {folder / name} disagree about {some(listed ^ set(shard))}.")
        tensors |= shard
    return tensors


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a flat state dict that torch saved; nothing in the file can run code.

    Raises:
        `OSError`: if there is no such file, or it is cut off.
        `ValueError`: if it holds anything but tensors by name.
    """
    if not path.is_file():
        raise OSError(f"there is no file {path}.")
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and is refused, since it might run code; a flat dict of tensors would do "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(f"{path} is cut off, or older than torch's zip format ({error}); save it again.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a flat dict of tensors, got a {type(loaded).__name__}.")
    strange = [
        key
        for key, value in loaded.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.dtype in _DTYPE_NAMES)
    ]
    if strange:
        raise ValueError(f"{path} must hold tensors by their names and nothing else, got {some(strange)}.")
    return {key: StoredTensor(value.dtype, tuple(value.shape), partial(_same, value)) for key, value in loaded.items()}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def safetensors_header(tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file of these tensors begins with: its length in 8 bytes, then names, types and places.

    Raises:
        `ValueError`: if it is longer than readers accept.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in file_order(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"names and metadata take {len(encoded)} bytes; safetensors allows {MAX_HEADER_BYTES}.")
    return len(encoded).to_bytes(8, "little") + encoded


def file_order(tensors: dict[str, StoredTensor]) -> list[str]:
    """The largest types first, as the library has it: then every tensor starts at a multiple of its item's size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_safetensors(
    path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str], progress: tqdm
) -> dict[str, str]:
    """Write one file, one tensor in memory at a time.

    Returns:
        The SHA-256 of each tensor, taken from its source.
    """
    hashes = {}
    with open(path, "xb") as file:
        file.write(safetensors_header(tensors, metadata))
        for name in file_order(tensors):
            data = tensors[name].data()
            file.write(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
            progress.update(data.nbytes)
    return hashes


def verify_safetensors(path: Path, tensors: dict[str, StoredTensor], hashes: dict[str, str], progress: tqdm) -> None:
    """Read a written file back and compare names, shapes, types and hashes.

    Raises:
        `OSError`: if anything differs.
    """
    written = read_safetensors(path)
    if set(written) != set(tensors):
        raise OSError(f"{path.name} was written wrongly: names differ, {some(set(written) ^ set(tensors))}.")
    for name, tensor in written.items():
        expected = (tensors[name].dtype, tensors[name].shape, hashes[name])
        if (tensor.dtype, tensor.shape, tensor.sha256()) != expected:
            raise OSError(f"{path.name} was written wrongly: {name} is not what it was read from.")
        progress.update(tensor.nbytes)


def module_tensors(stored: dict[str, StoredTensor], model: PreTrainedModel, where: Any) -> dict[str, StoredTensor]:
    """Stored tensors under the names that they have in `model`, which lies on the meta device.

    Checkpoints of Qwen2-VL store `model.layers.0...` and `visual...` for what is `model.language_model.layers.0...`
    and `model.visual...` in memory; transformers' own renaming is used, so that either will do.

    Raises:
        `ValueError`: as of `check_tensors`; or if tied tensors differ, or the model merges or splits stored tensors.
    """
    transforms = get_model_conversion_mapping(model)
    if any(isinstance(transform, WeightConverter) for transform in transforms):
        raise ValueError(
            f"{where}: weights of {model.config.model_type!r} are merged or split when they are loaded, which cannot "
            "be streamed; LatteFlowForConditionalGeneration.from_vlm(model) and save_pretrained would do."
        )
    known = model.state_dict()
    named: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name, _ = rename_source_key(key, transforms, [], model.base_model_prefix, known)
        if name in named:
            raise ValueError(f"{where}: {name} is stored twice, under its original name and its present one.")
        named[name] = tensor
    return check_tensors(untied(named, model, where), model, where)


def untied(tensors: dict[str, StoredTensor], model: PreTrainedModel, where: Any) -> dict[str, StoredTensor]:
    """Without the copies of tied tensors (the language head, where it is the embedding).

    Raises:
        `ValueError`: if such a copy is none.
    """
    tensors = dict(tensors)
    for copy, kept in model.all_tied_weights_keys.items():
        if copy in tensors:
            tensor = tensors.pop(copy)
            if tensors.setdefault(kept, tensor).sha256() != tensor.sha256():
                raise ValueError(
                    f"{where}: {copy} and {kept} differ, but the configuration ties them; "
                    "tie_word_embeddings=false in config.json would do, if they are meant to differ."
                )
    return tensors


def stored_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of `model` holds: everything but the copies of tied tensors."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(tensors: dict[str, StoredTensor], model: nn.Module, where: Any) -> dict[str, StoredTensor]:
    """`tensors` in `model`'s order, if they are exactly its own by name and shape.

    Raises:
        `ValueError`: naming what is missing, unknown or of another shape.
    """
    shapes = stored_names(model)
    missing, unknown = set(shapes) - set(tensors), set(tensors) - set(shapes)
    wrong = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(names)} {words}: {some(names)}"
        for words, names in (("missing", missing), ("not the model's", unknown), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the configuration; " + "; ".join(problems) + ".")
    return {name: tensors[name] for name in shapes}


def some(names: Iterable[Any], limit: int = 8) -> str:
    """The first few of them for a message."""
    listed = sorted(str(name) for name in names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
