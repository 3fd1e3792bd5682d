# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Captioned pictures by Hugging Face's `datasets`: folders, parquet, WebDataset shards, streams.

What is unusual here: a picture that cannot be read never shifts the others. The next readable one takes its place, so
that an example is a function of its place and the epoch alone, and a resumed run meets the same ones.
"""

import io
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset


logger = logging.getLogger(__name__)


class UnreadableImageError(Exception):
    """A picture that cannot be decoded; its message is the reason."""


@dataclass(frozen=True)
class DataSettings:
    """The section `data` of a recipe.

    Args:
        source (`dict`): arguments of `datasets.load_dataset`, e.g. `{path: imagefolder, data_dir: pictures}`; the
            split is `train` unless given. `{path: tinyworld, num_pictures: 1000}` draws the tiny world.
        image (`str`, defaults to `"image"`): the pictures' column.
        caption (`str`, *optional*): the captions' column; a dot leads into a dict, as in `json.caption`.
        label (`str`, *optional*): in place of `caption`, a column of class labels, whose names become the prompts.
        prompt (`str`, defaults to `"{}"`): what the caption or the label's name is put into.
        size (`int`, *optional*): side in pixels, after resizing and a crop at the centre; the pipeline's own if left
            out.
        flip (`bool`, defaults to `False`): whether half of the pictures are mirrored, drawn anew each epoch.
        max_unreadable (`int`, defaults to 100): how many pictures may be unreadable before the run stops.
        shuffle_buffer (`int`, defaults to 1000): of a stream; anything else is shuffled whole.
        encode_batch_size (`int`, defaults to 1): see [`ImagePromptEncoder`].
        cache (`str`, *optional*): folder in which latents and contexts are kept; without it they are computed anew in
            each epoch.
        cache_contexts (`bool`, defaults to `True`): `False` keeps latents alone: contexts are large when nearly every
            picture has a caption of its own.
    """

    source: dict = field(default_factory=dict)
    image: str = "image"
    caption: str | None = None
    label: str | None = None
    prompt: str = "{}"
    size: int | None = None
    flip: bool = False
    max_unreadable: int = 100
    shuffle_buffer: int = 1000
    encode_batch_size: int = 1
    cache: str | None = None
    cache_contexts: bool = True


@dataclass
class UnreadableImages:
    """The pictures that could not be read, by name: counted, told, and at some number too many.

    Raises:
        `ValueError`: from `add`, when there are more than `most`.
    """

    most: int
    names: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        if name in self.names:
            return
        self.names[name] = reason
        logger.warning(f"picture {name} cannot be read and is skipped: {reason}")
        if len(self.names) > self.most:
            raise ValueError(
                f"{len(self.names)} pictures cannot be read, max_unreadable is {self.most}: {', '.join(self.names)}; "
                "repair or remove them, or raise max_unreadable."
            )


@dataclass
class ImageRows:
    """ImageRows of a dataset -> pictures, prompts and names.

    Args:
        rows: of `datasets`, map-style or a stream; or any sequence of `{"image", "prompt"}`.
        settings ([`DataSettings`]): with `size` set.
        fingerprint (`str`): differs when the rows do.
    """

    rows: Any
    settings: DataSettings
    fingerprint: str

    @property
    def is_stream(self) -> bool:
        return not hasattr(self.rows, "__len__")

    def name(self, row: dict, place: int) -> str:
        """The picture's path or key, else its place."""
        image = row.get(self.settings.image)
        path = image.get("path") if isinstance(image, dict) else None
        return str(path or row.get("__key__") or f"number {place}")

    def prompt(self, row: dict, place: int) -> str:
        """
        Raises:
            `ValueError`: if there is no caption.
        """
        settings = self.settings
        if settings.label is not None:
            number, names = row[settings.label], self.rows.features[settings.label].names
            if number is None or not 0 <= number < len(names):
                raise ValueError(f"picture {self.name(row, place)} has no label: {settings.label} is {number}.")
            return settings.prompt.format(names[number])
        caption: Any = row
        for key in (settings.caption or "prompt").split("."):
            caption = caption.get(key) if isinstance(caption, dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"picture {self.name(row, place)} has no caption: {settings.caption} is {caption!r}; "
                "give it one, or remove the picture."
            )
        return settings.prompt.format(caption.strip())

    def picture(self, row: dict) -> Image.Image:
        """Decoded, resized and cropped at the centre to `size` x `size`, RGB.

        Raises:
            `UnreadableImageError`: if it cannot be decoded to its end.
        """
        image, size = row.get(self.settings.image), self.settings.size
        assert size is not None
        try:
            if isinstance(image, dict):
                image = Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"])
            if not isinstance(image, Image.Image):
                raise UnreadableImageError(f"it is {type(image).__name__}, not a picture")
            image = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(str(error)) from error
        if image.size == (size, size):
            return image
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def open_rows(settings: DataSettings, seed: int) -> ImageRows:
    """Open the source.

    Raises:
        `ValueError`: if a column is missing, captions and labels are both or neither given, or there are no pictures.
        `OSError`: if there are no files.
    """
    source = {"split": "train", **settings.source}
    if source.get("path") == "tinyworld":
        from ..tinyworld.datasets import Pictures

        rows: Any = Pictures(seed, int(source.get("num_pictures", 1000)))
        return ImageRows(rows, settings, f"tinyworld {seed} {len(rows)}")
    if (settings.caption is None) == (settings.label is None):
        raise ValueError("data: give either `caption` or `label`, the column that says what a picture shows.")
    import datasets

    try:
        rows = datasets.load_dataset(**source)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"data: {source} cannot be loaded: {error.__cause__ or error}") from error
    columns = rows.column_names
    if columns is None:  # a stream tells them when asked to look
        rows = rows._resolve_features()
        columns = rows.column_names or []
    for name, column in (("image", settings.image), ("caption", settings.caption), ("label", settings.label)):
        if column is not None and column.split(".")[0] not in columns:
            raise ValueError(f"data: {name} names the column {column!r}; there are {sorted(columns)}.")
    if settings.label is not None and not isinstance(rows.features[settings.label], datasets.ClassLabel):
        raise ValueError(
            f"data: label names the column {settings.label!r}, which is {rows.features[settings.label]} and knows no "
            "names of classes; if it holds text, it is a caption."
        )
    # Not decoded by `datasets`: a broken picture would raise there, far from its name.
    rows = rows.cast_column(settings.image, datasets.Image(decode=False))
    if isinstance(rows, datasets.IterableDataset):
        return ImageRows(rows, settings, f"stream {sorted(source.items())}")
    if len(rows) == 0:
        raise ValueError(f"data: {source} holds no pictures.")
    return ImageRows(rows, settings, rows._fingerprint)


