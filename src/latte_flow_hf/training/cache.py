# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Latents and contexts, computed once and stored on disk.

A cache is a folder of safetensors shards. Each shard is written atomically and contains its hash: missing shards are
computed, also those of a finished cache, and damaged ones are refused. `index.json` is written last.
`fingerprint.json` is written first and contains what the cached numbers depend on: a cache made with a different
autoencoder, backbone, processor, size or source is refused. Several processes share the work.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import EMPTY_HASH, HASH_KEY, atomic_write, check_hash, read_json, store_hash, write_json
from ..modeling.context import LatteFlowContext
from ..pipelines.fingerprint import hash_module, hash_processor
from .collator import ImagePromptEncoder
from .data import ImageRows, UnreadableImageError, UnreadableImages, draw_prompt, example_seed, is_flipped


# Version of the layout of shards and index.
CACHE_FORMAT = 3

# Number of images, or of prompts, in a shard.
SHARD_SIZE = 256


def cache_fingerprint(pipe: Any, rows: ImageRows, with_contexts: bool) -> dict[str, str]:
    """What the cached numbers depend on, by name."""
    settings = rows.settings
    fingerprint = {
        "format": str(CACHE_FORMAT),
        "autoencoder": hash_module(pipe.vae),
        "size": str(settings.size),
        "background": settings.background,
        "flip": str(settings.flip),
        "source": hashlib.sha256(rows.fingerprint.encode()).hexdigest(),
        "columns": json.dumps([settings.image, settings.caption, settings.label, settings.prompt]),
        "encode_batch_size": str(settings.encode_batch_size),
        "contexts": str(with_contexts),
    }
    if with_contexts:
        fingerprint["backbone"] = hash_module(pipe.model.vlm)
        fingerprint["processor"] = hash_processor(pipe.processor)
    return fingerprint


def build_cache(
    folder: Path,
    pipe: Any,
    rows: ImageRows,
    encoder: ImagePromptEncoder,
    unreadable: UnreadableImages,
    with_contexts: bool = True,
) -> None:
    """Fill the cache in `folder`, keeping finished shards, which are checked. All processes must call it.

    Args:
        folder (`Path`): the folder, on a disk that all processes share.
        pipe ([`LatteFlowPipeline`]): the pipeline, for the fingerprint.
        rows ([`ImageRows`]): images and prompts.
        encoder ([`ImagePromptEncoder`]): encodes them.
        unreadable ([`UnreadableImages`]): collects the images that cannot be used.
        with_contexts (`bool`, defaults to `True`): whether to cache contexts, too.

    Raises:
        `ValueError`: if the cache has another fingerprint, the source is a stream, no image can be used, or the
            processes do not share the folder.
        `OSError`: with the file, if a shard is damaged or cannot be written.
    """
    if rows.is_stream:
        raise ValueError("data: a stream cannot be cached; load it without `streaming`, or leave out `cache`.")
    fingerprint = cache_fingerprint(pipe, rows, with_contexts)
    state = PartialState()
    with state.main_process_first():
        create_or_check(folder, fingerprint)
    num_images = len(rows.dataset)
    shards = {folder / f"latents-{start:09d}.safetensors": start for start in range(0, num_images, SHARD_SIZE)}
    for path in missing_shards(list(shards), "encoding images"):
        _encode_images(path, range(shards[path], min(shards[path] + SHARD_SIZE, num_images)), rows, encoder)
        _add_unreadable(read_metadata(path), unreadable)
    wait_for_shards(list(shards))
    prompts, num_readable = {""}, 0
    for path in shards:
        metadata = read_metadata(path)
        _add_unreadable(metadata, unreadable)
        prompts.update(*metadata["prompts"])
        num_readable += len(metadata["indices"])
    if not num_readable:
        reason = next(iter(unreadable.reasons.values()))
        raise ValueError(f"none of {num_images} images can be used: the first one {reason}.")
    if with_contexts:
        build_contexts(folder, sorted(prompts), encoder)
    if state.is_main_process and not (folder / "index.json").exists():
        write_json({"num_images": num_images}, folder / "index.json")
    state.wait_for_everyone()


def build_contexts(folder: Path, prompts: list[str], encoder: ImagePromptEncoder) -> None:
    """Store the contexts of prompts, for [`CachedContexts`]. All processes must call it."""
    starts = range(0, len(prompts), SHARD_SIZE)
    shards = {folder / f"contexts-{start:09d}.safetensors": start for start in starts}
    for path in missing_shards(list(shards), "encoding prompts"):
        _encode_prompts(path, prompts[shards[path] : shards[path] + SHARD_SIZE], encoder)
    wait_for_shards(list(shards))


def wait_for_shards(paths: list[Path]) -> None:
    """Wait until all processes have written their shards.

    Raises:
        `ValueError`: if one is not there, because the processes do not share the folder.
    """
    PartialState().wait_for_everyone()
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"cache {path.parent} has no {path.name}: the folder must be on a disk that all processes share."
            )


