# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Recognises what an image of the tiny world shows, independently of any model that is evaluated.

Shapes are recognised by colour regions and the distance of their outlines from the ideal ones; digits by a support
vector machine fitted to the real training digits alone. How often it is right: `python benchmarks/oracle.py`.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .digits import digit_indices, draw_digit, load_digits
from .shapes import BACKGROUND, IMAGE_SIZE, RELATIONS, Scene, SceneObject, outline


# Smaller regions are noise: the smallest drawn object (a cross of half-extent 8) has about 140 pixels.
_MIN_OBJECT_PIXELS = 40
# Chosen: 3x3, while noise and the traces of JPEG make single pixels.
_MIN_SPOT_PIXELS = 9
# Chosen: the mean of blue and purple, the closest colours, has a distance of 53 from both.
_MAX_COLOUR_DISTANCE = 48.0
# Chosen: drawn objects are below 0.015; an ellipse of 3:2, half of a shape, or a rectangle of 4:3 are above.
_MAX_DEVIATION = 0.065
# Chosen: digits that the classifier has not seen are at most 1.3 from those that it has, shapes at least 1.5.
_MAX_DIGIT_DISTANCE = 1.5
_SUPERSAMPLING = 4

ERRORS = ("missing", "extra", "colour", "shape", "relation", "digit")


