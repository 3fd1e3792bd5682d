# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images of every mode, format and source give the same pixels; what could only be guessed is refused."""

import base64
import functools
import io
import re
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latte_flow_hf.modeling.images import load_rgb_image, load_rgb_images


# A smooth image, since JPEG and colour spaces with less colour resolution change a noisy one much.
HEIGHT, WIDTH = 24, 40
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([ROWS * 10, COLUMNS * 6, 255 - ROWS * 5 - COLUMNS * 3], axis=-1).astype(np.uint8)
GREY = RGB[..., 1]
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)
IMAGE = Image.fromarray(RGB)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, RGB.shape, dtype=np.uint8))


def pixels(source, **kwargs) -> np.ndarray:
    image = load_rgb_image(source, **kwargs)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image).astype(int)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


# LAB of 8 bits has few dark colours.
MILD = Image.fromarray(100 + RGB // 4)

# Modes.

ALPHA = Image.fromarray(np.where(COLUMNS < 20, 0, 255).astype(np.uint8))
HALF = Image.merge("RGBA", (*IMAGE.split(), ALPHA))
GREY_HALF = Image.merge("LA", (Image.fromarray(GREY), ALPHA))


@pytest.mark.parametrize(
    ("image", "expected", "tolerance"),
    [
        (Image.fromarray(GREY > 100), np.where(GREY_RGB > 100, 255, 0), 0),
        (Image.fromarray(GREY), GREY_RGB, 0),
        (IMAGE.convert("P"), np.asarray(IMAGE.convert("P").convert("RGB")), 0),
        (IMAGE.convert("RGBX"), RGB, 0),
        (IMAGE.convert("CMYK"), RGB, 0),
        (IMAGE.convert("YCbCr"), RGB, 3),
        (IMAGE.convert("HSV"), RGB, 8),
        (lab(MILD), np.asarray(MILD).astype(int), 8),
        (IMAGE.convert("RGBA"), RGB, 0),
        (IMAGE.convert("RGBA").convert("RGBa"), RGB, 0),
        (IMAGE.convert("P").convert("PA"), np.asarray(IMAGE.convert("P").convert("RGB")), 0),
        (Image.fromarray(GREY).convert("LA").convert("La"), GREY_RGB, 0),
        (Image.fromarray(GREY).convert("I"), GREY_RGB, 0),
        (Image.fromarray(GREY.astype(np.int32) * 257), GREY_RGB, 0),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY_RGB, 0),
        (Image.fromarray(GREY.astype(np.int32) * 257).convert("I;16B"), GREY_RGB, 0),
        (Image.fromarray(GREY.astype(np.float32) / 255), GREY_RGB, 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode(image, expected, tolerance):
    assert np.abs(pixels(image) - expected).max() <= tolerance


def transparent_palette() -> Image.Image:
    image = Image.fromarray(np.where(COLUMNS < 20, 0, 1).astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("background", ["white", "#00ff00", (1, 2, 3), tuple(np.arange(1, 4))])
@pytest.mark.parametrize(
    ("image", "opaque"),
    [
        (HALF, RGB),
        (HALF.convert("RGBa"), RGB),
        (GREY_HALF, GREY_RGB),
        (GREY_HALF.convert("La"), GREY_RGB),
        (transparent_palette(), np.full_like(RGB, (0, 0, 255))),
        (Image.open(io.BytesIO(file_of(HALF, "PNG"))), RGB),
        (Image.open(io.BytesIO(file_of(HALF, "WEBP", lossless=True, exact=True))), RGB),
        (Image.open(io.BytesIO(file_of(transparent_palette(), "PNG"))), np.full_like(RGB, (0, 0, 255))),
        (Image.open(io.BytesIO(file_of(transparent_palette(), "GIF"))), np.full_like(RGB, (0, 0, 255))),
    ],
)
def test_transparent_pixels_have_the_colour_of_the_background(image, opaque, background):
    colour = {"white": (255, 255, 255), "#00ff00": (0, 255, 0)}.get(background, background)
    found = pixels(image, background=background)
    assert (found[:, :20] == colour).all()
    assert np.abs(found[:, 20:] - opaque[:, 20:]).max() <= 1


def test_half_transparent_pixels_are_mixed():
    assert pixels(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))[0, 0].tolist() == [204, 204, 204]


def test_a_transparent_value_of_a_grey_file():
    for mode, value in (("L", GREY[0, 0]), ("I;16", int(GREY[0, 0]) * 257)):
        grey = Image.fromarray(GREY if mode == "L" else GREY.astype(np.uint16) * 257)
        found = pixels(file_of(grey, "PNG", transparency=int(value)))
        assert np.array_equal(found, np.where(GREY[0, 0] == GREY_RGB, 255, GREY_RGB)), mode


@pytest.mark.parametrize("background", ["reddish", (1, 2), (1, 2, 256), 7, None, (0.5, 0, 0)])
def test_what_is_no_background_is_refused(background):
    with pytest.raises(ValueError, match=f"background must be a colour .* got {re.escape(repr(background))}"):
        load_rgb_image(IMAGE, background)


# Formats.


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (file_of(IMAGE, "PNG"), RGB, 0),
        (file_of(IMAGE, "BMP"), RGB, 0),
        (file_of(IMAGE, "TIFF"), RGB, 0),
        (file_of(IMAGE, "WEBP", lossless=True), RGB, 0),
        (file_of(IMAGE, "JPEG", quality=98, subsampling=0), RGB, 6),
        (file_of(IMAGE.convert("CMYK"), "JPEG", quality=98), RGB, 8),
        (file_of(IMAGE.convert("P"), "GIF"), np.asarray(IMAGE.convert("P").convert("RGB")), 0),
        (file_of(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY_RGB, 0),
        (file_of(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY_RGB, 0),
        (file_of(Image.fromarray(GREY.astype(np.int32) * 257), "PPM"), GREY_RGB, 0),
        (file_of(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY_RGB, 0),
        (file_of(lab(MILD), "TIFF"), np.asarray(MILD).astype(int), 8),
    ],
    ids=[
        "png",
        "bmp",
        "tiff",
        "webp",
        "jpeg",
        "cmyk jpeg",
        "gif",
        "png16",
        "tiff16",
        "ppm16",
        "float tiff",
        "lab tiff",
    ],
)
def test_every_format(data, expected, tolerance):
    assert np.abs(pixels(data) - expected).max() <= tolerance
    assert np.abs(pixels(Image.open(io.BytesIO(data))) - expected).max() <= tolerance


def test_a_dark_16_bit_file_stays_dark():
    dark = Image.fromarray(np.full((4, 4), 200, np.int32))
    assert pixels(file_of(dark, "PPM")).max() == 1  # 200 of 65535
    assert pixels(dark).max() == 200  # 8 bits, as by `convert("I")`


def test_the_range_of_16_bits_is_not_that_of_the_image():
    values = np.linspace(1542, 26728, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    found = pixels(file_of(Image.fromarray(values), "PNG"))
    assert (found.min(), found.max()) == (6, 104)


def test_of_an_animation_the_current_frame():
    colours = (255, 0, 0), (0, 255, 0)
    first, second = (Image.new("RGB", (8, 8), colour) for colour in colours)
    data = file_of(first, "GIF", save_all=True, append_images=[second])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert pixels(opened)[0, 0].tolist() == [0, 255, 0]


TURNED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_images_are_upright_from_every_source(orientation, tmp_path):
    # What a camera stores, so that it is upright after the turn that the tag asks for.
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](RGB)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    stored.save(path, quality=98, subsampling=0, exif=exif)
    encoded = base64.b64encode(path.read_bytes()).decode()
    sources = (
        path,
        str(path),
        path.as_uri(),
        path.read_bytes(),
        encoded,
        f"data:image/jpeg;base64,{encoded}",
        Image.open(path),
    )
    for source in sources:
        found = pixels(source)
        assert found.shape == RGB.shape and np.abs(found - RGB).max() <= 8


# Sources.


@pytest.fixture(scope="module")
def png(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "an image, 50%.png"
    HALF.save(path)
    return path


def test_every_source_is_the_same(png):
    expected = pixels(png)
    encoded = base64.b64encode(png.read_bytes()).decode()
    lines = base64.encodebytes(png.read_bytes()).decode()
    sources = {
        "path": str(png),
        "file url": png.as_uri(),
        "bytes": png.read_bytes(),
        "bytearray": bytearray(png.read_bytes()),
        "base64": encoded,
        "base64 in lines": lines,
        "data url": f"data:image/png;base64,{encoded}",
        "pil": Image.open(png),
        "array": np.asarray(HALF),
    }
    for name, source in sources.items():
        assert np.array_equal(pixels(source), expected), name


def test_a_url_keeps_its_transparency(png):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=png.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/an%20image,%2050%25.png"
        assert np.array_equal(pixels(url), pixels(png))
        with pytest.raises(ValueError, match=re.escape(f"image '{url}.x' cannot be read")):
            load_rgb_image(url + ".x")
    finally:
        server.shutdown()
        server.server_close()


FLOATS = RGB.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (FLOATS, RGB),
        (FLOATS.astype(np.float64), RGB),
        (torch.from_numpy(FLOATS).permute(2, 0, 1), RGB),
        (torch.from_numpy(FLOATS).permute(2, 0, 1).requires_grad_(), RGB),
        (RGB.astype(np.uint16) * 257, RGB),
        (GREY, GREY_RGB),
        (GREY[..., None], GREY_RGB),
        (torch.from_numpy(GREY)[None], GREY_RGB),
        (GREY > 100, np.where(GREY_RGB > 100, 255, 0)),
        (np.asarray(HALF), None),
        (np.asarray(HALF).astype(np.float32) / 255, None),
        (np.asarray(HALF).transpose(2, 0, 1), None),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (RGB[..., ::-1], RGB[..., ::-1]),
    ],
    ids=range(18),
)
def test_every_layout_of_arrays_and_tensors(source, expected):
    assert np.array_equal(pixels(source), pixels(HALF) if expected is None else expected)


def test_half_precision_is_right_up_to_its_resolution():
    for dtype, tolerance in ((torch.float16, 0), (torch.bfloat16, 1)):
        assert np.abs(pixels(torch.from_numpy(FLOATS).to(dtype)) - RGB).max() <= tolerance


def test_several_images_and_batches():
    assert load_rgb_images(None) == [] and load_rgb_images([]) == []
    batch = torch.from_numpy(np.stack([FLOATS, FLOATS[::-1]])).permute(0, 3, 1, 2)
    for sources in (batch, batch.permute(0, 2, 3, 1).numpy(), [IMAGE, RGB[::-1]], (RGB, RGB[::-1])):
        first, second = load_rgb_images(sources)
        assert np.array_equal(first, RGB) and np.array_equal(second, RGB[::-1])
    assert len(load_rgb_images(IMAGE)) == 1


# Refused.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, "NoneType."),
        (7, "int."),
        ({"a": 1}, "dict."),
        (np.zeros((8, 8, 3), np.int64), "ndarray of int64, (8, 8, 3)."),
        (torch.zeros(8, 8, 3, dtype=torch.int32), "Tensor of int32, (8, 8, 3)."),
        (np.zeros((8, 8, 5), np.uint8), "ndarray of uint8, (8, 8, 5)."),
        (np.zeros(8, np.uint8), "ndarray of uint8, (8,)."),
        (np.zeros((2, 8, 8, 3), np.uint8), "ndarray of uint8, (2, 8, 8, 3)."),
        (np.zeros((0, 0, 3), np.uint8), "ndarray of uint8, (0, 0, 3)."),
        (np.zeros((8, 8), complex), "ndarray of complex128, (8, 8)."),
        (np.array("cat.png"), "ndarray of <U7, ()."),
    ],
    ids=range(11),
)
def test_what_is_no_image_is_refused(source, found):
    with pytest.raises(ValueError, match=r"an image must be a PIL image.*got " + re.escape(found)):
        load_rgb_image(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            RGB.astype(np.float32),
            "image of float32, (24, 40, 3), cannot be used: float values must be from 0 to 1, got",
        ),
        (FLOATS * 2 - 1, "float values must be from 0 to 1, got -1 to "),
        (np.full((8, 8), np.nan), "float values must be from 0 to 1, got nan to nan"),
        (torch.full((3, 8, 8), float("inf")), "got inf to inf"),
        (Image.fromarray(GREY).convert("F"), "image of mode F cannot be used: float values must be from 0 to 1"),
        (file_of(Image.fromarray(GREY).convert("F"), "TIFF"), "float values must be from 0 to 1, got 0 to 234"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), "must be from 0 to 65535 (16 bits), got 70000 to 70000"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "must be from 0 to 65535 (16 bits), got -1 to -1"),
        (np.zeros((3, 8, 3), np.uint8), "may have its channels first or last"),
        (Image.new("RGB", (0, 5)), "has no pixels: its size is (0, 5)"),
    ],
    ids=range(10),
)
def test_what_could_only_be_guessed_is_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rgb_image(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("cat", "there is no such file, and it is neither a URL nor an image in base64"),
        ("", "there is no such file"),
        ("a\0b", "there is no such file"),
        ("aGVsbG8=", "there is no such file, and it is neither a URL nor an image in base64"),
        ("data:text/plain,hello", "it is in no format that PIL knows"),
        ("data:image/png;base64,!", "cannot be read"),
        ("file:///nowhere.png", "No such file"),
        (Path("nowhere.png"), "No such file"),
        (b"", "image of 0 bytes cannot be read: it is in no format that PIL knows"),
        (file_of(NOISE, "PNG")[:2000], "cannot be read: image file is truncated"),
        ("x" * 100_000, "... (100000 characters)' cannot be read: there is no such file"),
    ],
    ids=range(11),
)
def test_what_cannot_be_read_is_refused_in_one_line(source, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        load_rgb_image(source)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


def test_a_file_that_is_no_image_is_named(text_file, tmp_path):
    for source, name in ((text_file, text_file), (str(text_file), text_file), (tmp_path, tmp_path)):
        with pytest.raises(ValueError, match=re.escape(f"image {str(name)!r} cannot be read")):
            load_rgb_image(source)
    lazy = tmp_path / "truncated.png"
    lazy.write_bytes(file_of(NOISE, "PNG")[:2000])
    with pytest.raises(ValueError, match=re.escape(f"image {str(lazy)!r} cannot be read")):
        load_rgb_image(Image.open(lazy))


def test_a_decompression_bomb_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot be read: Image size .* could be decompression bomb") as refused:
        load_rgb_image(file_of(IMAGE, "PNG"))
    assert "\n" not in str(refused.value)
