# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images from any source as RGB PIL images of 8 bits: the one loader of prompts, chat, training and encoding.

What is unusual here: `PIL.Image.convert("RGB")` is not enough. It clips 16-bit and float values at 255, and it drops
the alpha channel, so that the hidden colours of transparent pixels show.
"""

import base64
import binascii
import io
import os
import urllib.request
from pathlib import Path
from typing import Any

import diffusers.utils
import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError


Background = str | tuple[int, int, int]

SOURCES = (
    "a PIL image, a path, a URL (http, https, file or data), base64 text, the bytes of an image file, or an array or "
    "tensor of uint8, uint16, bool, or floats from 0 to 1"
)


def load_rgb_image(source: Any, background: Background = "white") -> Image.Image:
    """Load an image as an RGB PIL image, upright and opaque.

    - The orientation in EXIF data is applied, to PIL images too.
    - Transparent pixels are composited on `background`. (Chosen: white, as browsers show them.)
    - 16-bit values are divided by 257, float values from 0 to 1 multiplied by 255. A PIL image of mode `"I"` is
      16-bit, or 8-bit if no value is above 255 and it was not read from a file: so PIL makes it from 8-bit images.
    - Of an animation, the current frame of a PIL image, else the first frame.

    Args:
        source:
            A `PIL.Image.Image`; a path; a URL (`http:`, `https:`, `file:` or `data:`); base64 text; the bytes of an
            image file; or an array or tensor of shape (height, width), (height, width, channels) or (channels, height,
            width) with 1 to 4 channels (grey, grey and alpha, RGB, RGBA), of uint8, uint16, bool, or floats from 0 to
            1.
        background (`str` or `tuple[int, int, int]`, defaults to `"white"`): a colour as PIL names it, or RGB from 0 to
            255.

    Raises:
        `ValueError`: if `source` is something else, cannot be decoded, has no pixels or has float values outside 0 to
            1, or `background` is no colour.
    """
    background = check_background(background)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source)
    elif isinstance(source, (str, Path, bytes, bytearray, Image.Image)):
        try:
            image = _open(source)
        except UnidentifiedImageError as error:
            raise ValueError(f"image {_describe(source)} cannot be read: it is in no format that PIL knows") from error
        # PIL's decoders raise errors of many kinds for damaged files, and one of its own for a decompression bomb.
        except Exception as error:
            raise ValueError(f"image {_describe(source)} cannot be read: {error}") from error
    else:
        raise ValueError(f"an image must be {SOURCES}, got {type(source).__name__}.")
    if 0 in image.size:
        raise ValueError(f"image {_describe(source)} has no pixels: its size is {image.size}.")
    try:
        return _to_rgb(image, background)
    except (ValueError, OSError) as error:
        raise ValueError(f"image {_describe(source)} cannot be used: {error}") from error


def load_rgb_images(sources: Any, background: Background = "white") -> list[Image.Image]:
    """Load one image, a list or tuple of them, or a batch, an array or tensor with four axes.

    Args:
        sources: see `load_rgb_image`; `None` is no image.
        background (`str` or `tuple[int, int, int]`, defaults to `"white"`): see `load_rgb_image`.
    """
    if sources is None:
        return []
    is_batch = isinstance(sources, (np.ndarray, torch.Tensor)) and sources.ndim == 4
    return [
        load_rgb_image(source, background)
        for source in (sources if is_batch or isinstance(sources, (list, tuple)) else [sources])
    ]


def check_background(background: Any) -> tuple[int, int, int]:
    """The colour in RGB.

    Raises:
        `ValueError`: if it is no colour.
    """
    if isinstance(background, str):
        try:
            return ImageColor.getrgb(background)[:3]
        except ValueError as error:
            raise ValueError(
                f"background must be a colour such as 'white' or '#ffffff', got {background!r}."
            ) from error
    is_colour = isinstance(background, (list, tuple)) and len(background) == 3
    if not is_colour or not all(isinstance(value, (int, np.integer)) and 0 <= value <= 255 for value in background):
        raise ValueError(f"background must be a colour such as 'white' or (255, 255, 255), got {background!r}.")
    red, green, blue = map(int, background)
    return red, green, blue


def _describe(source: Any) -> str:
    """The source in an error message."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)")
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return repr(str(filename)) if filename else f"of mode {source.mode}"
    return f"of {str(source.dtype).removeprefix('torch.')}, {tuple(source.shape)},"


