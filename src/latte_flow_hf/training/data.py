# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Captioned images from Hugging Face `datasets`: folders, parquet, WebDataset shards, streams.

An image that cannot be read or has no caption is replaced by the next usable one and does not shift the others: an
example depends on its index and the epoch alone, and a resumed run has the same examples.
"""

import logging
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset

from ..modeling.images import load_rgb_image
from ..modeling.processing_latte_flow import check_text
from ..tinyworld.datasets import Conversations, TinyWorldImages
from .recipe import DataSettings


logger = logging.getLogger(__name__)


class UnreadableImageError(Exception):
    """An image that cannot be decoded, or has no caption; the message is the reason."""


@dataclass
class UnreadableImages:
    """The names of images that cannot be used, with the reasons, each of which is logged once.

    Args:
        max_unreadable (`int`): the largest number of them.

    Raises:
        `ValueError`: from `add`, if there are more than `max_unreadable`.
    """

    max_unreadable: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str, kind: str = "image") -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        logger.warning(f"{kind} {name} {reason}; it is skipped")
        if len(self.reasons) > self.max_unreadable:
            raise ValueError(
                f"{len(self.reasons)} images cannot be read, max_unreadable is {self.max_unreadable}: "
                f"{', '.join(self.reasons)}; repair or remove them, or increase max_unreadable."
            )


@dataclass
class ImageRows:
    """The rows of a dataset, with access to their images, prompts and names.

    Args:
        dataset: a dataset or a stream of `datasets`, or any sequence of `{"image", "prompt"}`.
        settings ([`DataSettings`]): the settings, `size` included.
        fingerprint (`str`): differs between datasets with different rows.
    """

    dataset: Any
    settings: DataSettings
    fingerprint: str

    @property
    def is_stream(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    def name(self, row: dict, index: int) -> str:
        """The path or key of the image, or else its index."""
        image = row.get(self.settings.image)
        path = image.get("path") if isinstance(image, dict) else None
        return str(path or row.get("__key__") or f"number {index}")

    def prompts(self, row: dict) -> list[str]:
        """The prompts for the image, one for each of its captions.

        Raises:
            `UnreadableImageError`: if the row has no caption or label.
        """
        settings = self.settings
        if settings.label is not None:
            label, names = row[settings.label], self.dataset.features[settings.label].names
            if label is None or not 0 <= label < len(names):
                raise UnreadableImageError(f"has no label: {settings.label} is {label}")
            return [settings.prompt.format(names[label])]
        caption: Any = row
        for key in (settings.caption or "prompt").split("."):
            caption = caption.get(key) if isinstance(caption, dict) else None
        captions = [_caption_text(item) for item in (caption if isinstance(caption, list) else [caption])]
        prompts = [settings.prompt.format(text) for text in captions if text]
        if not prompts:
            raise UnreadableImageError(f"has no caption: {settings.caption} is {caption!r}")
        try:
            for prompt in prompts:
                check_text(prompt)
        except ValueError as error:
            raise UnreadableImageError(f"has a caption that cannot be encoded: {error}") from error
        return prompts

    def image(self, row: dict) -> Image.Image:
        """The image in RGB, resized and cropped at the centre to `size` x `size`.

        Raises:
            `UnreadableImageError`: if it cannot be decoded.
        """
        image, size = row.get(self.settings.image), self.settings.size
        assert size is not None
        try:
            if isinstance(image, dict):
                image = image["bytes"] if image.get("bytes") is not None else image["path"]
            image = load_rgb_image(image, self.settings.background)
        except ValueError as error:
            # The cause alone: the name of the image is in the log already.
            raise UnreadableImageError(f"cannot be read: {error.__cause__ or error}") from error
        if image.size == (size, size):
            return image
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)

    def example(self, row: dict, index: int, seed: int) -> dict:
        """The row as an example for [`TextToImageCollator`].

        Raises:
            `UnreadableImageError`: if the image cannot be decoded, or has no caption.
        """
        prompts, image = self.prompts(row), self.image(row)
        if self.settings.flip and is_flipped(seed):
            image = ImageOps.mirror(image)
        return {"image": image, "prompt": draw_prompt(prompts, seed), "name": self.name(row, index), "seed": seed}


def _caption_text(caption: Any) -> str:
    """A caption as text, empty if there is none: a number or boolean is one, too."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return ""
    return str(caption).strip() if isinstance(caption, str | bool | int | float) else ""