def example_seed(seed: int, epoch: int, place: int) -> int:
    """What is drawn for an example; its lowest bit decides on mirroring."""
    return zlib.crc32(f"{seed} {epoch} {place}".encode())


class CaptionedImageDataset(Dataset):
    """A source that is there whole, as `{"image", "prompt", "name", "seed"}`, for [`TextToImageCollator`].

    Args:
        rows ([`ImageRows`]): the source.
        seed (`int`): of what is drawn.
        unreadable ([`UnreadableImages`]): where unreadable pictures are counted.
    """

    def __init__(self, rows: ImageRows, seed: int, unreadable: UnreadableImages):
        self.rows, self.seed, self.unreadable, self.epoch = rows, seed, unreadable, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows.rows)

    def __getitem__(self, place: int) -> dict:
        if not 0 <= place < len(self):
            raise IndexError(place)  # what ends a loop over it
        for step in range(len(self)):
            found = (place + step) % len(self)
            row = self.rows.rows[found]
            try:
                image = self.rows.picture(row)
            except UnreadableImageError as error:
                self.unreadable.add(self.rows.name(row, found), str(error))
                continue
            seed = example_seed(self.seed, self.epoch, place)
            return _example(self.rows, row, found, seed, image)
        raise ValueError(f"none of {len(self)} pictures can be read.")


class CaptionedImageStream(IterableDataset):
    """A stream, as [`CaptionedImageDataset`] but in the stream's order, shuffled by its buffer, without an end.

    Args:
        rows, seed, unreadable: as of [`CaptionedImageDataset`].
        start (`int`, defaults to 0): how many examples were seen before; they are passed over unopened.
    """

    def __init__(self, rows: ImageRows, seed: int, unreadable: UnreadableImages, start: int = 0):
        self.rows, self.seed, self.unreadable, self.start = rows, seed, unreadable, start

    def __iter__(self) -> Iterator[dict]:
        stream = self.rows.rows.shuffle(seed=self.seed, buffer_size=self.rows.settings.shuffle_buffer)
        place, waiting = 0, []
        for epoch in count():
            stream.set_epoch(epoch)
            readable = began = place
            for row in stream:
                place += 1
                if place <= self.start:
                    readable = place
                    continue
                waiting.append(example_seed(self.seed, epoch, place))
                try:
                    image = self.rows.picture(row)
                except UnreadableImageError as error:
                    self.unreadable.add(self.rows.name(row, place), str(error))
                    continue
                readable = place
                for seed in waiting:
                    yield _example(self.rows, row, place, seed, image)
                waiting = []
            if readable == began:
                raise ValueError(f"data: the stream {self.rows.settings.source} holds no picture that can be read.")


def _example(rows: ImageRows, row: dict, place: int, seed: int, image: Image.Image) -> dict:
    if rows.settings.flip and seed & 1:
        image = ImageOps.mirror(image)
    return {"image": image, "prompt": rows.prompt(row, place), "name": rows.name(row, place), "seed": seed}


def understanding_examples(settings: dict, seed: int, conversation: Callable) -> Any:
    """Conversations as `{"messages"}`, from a column of that name or from the tiny world.

    Args:
        settings (`dict`): as `source` of [`DataSettings`].
        seed (`int`): of the tiny world.
        conversation (`Callable`): the processor's; it checks the messages and loads their pictures.

    Raises:
        `ValueError`: if there are no messages.
    """
    source = {"split": "train", **settings}
    if source.get("path") == "tinyworld":
        from ..tinyworld.datasets import Conversations

        return Conversations(seed, int(source.get("num_conversations", 1000)))
    import datasets

    rows = datasets.load_dataset(**source)
    if "messages" not in (rows.column_names or []) or not hasattr(rows, "__len__") or not len(rows):
        raise ValueError(f"understanding: {source} must hold a column `messages`, not be empty, and not stream.")
    return Conversing(rows, conversation)


class Conversing(Dataset):
    """ImageRows with `messages` -> the same, checked, their pictures loaded."""

    def __init__(self, rows: Any, conversation: Callable):
        self.rows, self.conversation = rows, conversation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        return {"messages": self.conversation(self.rows[place]["messages"])}
