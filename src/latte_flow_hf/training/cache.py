# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Latents and contexts, computed once and kept on disk.

A cache is a folder of safetensors shards. A shard appears whole or not at all, so that an interrupted run goes on
where it stopped; `index.json` is written last. `made_by.json` is written first and tells what the numbers depend on: a
cache that another autoencoder, backbone, processor, size or source made is refused. Several processes share out the
shards that are not there yet.
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

from ..modeling.context import LatteFlowContext
from .collator import ImagePromptEncoder
from .data import ImageRows, UnreadableImageError, UnreadableImages, example_seed


# Pictures, or prompts, in a shard.
SHARD_SIZE = 256


def hash_module(module: torch.nn.Module) -> str:
    """SHA-256 over a module's configuration, and the names and bytes of its parameters and buffers."""
    config = getattr(module, "config", {})
    known = _numbers_of(config.to_dict() if hasattr(config, "to_dict") else dict(config))
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _numbers_of(config: dict) -> dict:
    """A configuration without what changes no number: where it was loaded from, and by which version."""
    return {
        str(key): _numbers_of(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key != "transformers_version"
    }


def made_by(pipe: Any, rows: ImageRows, with_contexts: bool) -> dict[str, str]:
    """What the numbers of a cache depend on, by part."""
    settings = rows.settings
    parts = {
        "autoencoder": hash_module(pipe.vae),
        "size": str(settings.size),
        "flip": str(settings.flip),
        "source": hashlib.sha256(rows.fingerprint.encode()).hexdigest(),
        "columns": json.dumps([settings.image, settings.caption, settings.label, settings.prompt]),
        "encode_batch_size": str(settings.encode_batch_size),
        "contexts": str(with_contexts),
    }
    if with_contexts:
        tokenizer = pipe.processor.tokenizer
        words = json.dumps([tokenizer.get_vocab(), pipe.processor.chat_template], sort_keys=True)
        parts["backbone"] = hash_module(pipe.model.vlm)
        parts["processor"] = hashlib.sha256(words.encode()).hexdigest()
    return parts


def build_cache(
    folder: Path,
    pipe: Any,
    rows: ImageRows,
    encoder: ImagePromptEncoder,
    unreadable: UnreadableImages,
    with_contexts: bool = True,
) -> None:
    """Fill the cache in `folder`; what is there already is kept. All processes must call it.

    Raises:
        `ValueError`: if it was made by something else, the source is a stream, no picture can be read, or the
            processes do not see the same folder.
    """
    if rows.is_stream:
        raise ValueError("data: a stream cannot be cached; load it without `streaming`, or leave out `cache`.")
    parts = made_by(pipe, rows, with_contexts)
    state = PartialState()
    with state.main_process_first():
        _claim(folder, parts)
    if (folder / "index.json").exists():
        return

    size = len(rows.rows)
    shards = {folder / f"latents-{start:09d}.safetensors": start for start in range(0, size, SHARD_SIZE)}
    for path in _share(list(shards), "encoding pictures"):
        _encode_pictures(path, range(shards[path], min(shards[path] + SHARD_SIZE, size)), rows, encoder)
        _count_unreadable(_metadata(path), unreadable)
    state.wait_for_everyone()

    lost = [path.name for path in shards if not path.exists()]
    if lost:
        raise ValueError(f"cache {folder} lacks {lost[0]}: it must be on a disk that all processes share.")
    prompts, places, skipped = {""}, 0, {}
    for path in shards:
        metadata = _metadata(path)
        _count_unreadable(metadata, unreadable)
        skipped.update(metadata["unreadable"])
        prompts.update(metadata["prompts"])
        places += len(metadata["places"])
    if not places:
        raise ValueError(f"none of {size} pictures can be read.")
    if with_contexts:
        ordered = sorted(prompts)
        starts = range(0, len(ordered), SHARD_SIZE)
        shards = {folder / f"contexts-{start:09d}.safetensors": start for start in starts}
        for path in _share(list(shards), "encoding prompts"):
            _encode_prompts(path, ordered[shards[path] : shards[path] + SHARD_SIZE], encoder)
        state.wait_for_everyone()
    if state.is_main_process:
        _write_json({"places": size, "unreadable": skipped}, folder / "index.json")
    state.wait_for_everyone()


def _claim(folder: Path, parts: dict[str, str]) -> None:
    """Make the folder's `made_by.json`, or check the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "made_by.json").exists():
        found = json.loads((folder / "made_by.json").read_text())
        other = sorted(part for part in parts.keys() | found.keys() if parts.get(part) != found.get(part))
        if other:
            raise ValueError(
                f"cache {folder} was made by another {', '.join(other)}; remove it, or give another folder."
            )
    elif any(folder.iterdir()):
        raise ValueError(f"cache folder {folder} holds something else; give another folder.")
    else:
        _write_json(parts, folder / "made_by.json")


def _share(paths: list[Path], words: str) -> Iterator[Path]:
    """Of the shards that are not there, those that this process is to make."""
    state = PartialState()
    missing = [path for path in paths if not path.exists()]
    # Before any process writes, all of them have looked: their lists are the same.
    state.wait_for_everyone()
    with state.split_between_processes(missing) as share:
        hidden = len(paths) < 4 or not state.is_local_main_process
        yield from tqdm(share, desc=words, mininterval=5, disable=hidden)


def _count_unreadable(metadata: dict, unreadable: UnreadableImages) -> None:
    for name, reason in metadata["unreadable"].items():
        unreadable.add(name, reason)


def _encode_pictures(path: Path, places: range, rows: ImageRows, encoder: ImagePromptEncoder) -> None:
    kept, names, prompts, images, broken = [], [], [], [], {}
    for place in places:
        row = rows.rows[place]
        try:
            images.append(rows.picture(row))
        except UnreadableImageError as error:
            broken[rows.name(row, place)] = str(error)
            continue
        kept.append(place)
        names.append(rows.name(row, place))
        prompts.append(rows.prompt(row, place))
    tensors = {}
    if images:
        tensors["latents"] = encoder.latents(images)
        if rows.settings.flip:
            tensors["mirrored"] = encoder.latents([ImageOps.mirror(image) for image in images])
    metadata = {"places": kept, "names": names, "prompts": prompts, "unreadable": broken}
    _write_shard(tensors, metadata, path)


def _encode_prompts(path: Path, prompts: list[str], encoder: ImagePromptEncoder) -> None:
    tensors = {}
    for number, context in enumerate(encoder.each_context(prompts)):
        tensors[f"{number}.keys"] = torch.stack(context.keys).cpu()
        tensors[f"{number}.values"] = torch.stack(context.values).cpu()
        tensors[f"{number}.next_position"] = context.next_position.cpu()
    _write_shard(tensors, {"prompts": prompts}, path)


def _write_shard(tensors: dict[str, torch.Tensor], metadata: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"json": json.dumps(metadata)})
    partial.replace(path)


def _write_json(content: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["json"])


class CachedImageDataset(Dataset):
    """A finished cache, as `{"latents", "prompt", "name", "seed"}`: encoded [`CaptionedImageDataset`] examples.

    Args:
        folder (`Path`): the cache.
        seed (`int`): as of [`CaptionedImageDataset`].
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.epoch = folder, seed, 0
        size = json.loads((folder / "index.json").read_text())["places"]
        self.rows: list[tuple[Path, int, str, str]] = []  # shard, its row, prompt, name; by place
        here: dict[int, tuple[Path, int, str, str]] = {}
        for path in sorted(folder.glob("latents-*.safetensors")):
            metadata = _metadata(path)
            for row, place in enumerate(metadata["places"]):
                here[place] = (path, row, metadata["prompts"][row], metadata["names"][row])
        # The next readable picture takes an unreadable one's place.
        following = here[min(here)]
        for place in reversed(range(size)):
            following = here.get(place, following)
            self.rows.append(following)
        self.rows.reverse()
        with safe_open(self.rows[0][0], framework="pt") as shard:
            self.flip = "mirrored" in shard.keys()  # noqa: SIM118
        self._open: dict[Path, Any] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, place: int) -> dict:
        path, row, prompt, name = self.rows[place]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        seed = example_seed(self.seed, self.epoch, place)
        latents = self._open[path].get_slice("mirrored" if self.flip and seed & 1 else "latents")[row]
        return {"latents": latents, "prompt": prompt, "name": name, "seed": seed}


class CachedContexts:
    """Prompts -> contexts from a finished cache, for [`TextToImageCollator`].

    Args:
        folder (`Path`): the cache.
    """

    def __init__(self, folder: Path):
        self.rows: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("contexts-*.safetensors")):
            self.rows.update({prompt: (path, row) for row, prompt in enumerate(_metadata(path)["prompts"])})
        self._open: dict[Path, Any] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __call__(self, prompts: list[str]) -> LatteFlowContext:
        return LatteFlowContext.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> LatteFlowContext:
        path, row = self.rows[prompt]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        keys, values = (self._open[path].get_tensor(f"{row}.{name}") for name in ("keys", "values"))
        mask = torch.ones(1, keys.shape[-2], dtype=torch.bool)
        next_position = self._open[path].get_tensor(f"{row}.next_position")
        return LatteFlowContext(tuple(keys), tuple(values), mask, next_position, has_padding=False)
