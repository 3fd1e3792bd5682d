# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images of strangers: read with limits, from places that are allowed. And images for them, as files.

[`load_rgb_image`] reads paths and URLs of every kind, so no string of a request ever reaches it.
"""

import base64
import binascii
import io
import warnings
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image, ImageOps

from ..modeling.images import load_rgb_image
from .errors import ApiError
from .settings import ServerSettings


FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def read_image(url: str, settings: ServerSettings, param: str) -> Image.Image:
    """The image behind a `data:` URL, or behind one of a host that is allowed.

    Args:
        url (`str`): the URL.
        settings ([`ServerSettings`]): the limits.
        param (`str`): the field of the request, for errors.

    Raises:
        [`ApiError`]: if the URL is of another kind, or the image is too large or cannot be read.
    """
    data = _from_data_url(url, param) if url[:5].lower() == "data:" else _fetch(url, settings, param)
    return open_image(data, settings, param)


def open_image(data: bytes, settings: ServerSettings, param: str) -> Image.Image:
    """An image file as an RGB image. Its size is checked before its pixels are decoded."""
    image = _open(data, settings, param)
    try:
        return load_rgb_image(image)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", "invalid_image", param) from error


def open_mask(data: bytes, settings: ServerSettings, param: str) -> Image.Image:
    """A mask in the form of OpenAI, whose transparent pixels are generated, in that of the pipeline (white pixels)."""
    image = _open(data, settings, param)
    try:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    except Exception as error:
        raise ApiError(400, f"{param} cannot be read: {error}", "invalid_image", param) from error
    if alpha is None or np.asarray(alpha).min() > 127:
        raise ApiError(400, f"{param} must have transparent pixels: they are generated.", "invalid_mask", param)
    return ImageOps.invert(alpha)


def _open(data: bytes, settings: ServerSettings, param: str) -> Image.Image:
    """An image that is not decoded yet, and not too large for it."""
    too_large = f"{param} has too many pixels; at most {settings.max_input_pixels} are accepted."
    try:
        with warnings.catch_warnings():
            # A limit of our own follows.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ApiError(400, too_large, "image_too_large", param) from error
    except Exception as error:
        raise ApiError(
            400, f"{param} is no image in one of the formats {', '.join(FORMATS)}.", "invalid_image", param
        ) from error
    if image.width * image.height > settings.max_input_pixels:
        raise ApiError(400, too_large, "image_too_large", param)
    return image


def _from_data_url(url: str, param: str) -> bytes:
    header, comma, text = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ApiError(400, f"{param} must be a URL such as data:image/png;base64,...", "invalid_image_url", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param} is not valid base64.", "invalid_image_url", param) from error


def _fetch(url: str, settings: ServerSettings, param: str) -> bytes:
    try:
        parts = urlsplit(url)
        is_allowed = parts.scheme == "https" and parts.hostname in settings.url_hosts and parts.username is None
    except ValueError:
        is_allowed = False
    if not is_allowed:
        hosts = f", or an https URL of {', '.join(settings.url_hosts)}" if settings.url_hosts else ""
        raise ApiError(400, f"{param} must be a data: URL{hosts}.", "invalid_image_url", param)
    limit, data = settings.max_body_size, b""
    try:
        # Redirects could lead anywhere and are not followed.
        with httpx2.stream("GET", url, timeout=10, follow_redirects=False) as response:
            if response.status_code != 200:
                raise ApiError(400, f"{param}: the host answered {response.status_code}.", "invalid_image_url", param)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > limit:
                    raise ApiError(400, f"{param}: more than {limit} bytes.", "image_too_large", param)
    except httpx2.HTTPError as error:
        raise ApiError(400, f"{param} cannot be fetched.", "invalid_image_url", param) from error
    return data


def image_file(image: Image.Image, output_format: str, quality: int | None = None) -> bytes:
    """The image as a file.

    Args:
        image (`PIL.Image.Image`): the image.
        output_format (`str`): `"png"`, `"webp"` or `"jpeg"`.
        quality (`int`, *optional*): of webp and jpeg, 0 to 100. Defaults to 100, as OpenAI's.
    """
    file = io.BytesIO()
    options = {} if output_format == "png" else {"quality": 100 if quality is None else quality}
    image.save(file, output_format.upper(), **options)
    return file.getvalue()