def create_or_check(folder: Path, fingerprint: dict[str, str]) -> None:
    """Create the cache with its `fingerprint.json`, or check that of an existing one."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "fingerprint.json").exists():
        existing = read_json(folder / "fingerprint.json")
        names = sorted(fingerprint.keys() | existing.keys())
        different = [name for name in names if fingerprint.get(name) != existing.get(name)]
        if different:
            raise ValueError(
                f"cache {folder} was made with a different {', '.join(different)}; remove it, or use another folder."
            )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"cache folder {folder} is not empty and not a cache of this version; use another folder.")
    else:
        write_json(fingerprint, folder / "fingerprint.json")


def missing_shards(paths: list[Path], description: str) -> Iterator[Path]:
    """This process's share of the shards that do not exist; the others are checked.

    Raises:
        `OSError`: if a shard is damaged.
    """
    state = PartialState()
    missing = [path for path in paths if not path.exists()]
    # No process may write before all have looked, so that they all have the same list.
    state.wait_for_everyone()
    with state.split_between_processes([path for path in paths if path not in missing]) as share:
        for path in share:
            try:
                is_whole = check_hash(path)
            except OSError as error:
                raise OSError(f"cache shard {path} is damaged; remove it, and it is computed again.") from error
            if not is_whole:
                raise OSError(f"cache shard {path} has no hash; remove it, and it is computed again.")
    with state.split_between_processes(missing) as share:
        hidden = len(paths) < 4 or not state.is_local_main_process
        yield from tqdm(share, desc=description, mininterval=5, disable=hidden)


def _add_unreadable(metadata: dict, unreadable: UnreadableImages) -> None:
    for name, reason in metadata["unreadable"].items():
        unreadable.add(name, reason)


def _encode_images(path: Path, indices: range, rows: ImageRows, encoder: ImagePromptEncoder) -> None:
    images: list[Any] = []
    metadata: dict[str, Any] = {"indices": [], "names": [], "prompts": [], "unreadable": {}}
    for index in indices:
        row = rows.dataset[index]
        try:
            prompts, image = rows.prompts(row), rows.image(row)
        except UnreadableImageError as error:
            metadata["unreadable"][rows.name(row, index)] = str(error)
            continue
        images.append(image)
        metadata["indices"].append(index)
        metadata["names"].append(rows.name(row, index))
        metadata["prompts"].append(prompts)
    tensors = {}
    if images:
        tensors["latents"] = encoder.latents(images)
        if rows.settings.flip:
            tensors["flipped_latents"] = encoder.latents([ImageOps.mirror(image) for image in images])
    write_shard(tensors, metadata, path)


def _encode_prompts(path: Path, prompts: list[str], encoder: ImagePromptEncoder) -> None:
    tensors = {}
    for index, context in enumerate(encoder.separate_contexts(prompts)):
        tensors[f"{index}.keys"] = torch.stack(context.keys).cpu()
        tensors[f"{index}.values"] = torch.stack(context.values).cpu()
        tensors[f"{index}.next_position"] = context.next_position.cpu()
    write_shard(tensors, {"prompts": prompts}, path)


def write_shard(tensors: dict[str, torch.Tensor], metadata: dict, path: Path) -> None:
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata={"json": json.dumps(metadata), HASH_KEY: EMPTY_HASH})
        store_hash(partial)


def read_metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["json"])


class Shards:
    """Opens shards on first access; a copy in a worker of a data loader opens its own."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def __getitem__(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def __getstate__(self) -> dict:
        return {"_open": {}}


class CachedImageDataset(Dataset):
    """The examples of [`CaptionedImageDataset`] from a finished cache, as `{"latents", "prompt", "name", "seed"}`.

    Args:
        folder (`Path`): the cache.
        seed (`int`): of the random draws.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.epoch = folder, seed, 0
        self._shards = Shards()
        num_images = read_json(folder / "index.json")["num_images"]
        # Shard, row of the shard, prompts and name, by index.
        readable: dict[int, tuple[Path, int, list[str], str]] = {}
        for path in sorted(folder.glob("latents-*.safetensors")):
            metadata = read_metadata(path)
            for row, index in enumerate(metadata["indices"]):
                readable[index] = (path, row, metadata["prompts"][row], metadata["names"][row])
        # As in `CaptionedImageDataset`, an unreadable image is replaced by the next readable one.
        self.rows: list[tuple[Path, int, list[str], str]] = []
        next_readable = readable[min(readable)]
        for index in reversed(range(num_images)):
            next_readable = readable.get(index, next_readable)
            self.rows.append(next_readable)
        self.rows.reverse()
        self.flip = "flipped_latents" in set(self._shards[self.rows[0][0]].keys())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            # Iteration over a class with `__getitem__` ends by this error.
            raise IndexError(index)
        path, row, prompts, name = self.rows[index]
        seed = example_seed(self.seed, self.epoch, index)
        tensor = "flipped_latents" if self.flip and is_flipped(seed) else "latents"
        latents = self._shards[path].get_slice(tensor)[row]
        return {"latents": latents, "prompt": draw_prompt(prompts, seed), "name": name, "seed": seed}


class CachedContexts:
    """Maps prompts to their contexts from a finished cache, for [`TextToImageCollator`].

    Args:
        folder (`Path`): the cache.
    """

    def __init__(self, folder: Path):
        self._shards = Shards()
        self._rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("contexts-*.safetensors")):
            self._rows.update({prompt: (path, row) for row, prompt in enumerate(read_metadata(path)["prompts"])})

    def __call__(self, prompts: list[str]) -> LatteFlowContext:
        return LatteFlowContext.cat([self._context(prompt) for prompt in prompts])

    def _context(self, prompt: str) -> LatteFlowContext:
        path, row = self._rows[prompt]
        keys, values, next_position = (
            self._shards[path].get_tensor(f"{row}.{name}") for name in ("keys", "values", "next_position")
        )
        mask = torch.ones(1, keys.shape[-2], dtype=torch.bool)
        return LatteFlowContext(tuple(keys), tuple(values), mask, next_position, has_padding=False)
