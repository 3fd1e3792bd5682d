# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Recognises what an image of the tiny world shows, independently of any model that is evaluated.

Shapes are recognised by colour regions and the overlap of each region with the ideal outlines; digits by a support
vector machine fitted to the real training digits alone.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .digits import digit_indices, draw_digit, load_digits
from .shapes import BACKGROUND, IMAGE_SIZE, Scene, SceneObject, outline


# Smaller regions are noise: the smallest drawn object (a cross of half-extent 8) has about 140 pixels.
_MIN_OBJECT_PIXELS = 40
_TEMPLATE_SIZE = 32


def read_scene(image: Image.Image, object_class: type[SceneObject] = SceneObject) -> Scene | None:
    """The canonical scene in `image`; `None` if it does not show one or two clear objects.

    An object is a connected region that differs from the background. It is clear if at least 80% of its inner pixels
    are nearest to the same colour of the world and its intersection over union with the best outline is at least 0.6.
    `object_class` determines the known colours and shapes.
    """
    pixels = _pixels(image)
    foreground = np.abs(pixels - BACKGROUND).max(axis=-1) > 40
    regions, count = ndimage.label(foreground)
    found: list[tuple[SceneObject, float, float]] = []
    for region in range(1, count + 1):
        mask = regions == region
        if mask.sum() < _MIN_OBJECT_PIXELS:
            continue
        item = _read_object(pixels, mask, object_class)
        if item is None or len(found) == 2:
            return None
        rows, columns = np.nonzero(mask)
        found.append((item, (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2))
    if not found:
        return None
    if len(found) == 1:
        return Scene((found[0][0],))
    (first, x1, y1), (second, x2, y2) = found
    relation = "left of" if abs(x1 - x2) > abs(y1 - y2) else "above"
    in_order = x1 < x2 if relation == "left of" else y1 < y2
    return Scene((first, second) if in_order else (second, first), relation)


def read_digit(image: Image.Image) -> int:
    """The digit in `image`, 0 to 9, according to a classifier of real handwriting."""
    return int(_digit_classifier().predict(_digit_features(image)[None])[0])


def shows(image: Image.Image, prompt: str) -> bool:
    """Whether `image` shows what `prompt` (a prompt of the tiny world) describes.

    Raises:
        `ValueError`: if `prompt` is not a prompt of the tiny world.
    """
    from .questions import parse_prompt

    expected = parse_prompt(prompt)
    if isinstance(expected, Scene):
        return read_scene(image) == expected.canonical
    return read_digit(image) == expected


def _pixels(image: Image.Image) -> np.ndarray:
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"an image of the tiny world must be {IMAGE_SIZE}x{IMAGE_SIZE}, got {image.size}.")
    return np.asarray(image.convert("RGB")).astype(np.float32)


def _read_object(pixels: np.ndarray, mask: np.ndarray, object_class: type[SceneObject]) -> SceneObject | None:
    inner = ndimage.binary_erosion(mask)
    inside = pixels[inner if inner.sum() >= 20 else mask]
    palette = np.array(list(object_class.colours.values()), dtype=np.float32)
    nearest = np.linalg.norm(inside[:, None] - palette, axis=-1).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(palette))
    if votes.max() < 0.8 * len(inside):
        return None
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    if not 0.7 < width / height < 1.43:
        return None
    crop = Image.fromarray(mask).crop(box).convert("F").resize((_TEMPLATE_SIZE,) * 2, Image.Resampling.BILINEAR)
    region = np.asarray(crop) > 127
    overlaps = [(region & template).sum() / (region | template).sum() for template in _templates(object_class.shapes)]
    if max(overlaps) < 0.6:
        return None
    return object_class(list(object_class.colours)[int(votes.argmax())], object_class.shapes[int(np.argmax(overlaps))])


@lru_cache
def _templates(shapes: tuple[str, ...]) -> list[np.ndarray]:
    """Masks of the shapes, each scaled to fill a square."""
    masks = []
    for shape in shapes:
        points = np.array([point for polygon in outline(shape) for point in polygon])
        low, high = points.min(axis=0), points.max(axis=0)
        canvas = Image.new("L", (_TEMPLATE_SIZE * 4,) * 2)
        for polygon in outline(shape):
            scaled = (np.array(polygon) - low) / (high - low) * _TEMPLATE_SIZE * 4
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in scaled], fill=255)
        masks.append(np.asarray(canvas.reduce(4)) > 127)
    return masks


def _digit_features(image: Image.Image) -> np.ndarray:
    """Brightness of the image at the digits' original 8x8 resolution, flattened, in [0, 1]."""
    ink = (_pixels(image).mean(axis=-1) - np.mean(BACKGROUND)) / (240 - np.mean(BACKGROUND))
    return ink.reshape(8, 8, 8, 8).mean(axis=(1, 3)).reshape(-1)


@lru_cache(maxsize=1)
def _digit_classifier():
    from sklearn.svm import SVC

    indices = digit_indices(held_out=False)
    rng = np.random.default_rng(0)
    # Each digit once unchanged and three times augmented, for robustness to small rotations and shifts.
    images = [draw_digit(int(i), None if copy == 0 else rng) for copy in range(4) for i in indices]
    features = np.stack([_digit_features(image) for image in images])
    return SVC(gamma="scale", C=10.0).fit(features, np.tile(load_digits()[1][indices], 4))
