# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the page accepts, and what it says otherwise."""

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.app.limits import (
    Limits,
    read_guidance,
    read_prompt,
    read_size,
    read_steps,
    read_upload,
    read_whole,
)


LIMITS = Limits()


@pytest.fixture
def photo(tmp_path):
    """An image file of a given size and format."""

    def photo(name: str = "photo.png", size: tuple[int, int] = (24, 16), **arguments):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, **arguments)
        return tmp_path / name

    return photo


def test_numbers_as_they_are_typed():
    assert read_steps("", 4, LIMITS) is None
    assert read_steps(" 40 ", 4, LIMITS) == 40
    assert read_steps("10, 4,4 2", 4, LIMITS) == (10, 4, 4, 2)
    assert read_guidance("2.5", 4, LIMITS) == 2.5
    assert read_guidance("4, 4, 2, 1", 4, LIMITS) == (4.0, 4.0, 2.0, 1.0)
    assert read_size("", "Width", 16, LIMITS) is None
    assert read_size(64, "Width", 16, LIMITS) == 64
    assert read_prompt("  a red circle\n", LIMITS) == "a red circle"


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda: read_steps("201", 4, LIMITS), "from 1 to 200, got '201'"),
        (lambda: read_steps("0", 4, LIMITS), "from 1 to 200"),
        (lambda: read_steps("2.5", 4, LIMITS), "whole number"),
        (lambda: read_steps("many", 4, LIMITS), "got 'many'"),
        (lambda: read_steps("10, 10", 4, LIMITS), "one for each of 4 experts"),
        (lambda: read_steps("0, 1, 1, 1", 4, LIMITS), "the first at least 1"),
        (lambda: read_steps("100, 100, 1, 1", 4, LIMITS), "at most 200 in all, got 202"),
        (lambda: read_guidance("nan", 4, LIMITS), "from 0 to 30"),
        (lambda: read_guidance("-1", 4, LIMITS), "from 0 to 30"),
        (lambda: read_guidance("1, 2", 4, LIMITS), "4 of them"),
        (lambda: read_guidance("inf", 4, LIMITS), "from 0 to 30"),
        (lambda: read_size(2048, "Width", 16, LIMITS), "Width must be a whole number from 16 to 1,024"),
        (lambda: read_size(70, "Width", 16, LIMITS), "multiple of 16, got 70; use 64 or 80"),
        (lambda: read_whole("1e99", "Seed", 0, 9), "from 0 to 9"),
        (lambda: read_whole(None, "Seed", 0, 9), "got None"),
        (lambda: read_prompt("  ", LIMITS), "prompt is empty"),
        (lambda: read_prompt("a" * 10_000, LIMITS), "10,000 characters, and at most 1,000"),
        (lambda: read_steps("9" * 5000, 4, LIMITS), r"\(5002 characters\)"),
    ],
)
def test_what_is_not_accepted_is_said(read, told):
    with pytest.raises(ValueError, match=told):
        read()


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp", "photo.bmp", "photo.gif"])
def test_uploads_are_read_as_rgb(photo, name):
    image = read_upload(photo(name), LIMITS)
    assert image.mode == "RGB" and image.size == (24, 16)


def test_uploads_are_upright(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert read_upload(photo("photo.jpg", exif=exif), LIMITS).size == (16, 24)


def test_uploads_that_are_too_large(photo):
    with pytest.raises(ValueError, match=r"photo\.png has 0\.0 MB, and at most 0\.0001 MB"):
        read_upload(photo(), Limits(upload_bytes=100))
    with pytest.raises(ValueError, match="5,000 x 4,000 pixels"):
        read_upload(photo("large.bmp", size=(5000, 4000)), Limits(upload_bytes=10**9))


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    """A file of some kilobytes that says that it has billions of pixels."""
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"far too many pixels|20,000 x 20,000"):
        read_upload(path, LIMITS)


def test_uploads_that_move(tmp_path):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
    for name in ("moves.gif", "moves.webp", "moves.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=f"{name} is an animation of 3 frames"):
            read_upload(tmp_path / name, LIMITS)


def test_a_second_image_in_a_jpeg_is_no_animation(tmp_path):
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 8), "blue")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_upload(tmp_path / "phone.jpg", LIMITS).getpixel((3, 3))[0] > 200


def test_damaged_uploads(photo, text_file, tmp_path):
    path = photo("cut.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-2000])
    for bad in (text_file, path):
        with pytest.raises(ValueError, match="damaged"):
            read_upload(bad, LIMITS)
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="none of PNG"):
        read_upload(tmp_path / "drawing.eps", LIMITS)