def load_image_rows(settings: DataSettings, seed: int) -> ImageRows:
    """Load the dataset that `source` describes.

    Args:
        settings ([`DataSettings`]): the settings, `size` included.
        seed (`int`): of the tiny world.

    Raises:
        `ValueError`: if a column is missing, not exactly one of captions and labels is given, or there are no images.
        `OSError`: if there are no files.
    """
    source = {"split": "train", **settings.source}
    if source.get("path") == "tinyworld":
        dataset: Any = TinyWorldImages(seed, **_tinyworld_arguments(settings.source))
        return ImageRows(dataset, settings, f"tinyworld {seed} {sorted(settings.source.items())}")
    if (settings.caption is None) == (settings.label is None):
        raise ValueError("data: give either `caption` or `label`, the column that describes the images.")
    import datasets

    dataset = _load_dataset(source)
    if dataset.column_names is None:
        # A stream only knows its columns after reading the first examples.
        dataset = dataset._resolve_features()
    if settings.caption is not None:
        if source["path"] in ("csv", "imagefolder"):
            feature = (dataset.features or {}).get(settings.caption)
            if isinstance(feature, datasets.Value) and feature.dtype not in ("string", "large_string"):
                # pandas reads a column of numbers as numbers, `007` as 7, unless it is told that they are text.
                features = {**dataset.features, settings.caption: datasets.Value("string")}
                dataset = _load_dataset({**source, "features": datasets.Features(features)})
        if source["path"] == "imagefolder" and settings.caption not in (dataset.column_names or ()):
            dataset = _add_captions(dataset, settings)
    columns = dataset.column_names or []
    for name, column in (("image", settings.image), ("caption", settings.caption), ("label", settings.label)):
        if column is not None and column.split(".")[0] not in columns:
            raise ValueError(f"data: {name} must be one of the columns {sorted(columns)}, got {column!r}.")
    if settings.label is not None and not isinstance(dataset.features[settings.label], datasets.ClassLabel):
        raise ValueError(
            f"data: label must be a column of class labels with names, but {settings.label!r} is "
            f"{dataset.features[settings.label]}; if it contains text, use `caption` instead."
        )
    # Decoded later: `datasets` would raise at a broken image without its name.
    dataset = dataset.cast_column(settings.image, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        return ImageRows(dataset, settings, f"stream {sorted(source.items())}")
    if len(dataset) == 0:
        raise ValueError(f"data: {source} contains no images.")
    return ImageRows(dataset, settings, dataset._fingerprint)


def load_class_names(settings: DataSettings) -> list[str]:
    """The names of the classes that a recipe with `label` trains on, in the order of the labels. Only what describes
    the dataset is read, not its images.

    Args:
        settings ([`DataSettings`]): the section `data` of the recipe.

    Raises:
        `ValueError`: if there is no `label`, or its column has no names.
    """
    import datasets

    if settings.label is None:
        raise ValueError("data: the recipe has no `label`; give the names of its classes in a file.")
    dataset = _load_dataset({"split": "train", **settings.source, "streaming": True})
    feature = (dataset.features or {}).get(settings.label)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"data: label must be a column of class labels with names, but {settings.label!r} is {feature}."
        )
    return list(feature.names)


def _load_dataset(source: dict, section: str = "data") -> Any:
    """`datasets.load_dataset`, which raises errors of many types, in one line that shows the arguments."""
    import datasets

    try:
        return datasets.load_dataset(**source)
    except Exception as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        lines = str(reason or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{section}: {source} cannot be loaded: {lines[0]}") from error


def _add_captions(dataset: Any, settings: DataSettings) -> Any:
    """A folder of images with the captions from the files beside the images that have the extension `caption`.

    Raises:
        `ValueError`: if a file is not UTF-8.
    """
    import datasets

    def read(image: dict) -> str | None:
        path = Path(image["path"]).with_suffix(f".{settings.caption}") if image["path"] else None
        try:
            return path.read_text(encoding="utf-8-sig") if path is not None and path.is_file() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"data: caption {path} is not a text file in UTF-8: {error}") from error

    dataset = dataset.cast_column(settings.image, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        features = datasets.Features({**dataset.features, settings.caption: datasets.Value("string")})
        return dataset.map(lambda row: {settings.caption: read(row[settings.image])}, features=features)
    captions = [read(image) for image in dataset[settings.image]]
    # Not `map`, which would take the captions of the last run from its cache.
    return dataset.add_column(settings.caption, captions) if any(captions) else dataset


def _tinyworld_arguments(source: dict) -> dict:
    return {name: value for name, value in source.items() if name != "path"}


def example_seed(seed: int, epoch: int, index: int) -> int:
    """The seed for all random draws for an example."""
    return zlib.crc32(f"{seed} {epoch} {index}".encode())


def is_flipped(seed: int) -> bool:
    """Whether the image of an example with this seed is flipped."""
    return bool(seed & 1)


def draw_prompt(prompts: list[str], seed: int) -> str:
    """The prompt of an example with this seed, of those for its image."""
    # Not the bit that decides about the flip.
    return prompts[(seed >> 1) % len(prompts)]


class CaptionedImageDataset(Dataset):
    """A map-style dataset of `{"image", "prompt", "name", "seed"}`, for [`TextToImageCollator`].

    Args:
        rows ([`ImageRows`]): the rows.
        seed (`int`): of the random draws.
        unreadable ([`UnreadableImages`]): collects the unreadable images.
    """

    def __init__(self, rows: ImageRows, seed: int, unreadable: UnreadableImages):
        self.rows, self.seed, self.unreadable, self.epoch = rows, seed, unreadable, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows.dataset)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            # Iteration over a class with `__getitem__` ends by this error.
            raise IndexError(index)
        for offset in range(len(self)):
            row_index = (index + offset) % len(self)
            row = self.rows.dataset[row_index]
            try:
                return self.rows.example(row, row_index, example_seed(self.seed, self.epoch, index))
            except UnreadableImageError as error:
                self.unreadable.add(self.rows.name(row, row_index), str(error))
        raise ValueError(
            f"none of {len(self)} images can be used: the first one {next(iter(self.unreadable.reasons.values()))}."
        )