def _open(source: str | Path | bytes | bytearray | Image.Image) -> Image.Image:
    """The image in the mode in which it is stored, decoded and upright."""
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (bytes, bytearray)):
        image = Image.open(io.BytesIO(source))
    elif isinstance(source, Path) or os.path.isfile(source):
        image = Image.open(source)
    elif source.startswith(("http://", "https://")):
        # transformers' own `load_image` would drop the alpha channel.
        image = diffusers.utils.load_image(source, convert_method=lambda image: image)
    elif source.startswith(("file:", "data:")):
        with urllib.request.urlopen(source) as response:
            image = Image.open(io.BytesIO(response.read()))
    else:
        try:
            image = Image.open(io.BytesIO(base64.b64decode("".join(source.split()), validate=True)))
        except (binascii.Error, ValueError, OSError) as error:
            raise ValueError("there is no such file, and it is neither a URL nor an image in base64") from error
    # A file is decoded when its pixels are first needed: here, where its errors are expected.
    image.load()
    upright = ImageOps.exif_transpose(image)
    upright.format = image.format  # PIL drops it. It tells a 16-bit file of mode "I" from an 8-bit image.
    return upright


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.mode == "LAB":
        lab_to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, lab_to_rgb)
        assert converted is not None  # It is only with `inPlace`.
        image = converted
    if not image.has_transparency_data:
        return image.convert("RGB")
    # PIL converts premultiplied grey to grey with alpha, and from there only to RGBA.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of mode `F`, `I` or `I;16` in 8 bits, with alpha if one of its values is transparent."""
    values = np.asarray(image)
    if image.mode == "F":
        pixels = _float_to_uint8(values)
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"its values must be from 0 to 65535 (16 bits), got {low} to {high}; scale them")
        is_8_bits = image.mode == "I" and image.format is None and high <= 255
        pixels = values.astype(np.uint8) if is_8_bits else _uint16_to_uint8(values)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(pixels)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(pixels), Image.fromarray(alpha)))


def _uint16_to_uint8(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257).astype(np.uint8)


def _float_to_uint8(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    # Not `low < 0 or high > 1`, which is false for NaN.
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float values must be from 0 to 1, got {low:.6g} to {high:.6g}; scale them")
    return np.round(np.asarray(values, np.float32) * 255).astype(np.uint8)


def _from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        # numpy has no bfloat16.
        array = (source.float() if source.is_floating_point() else source).numpy()
    else:
        array = source
    refused = ValueError(
        f"an image must be {SOURCES}, got {type(source).__name__} {_describe(source)}".rstrip(",") + "."
    )
    channels_last, channels_first = (array.ndim == 3 and array.shape[axis] in range(1, 5) for axis in (-1, 0))
    if array.ndim != 2 and not (channels_last or channels_first):
        raise refused
    if channels_last and channels_first:
        raise ValueError(
            f"image {_describe(source)} may have its channels first or last; give a PIL image, or another size."
        )
    if channels_first:
        array = np.moveaxis(array, 0, -1)
    if 0 in array.shape:
        raise refused
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = _uint16_to_uint8(array)
    elif array.dtype.kind == "f":
        try:
            array = _float_to_uint8(array)
        except ValueError as error:
            raise ValueError(f"image {_describe(source)} cannot be used: {error}.") from error
    elif array.dtype != np.uint8:
        raise refused
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
