# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Captioned images from Hugging Face `datasets`: folders, parquet, WebDataset shards, streams.

An image that cannot be read is replaced by the next readable one and does not shift the others: an example depends on
its index and the epoch alone, and a resumed run has the same examples.
"""

import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset

from ..modeling.images import load_rgb_image
from ..modeling.processing_latte_flow import check_text
from ..tinyworld.datasets import Conversations, TinyWorldImages
from .recipe import DataSettings


logger = logging.getLogger(__name__)


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason."""


@dataclass
class UnreadableImages:
    """The names of unreadable images with the reasons, each of which is logged once.

    Args:
        max_unreadable (`int`): the largest number of them.

    Raises:
        `ValueError`: from `add`, if there are more than `max_unreadable`.
    """

    max_unreadable: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        logger.warning(f"image {name} cannot be read and is skipped: {reason}")
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

    def prompt(self, row: dict, index: int) -> str:
        """The prompt for the image.

        Raises:
            `ValueError`: if the row has no caption or label.
        """
        settings = self.settings
        if settings.label is not None:
            label, names = row[settings.label], self.dataset.features[settings.label].names
            if label is None or not 0 <= label < len(names):
                raise ValueError(f"image {self.name(row, index)} has no label: {settings.label} is {label}.")
            return settings.prompt.format(names[label])
        caption: Any = row
        for key in (settings.caption or "prompt").split("."):
            caption = caption.get(key) if isinstance(caption, dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"image {self.name(row, index)} has no caption: {settings.caption} is {caption!r}; "
                "add one, or remove the image."
            )
        try:
            check_text(caption)
        except ValueError as error:
            raise ValueError(f"image {self.name(row, index)}: {settings.caption} is no caption: {error}") from error
        return settings.prompt.format(caption.strip())

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
            raise UnreadableImageError(str(error.__cause__ or error)) from error
        if image.size == (size, size):
            return image
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)

    def example(self, row: dict, index: int, seed: int, image: Image.Image) -> dict:
        """The row as an example for [`TextToImageCollator`]."""
        if self.settings.flip and is_flipped(seed):
            image = ImageOps.mirror(image)
        return {"image": image, "prompt": self.prompt(row, index), "name": self.name(row, index), "seed": seed}


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

    try:
        dataset = datasets.load_dataset(**source)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"data: {source} cannot be loaded: {error.__cause__ or error}") from error
    columns = dataset.column_names
    if columns is None:
        # A stream only knows its columns after reading the first examples.
        dataset = dataset._resolve_features()
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


def _tinyworld_arguments(source: dict) -> dict:
    return {name: value for name, value in source.items() if name != "path"}


def example_seed(seed: int, epoch: int, index: int) -> int:
    """The seed for all random draws for an example."""
    return zlib.crc32(f"{seed} {epoch} {index}".encode())


def is_flipped(seed: int) -> bool:
    """Whether the image of an example with this seed is flipped."""
    return bool(seed & 1)


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
                image = self.rows.image(row)
            except UnreadableImageError as error:
                self.unreadable.add(self.rows.name(row, row_index), str(error))
                continue
            return self.rows.example(row, row_index, example_seed(self.seed, self.epoch, index), image)
        raise ValueError(f"none of {len(self)} images can be read.")


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
                    image = self.rows.image(row)
                except UnreadableImageError as error:
                    self.unreadable.add(self.rows.name(row, index), str(error))
                    continue
                has_readable = True
                for seed in pending_seeds:
                    yield self.rows.example(row, index, seed, image)
                pending_seeds = []
            if not has_readable:
                raise ValueError(f"data: the stream {self.rows.settings.source} contains no readable image.")


def load_conversations(source: dict, seed: int, conversation: Callable) -> Any:
    """Load conversations as examples `{"messages"}` for [`ConversationCollator`].

    Args:
        source (`dict`): see [`UnderstandingSettings`].
        seed (`int`): of the tiny world.
        conversation (`Callable`): the method of the processor, which checks messages and loads their images.

    Raises:
        `ValueError`: if there are no messages.
    """
    if source.get("path") == "tinyworld":
        return Conversations(seed, **_tinyworld_arguments(source))
    import datasets

    dataset = datasets.load_dataset(**{"split": "train", **source})
    if "messages" not in (dataset.column_names or []) or not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(f"understanding: {source} must have a column `messages`, not be empty, and not be a stream.")
    return ConversationDataset(dataset, conversation)


class ConversationDataset(Dataset):
    """Conversations with checked messages and loaded images.

    Args:
        dataset: a sequence of `{"messages"}`.
        conversation (`Callable`): see `load_conversations`.
    """

    def __init__(self, dataset: Any, conversation: Callable):
        self.dataset, self.conversation = dataset, conversation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {"messages": self.conversation(self.dataset[index]["messages"])}
