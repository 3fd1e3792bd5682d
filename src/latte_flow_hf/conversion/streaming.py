# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Weights on disk that are read when they are needed.

What is unusual here: a tensor that safetensors or torch reads from a file is a view of the memory-mapped file, and
`save_file` writes it from there. Copying a checkpoint of any size therefore allocates next to nothing; only tensors
that are new, one file of them at a time, take memory.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.modeling_utils import PreTrainedModel, str_to_torch_dtype

from ..files import EMPTY_HASH, HASH_KEY, read_weight_map, store_hash


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is needed.

    Args:
        dtype (`torch.dtype`): its type.
        shape (`tuple[int, ...]`): its shape.
        read (`Callable[[], torch.Tensor]`): returns it, on the CPU.
        file (`Path`, *optional*): the safetensors file that it is read from.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def equals(self, other: "StoredTensor") -> bool:
        """Whether type, shape and every bit are the same (NaN included)."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(*(tensor.read().contiguous().flatten().view(torch.uint8) for tensor in (self, other)))


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    # The file is opened for each tensor, so that its mapping ends with the tensor.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read names, types and shapes of the tensors in one file.

    Raises:
        `OSError`: if the file is missing or truncated.
        `ValueError`: if it holds a type that torch does not have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            unknown = {name: s.get_dtype() for name, s in slices.items() if s.get_dtype() not in str_to_torch_dtype}
            if unknown:
                raise ValueError(f"weights {path} hold tensors of unknown types: {format_names(unknown)}.")
            return {
                name: StoredTensor(
                    str_to_torch_dtype[s.get_dtype()], tuple(s.get_shape()), partial(_read_tensor, path, name), path
                )
                for name, s in slices.items()
            }
    except SafetensorError as error:
        raise OSError(f"{path} is truncated or damaged ({error}); save or download it again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a file that `read_safetensors` accepts."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_weights(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Read names, types and shapes of the tensors in `{stem}.safetensors`, or in the shards that its index names.

    Raises:
        `OSError`: if there are none, or a shard is missing, truncated or different from what the index says.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        raise OSError(f"{folder} has neither {single.name} nor {index.name}; save or download its safetensors.")
    weight_map = read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise OSError(f"{folder} has no {name}, which {index.name} names; save or download it again.")
        shard = read_safetensors(folder / name)
        listed = {key for key, value in weight_map.items() if value == name}
        if listed != set(shard):
            raise OSError(f"{index} and {folder / name} disagree about {format_names(listed ^ set(shard))}.")
        tensors |= shard
    return tensors


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Map the tensors of a flat state dict saved by torch, without running code from the file.

    Raises:
        `OSError`: if the file is missing or truncated.
        `ValueError`: if it holds anything but tensors by name.
    """
    if not path.is_file():
        raise OSError(f"there is no file {path}.")
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and is refused, because it might run code; save a flat dict of tensors "
            f"instead ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(f"{path} is truncated, or older than torch's zip format ({error}); save it again.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a flat dict of tensors, got a {type(loaded).__name__}.")
    dtypes = set(str_to_torch_dtype.values())
    others = [
        key
        for key, value in loaded.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.dtype in dtypes)
    ]
    if others:
        raise ValueError(f"{path} must hold tensors by their names and nothing else, got {format_names(others)}.")
    num_users = Counter(value.untyped_storage().data_ptr() for value in loaded.values())

    def stored(value: torch.Tensor) -> StoredTensor:
        # safetensors refuses to write two tensors that share memory.
        is_shared = num_users[value.untyped_storage().data_ptr()] > 1
        return StoredTensor(value.dtype, tuple(value.shape), value.clone if is_shared else lambda: value)

    return {key: stored(value) for key, value in loaded.items()}