class CaptionedImageStream(IterableDataset):
    """An endless stream of the examples of [`CaptionedImageDataset`], shuffled by a buffer.

    Args:
        rows, seed, unreadable: see [`CaptionedImageDataset`].
        start (`int`, defaults to 0): the number of examples to skip, without decoding their images.
    """

    def __init__(self, rows: ImageRows, seed: int, unreadable: UnreadableImages, start: int = 0):
        self.rows, self.seed, self.unreadable, self.start = rows, seed, unreadable, start

    def __iter__(self) -> Iterator[dict]:
        stream = self.rows.dataset.shuffle(seed=self.seed, buffer_size=self.rows.settings.shuffle_buffer)
        # Seeds of unreadable images are used up with the next readable one, which takes their place.
        index, pending_seeds = 0, []
        for epoch in count():
            stream.set_epoch(epoch)
            has_readable = False
            for row in stream:
                index += 1
                if index <= self.start:
                    has_readable = True
                    continue
                pending_seeds.append(example_seed(self.seed, epoch, index))
                try:
                    examples = [self.rows.example(row, index, seed) for seed in pending_seeds]
                except UnreadableImageError as error:
                    self.unreadable.add(self.rows.name(row, index), str(error))
                    continue
                has_readable = True
                yield from examples
                pending_seeds = []
            if not has_readable:
                raise ValueError(f"data: the stream {self.rows.settings.source} contains no image that can be used.")


def load_conversations(
    source: dict, seed: int, conversation: Callable, unreadable: UnreadableImages | None = None
) -> Any:
    """Load conversations as examples `{"messages"}` for [`ConversationCollator`].

    Args:
        source (`dict`): see [`UnderstandingSettings`].
        seed (`int`): of the tiny world.
        conversation (`Callable`): the method of the processor, which checks messages and loads their images.
        unreadable ([`UnreadableImages`], *optional*): collects the conversations that cannot be used.

    Raises:
        `ValueError`: if there are no messages.
    """
    if source.get("path") == "tinyworld":
        return Conversations(seed, **_tinyworld_arguments(source))
    dataset = _load_dataset({"split": "train", **source}, "understanding")
    if "messages" not in (dataset.column_names or []) or not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(f"understanding: {source} must have a column `messages`, not be empty, and not be a stream.")
    return ConversationDataset(dataset, conversation, unreadable or UnreadableImages(0))


class ConversationDataset(Dataset):
    """Conversations with checked messages and loaded images. One that cannot be used is replaced by the next one.

    Args:
        dataset: a sequence of `{"messages"}`.
        conversation (`Callable`): see `load_conversations`.
        unreadable ([`UnreadableImages`]): collects the conversations that cannot be used.
    """

    def __init__(self, dataset: Any, conversation: Callable, unreadable: UnreadableImages):
        self.dataset, self.conversation, self.unreadable = dataset, conversation, unreadable

    @property
    def fingerprint(self) -> str:
        """Differs between datasets with different rows."""
        return self.dataset._fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            try:
                return {"messages": self.conversation(self.dataset[row]["messages"])}
            except ValueError as error:
                self.unreadable.add(f"number {row} of `understanding`", f"cannot be used: {error}", "conversation")
        raise ValueError(f"none of {len(self)} conversations can be used.")
