# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the page accepts. Visitors are strangers: each value is checked before anything heavy, and the message says
what to do instead."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..modeling.images import load_rgb_image
from ..modeling.sampling import check_steps_per_expert


# Formats whose decoders are in PIL itself and widely used. PIL would read many others, EPS with an external program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Limits:
    """The limits of a studio.

    Args:
        prompt_length (`int`): characters of a prompt or a question.
        steps (`int`): evaluations of the model per image.
        images (`int`): images per request.
        size (`int`): pixels along a side of a generated image.
        guidance (`float`): the largest guidance scale.
        answer_tokens (`int`): tokens of an answer.
        turns (`int`): questions in a conversation.
        upload_bytes (`int`): size of an uploaded image file.
        upload_pixels (`int`): pixels of an uploaded image.
        adapter_bytes (`int`): size of an uploaded adapter.
        waiting (`int`): requests that wait for the model.
    """

    prompt_length: int = 1000
    steps: int = 200
    images: int = 8
    size: int = 1024
    guidance: float = 30.0
    answer_tokens: int = 256
    turns: int = 20
    upload_bytes: int = 10_000_000
    upload_pixels: int = 16_000_000
    adapter_bytes: int = 500_000_000
    waiting: int = 64


@dataclass(frozen=True)
class ImageSettings:
    """How an image is generated. `None` is the model's own.

    Args:
        prompt (`str`): the prompt.
        seed (`int`): of the initial noise and of all noise that the solver adds.
        steps (`int` or `tuple[int, ...]`, *optional*): of all experts together, or of each.
        guidance (`float` or `tuple[float, ...]`, *optional*): of all experts, or of each.
        width, height (`int`, *optional*): in pixels.
        variation (`float`): from 0 to 1, the share of other noise in the initial noise, see [`runs.initial_noise`].
        variation_seed (`int`): of that other noise.
        adapters (`tuple[tuple[str, tuple[float, ...]], ...]`): names, and the weight in each expert.
    """

    prompt: str
    seed: int = 0
    steps: int | tuple[int, ...] | None = None
    guidance: float | tuple[float, ...] | None = None
    width: int | None = None
    height: int | None = None
    variation: float = 0.0
    variation_seed: int = 0
    adapters: tuple[tuple[str, tuple[float, ...]], ...] = ()


def read_prompt(text: Any, limits: Limits, name: str = "prompt") -> str:
    """The text without spaces around it.

    Raises:
        `ValueError`: if it is empty or too long.
    """
    text = "" if text is None else str(text).strip()
    if not text:
        raise ValueError(f"The {name} is empty. Write what you want to see, for example: a red circle.")
    if len(text) > limits.prompt_length:
        raise ValueError(
            f"The {name} has {len(text):,} characters, and at most {limits.prompt_length:,} are accepted. Shorten it."
        )
    return text


def read_whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        `ValueError`: if it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or number != int(number):
        raise ValueError(f"{name} must be a whole number from {low:,} to {high:,}, got {_shown(value)}.")
    return int(number)


def read_steps(text: Any, num_experts: int, limits: Limits) -> int | tuple[int, ...] | None:
    """`""` -> `None`, `"40"` -> 40, `"10, 10, 10, 10"` -> (10, 10, 10, 10).

    Raises:
        `ValueError`: if it is neither, or more than the limit in all.
    """
    parts = _parts(text)
    if not parts:
        return None
    if len(parts) not in (1, num_experts):
        raise ValueError(f"Steps must be one number, or one for each of {num_experts} experts, got {_shown(text)}.")
    if len(parts) == 1:
        return read_whole(parts[0], "Steps", 1, limits.steps)
    steps = tuple(read_whole(part, "Steps of an expert", 0, limits.steps) for part in parts)
    check_steps_per_expert(steps, num_experts, "Steps")
    if sum(steps) > limits.steps:
        raise ValueError(f"Steps must be at most {limits.steps} in all, got {sum(steps)}.")
    return steps


def read_guidance(text: Any, num_experts: int, limits: Limits) -> float | tuple[float, ...] | None:
    """`""` -> `None`, `"4"` -> 4.0, `"4, 4, 2, 1"` -> (4.0, 4.0, 2.0, 1.0).

    Raises:
        `ValueError`: if it is neither, or a value is not from 0 to the limit.
    """
    values = read_numbers(text, "Guidance", num_experts, 0.0, limits.guidance)
    return values[0] if values is not None and len(values) == 1 else values


def read_numbers(text: Any, name: str, num_experts: int, low: float, high: float) -> tuple[float, ...] | None:
    """No number (`None`), one, or one for each expert.

    Raises:
        `ValueError`: for another count, or a value outside of `low` to `high`.
    """
    parts = _parts(text)
    if not parts:
        return None
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        values = (math.nan,)
    if len(values) not in (1, num_experts) or not all(low <= value <= high for value in values):
        raise ValueError(
            f"{name} must be a number from {low:g} to {high:g}, or {num_experts} of them with commas between, one for "
            f"each expert; got {_shown(text)}."
        )
    return values


def read_size(value: Any, name: str, multiple: int, limits: Limits) -> int | None:
    """Pixels along a side; `None` for no value.

    Raises:
        `ValueError`: if it is above the limit or no multiple of `multiple`.
    """
    if value is None or str(value).strip() == "":
        return None
    pixels = read_whole(value, name, multiple, limits.size)
    if pixels % multiple:
        below = pixels // multiple * multiple
        raise ValueError(f"{name} must be a multiple of {multiple}, got {pixels}; use {below} or {below + multiple}.")
    return pixels


def read_upload(path: str | Path, limits: Limits) -> Image.Image:
    """An uploaded image, RGB and upright.

    Raises:
        `ValueError`: if the file or the image is too large, is animated, or cannot be read.
    """
    name, size = Path(path).name, os.path.getsize(path)
    if size > limits.upload_bytes:
        raise ValueError(
            f"{name} has {size / 1e6:.1f} MB, and at most {limits.upload_bytes / 1e6:g} MB are accepted. Use a "
            "smaller image."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # The second image in the JPEG file of a telephone is no movement.
            frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP") else 1
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels. Use a smaller image.") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name} is not an image that can be read: it is damaged, or none of {', '.join(IMAGE_FORMATS)}."
        ) from error
    if width * height > limits.upload_pixels:
        raise ValueError(
            f"{name} has {width:,} x {height:,} pixels, and at most {limits.upload_pixels / 1e6:g} million are "
            "accepted. Use a smaller image."
        )
    if frames > 1:
        raise ValueError(f"{name} is an animation of {frames} frames. Use an image that does not move.")
    try:
        return load_rgb_image(Path(path))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: it is damaged or incomplete.") from error


def _parts(text: Any) -> list[str]:
    text = "" if text is None else str(text)
    return [part for part in text.replace(",", " ").replace(";", " ").split() if part]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