@dataclass(frozen=True)
class FoundObject:
    """A region of an image that differs from the background.

    Args:
        colour (`str`, *optional*): the nearest colour; `None` if it is near to none, or the region has several.
        shape (`str`, *optional*): the nearest shape; `None` if the outline is like none.
        x, y (`float`): the centre of its bounding box, in pixels.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float


def read_objects(image: Image.Image, object_class: type[SceneObject] = SceneObject) -> list[FoundObject]:
    """The objects in `image`, clear or not.

    An object is a connected region that differs from the background. Its colour is clear if at least 80% of its inner
    pixels are nearest to the same colour of the world, and their median is at most 48 from it (Euclidean, of RGB from
    0 to 255). Its shape is that whose outline, at the centroid and with the area of the region, has the smallest mean
    distance from the outline of the region. It is clear if this distance is at most 0.065 of the square root of the
    area. `object_class` determines the known colours and shapes. Spots that are too small for an object, but
    together as large as one, are one more object, which is not clear.

    Raises:
        `ValueError`: if the image is not 64x64.
    """
    pixels = _pixels(image)
    foreground = np.abs(pixels - BACKGROUND).max(axis=-1) > 40
    regions, count = ndimage.label(foreground)
    found, spots = [], np.zeros_like(foreground)
    for region in range(1, count + 1):
        mask = regions == region
        if mask.sum() < _MIN_OBJECT_PIXELS:
            spots |= mask & (mask.sum() >= _MIN_SPOT_PIXELS)
            continue
        rows, columns = np.nonzero(mask)
        inner = ndimage.binary_erosion(mask)
        inside = pixels[inner if inner.sum() >= 20 else mask]
        colour = _read_colour(inside, object_class)
        # Two pixels around it belong to its soft edge, if not to another object.
        support = ndimage.binary_dilation(mask, iterations=2) & (mask | ~foreground)
        axis = np.median(inside, axis=0) - BACKGROUND
        coverage = np.clip((pixels - BACKGROUND) @ axis / max(float(axis @ axis), 1.0), 0.0, 1.0)
        shape = _read_shape(np.where(support, coverage, 0.0), object_class.shapes)
        found.append(FoundObject(colour, shape, (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2))
    if spots.sum() >= _MIN_OBJECT_PIXELS:
        rows, columns = np.nonzero(spots)
        found.append(FoundObject(None, None, float(columns.mean()), float(rows.mean())))
    return found


def read_scene(image: Image.Image, object_class: type[SceneObject] = SceneObject) -> Scene | None:
    """The canonical scene in `image`; `None` if it does not show one or two clear objects, see [`read_objects`]."""
    objects = read_objects(image, object_class)
    if len(objects) not in (1, 2):
        return None
    items = []
    for item in objects:
        if item.colour is None or item.shape is None:
            return None
        items.append(object_class(item.colour, item.shape))
    if len(objects) == 1:
        return Scene((items[0],))
    return Scene((items[0], items[1]), _relation(*objects)).canonical


def read_digit(image: Image.Image) -> int | None:
    """The digit in `image`, 0 to 9, according to a classifier of real handwriting; `None` if no real digit is similar.

    An image is similar to another if, at 8x8 pixels from 0 (background) to 1 (white), their Euclidean distance is at
    most 1.5.

    Raises:
        `ValueError`: if the image is not 64x64.
    """
    classifier, known = _digit_classifier()
    features = _digit_features(image)
    if np.linalg.norm(known - features, axis=1).min() > _MAX_DIGIT_DISTANCE:
        return None
    return int(classifier.predict(features[None])[0])


def find_errors(image: Image.Image, prompt: str) -> tuple[str, ...]:
    """In what `image` differs from what `prompt` describes.

    The objects are compared in the order in which fewest things are wrong.

    Args:
        image (`PIL.Image.Image`): 64x64.
        prompt (`str`): a prompt of the tiny world.

    Returns:
        `tuple[str, ...]`: each of these at most once, in this order; empty if the image shows what it should.

            - `"missing"`, `"extra"`: it has fewer or more objects.
            - `"colour"`, `"shape"`: an object has another one, or an unclear one.
            - `"relation"`: the objects are elsewhere.
            - `"digit"`: it is another digit, or none.

    Raises:
        `ValueError`: if `prompt` is not a prompt of the tiny world, or the image is not 64x64.
    """
    from .questions import parse_prompt

    expected = parse_prompt(prompt)
    if isinstance(expected, Scene):
        return _scene_errors(read_objects(image), expected)
    return () if read_digit(image) == expected else ("digit",)


def shows(image: Image.Image, prompt: str) -> bool:
    """Whether `image` shows what `prompt` (a prompt of the tiny world) describes, and nothing else.

    Raises:
        `ValueError`: if `prompt` is not a prompt of the tiny world, or the image is not 64x64.
    """
    return not find_errors(image, prompt)


def _scene_errors(found: list[FoundObject], scene: Scene) -> tuple[str, ...]:
    counted = []
    if len(found) < len(scene.objects):
        counted.append("missing")
    elif len(found) > len(scene.objects):
        counted.append("extra")
    paired: list[list[str]] = []
    for chosen in permutations(found, min(len(found), len(scene.objects))):
        for items in permutations(scene.objects, len(chosen)) if len(chosen) < len(scene.objects) else [scene.objects]:
            errors = [
                name
                for item, seen in zip(items, chosen)
                for name in ("colour", "shape")
                if getattr(item, name) != getattr(seen, name)
            ]
            if len(chosen) == 2 and _relation(*chosen) != scene.relation:
                errors.append("relation")
            paired.append(errors)
    errors = counted + min(paired, key=len, default=[])
    return tuple(name for name in ERRORS if name in errors)


def _relation(first: FoundObject, second: FoundObject) -> str:
    """Of the first object to the second, along the axis on which their centres are farther apart."""
    x, y = first.x - second.x, first.y - second.y
    step = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)) or -1)
    return next(name for name, (_, direction) in RELATIONS.items() if direction == step)


def _pixels(image: Image.Image) -> np.ndarray:
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"an image of the tiny world must be {IMAGE_SIZE}x{IMAGE_SIZE}, got {image.size}.")
    return np.asarray(image.convert("RGB")).astype(np.float32)


def _read_colour(inside: np.ndarray, object_class: type[SceneObject]) -> str | None:
    """The colour of an object from its inner pixels, `(number, 3)`; `None` if unclear."""
    palette = np.array(list(object_class.colours.values()), dtype=np.float32)
    votes = np.bincount(np.linalg.norm(inside[:, None] - palette, axis=-1).argmin(axis=1), minlength=len(palette))
    winner = int(votes.argmax())
    distance = np.linalg.norm(np.median(inside, axis=0) - palette[winner])
    is_clear = votes[winner] >= 0.8 * len(inside) and distance <= _MAX_COLOUR_DISTANCE
    return list(object_class.colours)[winner] if is_clear else None


def _read_shape(coverage: np.ndarray, shapes: tuple[str, ...]) -> str | None:
    """The shape of an object from the share of each pixel that it covers, `(64, 64)` in 0 to 1; `None` if unclear."""
    area = float(coverage.sum())
    centres = np.arange(IMAGE_SIZE) + 0.5
    x, y = float((coverage.sum(axis=0) @ centres) / area), float((coverage.sum(axis=1) @ centres) / area)
    deviations = {}
    for shape in shapes:
        unit_area, unit_length, unit_x, unit_y = _geometry(shape)
        size = np.sqrt(area / unit_area)
        ideal = _coverage(shape, x - unit_x * size, y - unit_y * size, size)
        # The area between two outlines is their mean distance times their length.
        deviations[shape] = float(np.abs(coverage - ideal).sum()) / (unit_length * size) / np.sqrt(area)
    best = min(deviations, key=deviations.__getitem__)
    return best if deviations[best] <= _MAX_DEVIATION else None


def _coverage(shape: str, x: float, y: float, size: float) -> np.ndarray:
    """The share of each pixel, 0 to 1, that a shape of half-extent `size` around (x, y) covers."""
    canvas = Image.new("L", (IMAGE_SIZE * _SUPERSAMPLING,) * 2)
    for polygon in outline(shape):
        points = [((x + size * px) * _SUPERSAMPLING, (y + size * py) * _SUPERSAMPLING) for px, py in polygon]
        ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


@lru_cache
def _geometry(shape: str) -> tuple[float, float, float, float]:
    """The area of a shape of half-extent 1, the length of its outline, and its centroid (x, y)."""
    centre, size = IMAGE_SIZE / 2, IMAGE_SIZE / 2 - 4
    coverage = _coverage(shape, centre, centre, size)
    area = coverage.sum()
    centres = np.arange(IMAGE_SIZE) + 0.5
    # The gradient of the coverage, summed over the pixels, is the length of the outline.
    length = np.hypot(*np.gradient(coverage)).sum()
    x, y = coverage.sum(axis=0) @ centres / area, coverage.sum(axis=1) @ centres / area
    return (
        float(area / size**2),
        float(length / size),
        float((x - centre) / size),
        float((y - centre) / size),
    )


def _digit_features(image: Image.Image) -> np.ndarray:
    """Brightness of the image at the digits' original 8x8 resolution, flattened, in [0, 1]."""
    ink = (_pixels(image).mean(axis=-1) - np.mean(BACKGROUND)) / (240 - np.mean(BACKGROUND))
    return ink.reshape(8, 8, 8, 8).mean(axis=(1, 3)).reshape(-1)


@lru_cache(maxsize=1)
def _digit_classifier():
    """A classifier fitted to the training digits, and what it was fitted to: `(number, 64)`."""
    from sklearn.svm import SVC

    indices = digit_indices(held_out=False)
    rng = np.random.default_rng(0)
    # Each digit once unchanged and three times augmented, for robustness to small rotations and shifts.
    images = [draw_digit(int(i), None if copy == 0 else rng) for copy in range(4) for i in indices]
    features = np.stack([_digit_features(image) for image in images])
    return SVC(gamma="scale", C=10.0).fit(features, np.tile(load_digits()[1][indices], 4)), features