def write_safetensors(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write one file, read it back, compare every tensor with its source, and store its hash.

    Raises:
        `OSError`: if the file cannot be written, or does not read back as its sources.
    """
    try:
        weights = {name: tensor.read().contiguous() for name, tensor in tensors.items()}
        save_file(weights, path, {**metadata, HASH_KEY: EMPTY_HASH})
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {error}") from error
    written = read_safetensors(path)
    wrong = set(written) ^ set(tensors)
    wrong |= {name for name in written.keys() & tensors.keys() if not written[name].equals(tensors[name])}
    if wrong:
        raise OSError(f"{path.name} does not read back as it was written: {format_names(wrong)}; check the disk.")
    store_hash(path)


def module_tensors(stored: dict[str, StoredTensor], model: PreTrainedModel, where: Any) -> dict[str, StoredTensor]:
    """Stored tensors under the names and in the shapes that they have in `model`, which is on the meta device.

    transformers' own conversion mapping is applied, as `from_pretrained` does. It renames: Qwen2-VL is published with
    `model.layers.0...` and `visual...` for what the module calls `model.language_model.layers.0...` and
    `model.visual...`. And it reshapes the tower's tensors of older checkpoints.

    Raises:
        `ValueError`: see `check_tensors`; or if tied tensors differ, or the mapping merges or splits a tensor.
    """
    transforms = get_model_conversion_mapping(model)
    converters = {
        pattern: transform
        for transform in transforms
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    known = model.state_dict()
    named: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name, pattern = rename_source_key(key, renamings, [*converters.values()], model.base_model_prefix, known)
        if pattern is not None:
            # A tower's tensor is converted alone; a backbone's may be merged with others, or split.
            if not name.startswith("tower."):
                raise ValueError(
                    f"{where}: {key} of {model.config.model_type!r} is merged, split or transposed when it is loaded "
                    f"({converters[pattern]}), which cannot be streamed; use "
                    "LatteFlowForConditionalGeneration.from_vlm(model) and save_pretrained instead."
                )
            tensor = _convert(tensor, key, name, converters[pattern], model)
        if name in named:
            raise ValueError(f"{where}: {name} is stored twice, under its present name and an earlier one.")
        named[name] = tensor
    return check_tensors(_without_tied_copies(named, model, where), model, where)


def _convert(
    tensor: StoredTensor, key: str, name: str, converter: WeightConverter, model: PreTrainedModel
) -> StoredTensor:
    """Apply a converter of one tensor to one tensor when it is read."""

    def convert(value: torch.Tensor) -> torch.Tensor:
        # A copy, since a converter collects tensors in itself.
        conversion = copy.deepcopy(converter)
        conversion.add_tensor(name, key, converter.source_patterns[0], value)
        (converted,) = conversion.convert(name, model=model, config=model.config).values()
        return converted[0] if isinstance(converted, list) else converted

    on_meta = convert(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    return StoredTensor(on_meta.dtype, tuple(on_meta.shape), lambda: convert(tensor.read()), tensor.file)


def _without_tied_copies(
    tensors: dict[str, StoredTensor], model: PreTrainedModel, where: Any
) -> dict[str, StoredTensor]:
    """`tensors` without the copies of tied tensors (the language head, if it is the token embedding).

    Raises:
        `ValueError`: if such a copy differs from the tensor that it is tied to.
    """
    tensors = dict(tensors)
    for copied, kept in model.all_tied_weights_keys.items():
        if copied in tensors:
            tensor = tensors.pop(copied)
            if not tensors.setdefault(kept, tensor).equals(tensor):
                raise ValueError(
                    f"{where}: {copied} and {kept} differ, but the configuration ties them; set "
                    "tie_word_embeddings=false in config.json if they are meant to differ."
                )
    return tensors


def stored_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint of `model`: all but the copies of tied tensors."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_tensors(tensors: dict[str, StoredTensor], model: nn.Module, where: Any) -> dict[str, StoredTensor]:
    """Check that `tensors` are exactly those of `model` by name and shape, and return them in its order.

    Raises:
        `ValueError`: naming those that are missing, unexpected or of another shape.
    """
    shapes = stored_names(model)
    missing, unexpected = set(shapes) - set(tensors), set(tensors) - set(shapes)
    mismatched = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(names)} {words}: {format_names(names)}"
        for words, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the configuration; " + "; ".join(problems) + ".")
    return {name: tensors[name] for name in shapes}


def format_names(names: Iterable[Any], limit: int = 8) -> str:
    """The first few names, for an error message."""
    listed = sorted(str(name) for name in names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
