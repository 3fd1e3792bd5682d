# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How often the oracle of the tiny world is right: about drawn images, about real digits that it has not seen, and
about images that are wrong on purpose.

    python benchmarks/oracle.py

An image that is wrong on purpose is drawn for a prompt, but differs from what the prompt says in one way. The ways
change the drawing; none of them looks at what the oracle measures.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from latte_flow_hf.tinyworld.digits import digit_indices, draw_digit, load_digits
from latte_flow_hf.tinyworld.oracle import read_digit, read_scene, shows
from latte_flow_hf.tinyworld.shapes import (
    ALL_OBJECTS,
    BACKGROUND,
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
    outline,
    place_objects,
    sample_scene,
)


# A colour and where it is: the mask has `_SCALE` rows and columns per pixel.
Layer = tuple[tuple[int, int, int], np.ndarray]
_SCALE = 4
_ROWS, _COLUMNS = np.mgrid[: IMAGE_SIZE * _SCALE, : IMAGE_SIZE * _SCALE] / _SCALE + 0.5 / _SCALE


def sample_drawn(index: int, rng: np.random.Generator) -> Scene:
    """One object and two objects in turn; in every fourth image one of the two is a held-out pair."""
    return sample_scene(rng, 1 + index % 2, held_out=index % 4 == 3)


def _mask(shape: str, x: float, y: float, size: float) -> np.ndarray:
    canvas = Image.new("1", (IMAGE_SIZE * _SCALE,) * 2)
    for polygon in outline(shape):
        points = [((x + size * px) * _SCALE, (y + size * py) * _SCALE) for px, py in polygon]
        ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas)


def _render(layers: list[Layer]) -> Image.Image:
    """The layers over the background, each over those before it, antialiased as `draw_scene` does."""
    canvas = np.empty((*_ROWS.shape, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    for colour, mask in layers:
        canvas[mask] = colour
    return Image.fromarray(canvas).reduce(_SCALE)


def _layers(scene: Scene, positions: list[tuple[float, float, float]]) -> list[Layer]:
    return [(COLOURS[item.colour], _mask(item.shape, *position)) for item, position in zip(scene.objects, positions)]


def _one_of(values, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


def _replace_one(scene: Scene, rng: np.random.Generator, **values: tuple[str, ...]) -> Scene:
    """The scene with another of `values` in one of its objects."""
    ((attribute, choices),) = values.items()
    objects = list(scene.objects)
    index = int(rng.integers(len(objects)))
    other = _one_of([value for value in choices if value != getattr(objects[index], attribute)], rng)
    objects[index] = replace(objects[index], **{attribute: other})
    return replace(scene, objects=tuple(objects))


def wrong_colour(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object has another colour of the world."""
    wrong = _replace_one(scene, rng, colour=tuple(COLOURS))
    return draw_scene(wrong, place_objects(wrong, rng))


def wrong_shape(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object has another shape of the world."""
    wrong = _replace_one(scene, rng, shape=SHAPES)
    return draw_scene(wrong, place_objects(wrong, rng))


def swapped_relation(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The two objects are in each other's place."""
    wrong = Scene(scene.objects, scene.converse)
    return draw_scene(wrong, place_objects(wrong, rng))


def other_axis(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One object is above the other instead of beside it, or beside it instead of above."""
    is_beside = scene.relation in ("left of", "right of")
    wrong = Scene(scene.objects, _one_of(("above", "below") if is_beside else ("left of", "right of"), rng))
    return draw_scene(wrong, place_objects(wrong, rng))


def swapped_colours(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The two objects, of different shapes and colours, have each other's colour."""
    first, second = scene.objects
    wrong = Scene((replace(first, colour=second.colour), replace(second, colour=first.colour)), scene.relation)
    return draw_scene(wrong, place_objects(wrong, rng))


def missing_object(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object is not there."""
    layers = _layers(scene, place_objects(scene, rng))
    del layers[int(rng.integers(len(layers)))]
    return _render(layers)


def extra_object(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """There is one more object, any one, at least 4 pixels from the others."""
    while True:
        positions = place_objects(scene, rng)
        for _ in range(50):
            size = rng.uniform(8, 11.5)
            x, y = rng.uniform(2 + size, IMAGE_SIZE - 2 - size, size=2)
            if all(max(abs(x - a), abs(y - b)) > size + other + 4 for a, b, other in positions):
                extra = _one_of(ALL_OBJECTS, rng)
                return _render([*_layers(scene, positions), *_layers(Scene((extra,)), [(x, y, size)])])


def spots(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """There are 5 to 12 squares of 3 to 6 pixels in any colours, at least 2 pixels from the objects and each other."""
    while True:
        positions, layers = place_objects(scene, rng), []
        taken, number = list(positions), int(rng.integers(5, 13))
        for _ in range(200):
            half = rng.integers(3, 7) / 2
            x, y = rng.uniform(half, IMAGE_SIZE - half, size=2)
            if all(max(abs(x - a), abs(y - b)) > half + other + 2 for a, b, other in taken):
                taken.append((x, y, half))
                mask = (abs(_COLUMNS - x) < half) & (abs(_ROWS - y) < half)
                layers.append((COLOURS[_one_of(tuple(COLOURS), rng)], mask))
            if len(layers) == number:
                return _render([*_layers(scene, positions), *layers])


def _redraw_one(
    scene: Scene,
    rng: np.random.Generator,
    redraw: Callable[[SceneObject, float, float, float], tuple[tuple[int, int, int], np.ndarray]],
) -> Image.Image:
    """The scene with one object in the colour and the mask that `redraw` returns for it and its position."""
    positions = place_objects(scene, rng)
    layers = _layers(scene, positions)
    index = int(rng.integers(len(layers)))
    layers[index] = redraw(scene.objects[index], *positions[index])
    return _render(layers)


def ellipse(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object is a blob: an ellipse, 1.5 to 2.5 times as long as wide, at any angle."""
    ratio, turn = rng.uniform(1.5, 2.5), rng.uniform(0, np.pi)

    def redraw(item, x, y, size):
        along = (_COLUMNS - x) * np.cos(turn) + (_ROWS - y) * np.sin(turn)
        across = (_ROWS - y) * np.cos(turn) - (_COLUMNS - x) * np.sin(turn)
        return COLOURS[item.colour], along**2 + (ratio * across) ** 2 < size**2

    return _redraw_one(scene, rng, redraw)


def lump(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object is a blob with 3, 5 or 6 lobes; with 4 it may be a cross."""
    waves, phases = _one_of((3, 5, 6), rng), rng.uniform(0, 2 * np.pi, size=2)

    def redraw(item, x, y, size):
        angles = np.arctan2(_ROWS - y, _COLUMNS - x)
        radii = 1 + 0.5 * np.sin(waves * angles + phases[0]) + 0.25 * np.sin(2 * angles + phases[1])
        return COLOURS[item.colour], np.hypot(_ROWS - y, _COLUMNS - x) < size * radii / 1.75

    return _redraw_one(scene, rng, redraw)


def noise_blob(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object is a blob: a disc of pixels with random colours."""
    positions = place_objects(scene, rng)
    index = int(rng.integers(len(positions)))
    layers = _layers(scene, positions)
    del layers[index]
    pixels = np.array(_render(layers))
    x, y, size = positions[index]
    centres = np.arange(IMAGE_SIZE) + 0.5
    is_inside = np.hypot(centres[None] - x, centres[:, None] - y) < size
    pixels[is_inside] = rng.integers(0, 256, (int(is_inside.sum()), 3))
    return Image.fromarray(pixels)


def merged(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Two objects overlap by a quarter to a half of their width; of a single one there is a second in this place."""
    if len(scene.objects) == 1:
        scene = Scene(scene.objects * 2, _one_of(tuple(RELATIONS), rng))
    (x1, y1, size1), (x2, y2, size2) = place_objects(scene, rng)
    share = rng.uniform(0.5, 0.75) * (size1 + size2) / np.hypot(x1 - x2, y1 - y2)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    positions = [
        (x + share * (x1 - x), y + share * (y1 - y), size1),
        (x + share * (x2 - x), y + share * (y2 - y), size2),
    ]
    return _render(_layers(scene, positions))


def half_drawn(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Of an object one half is missing: the left, the right or the upper one (below it, a triangle is left)."""
    half = _one_of(("left", "right", "upper"), rng)

    def redraw(item, x, y, size):
        is_kept = {"left": x < _COLUMNS, "right": x > _COLUMNS, "upper": y < _ROWS}[half]
        return COLOURS[item.colour], _mask(item.shape, x, y, size) & is_kept

    return _redraw_one(scene, rng, redraw)


def quarter_missing(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Of an object one quarter is missing, the upper left one for instance."""
    right, lower = rng.integers(2, size=2)

    def redraw(item, x, y, size):
        is_missing = ((x < _COLUMNS) == right) & ((y < _ROWS) == lower)
        return COLOURS[item.colour], _mask(item.shape, x, y, size) & ~is_missing

    return _redraw_one(scene, rng, redraw)


def colour_between(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """An object has the mean of its colour and another one."""

    def redraw(item, x, y, size):
        other = _one_of([name for name in COLOURS if name != item.colour], rng)
        mean = tuple((a + b) // 2 for a, b in zip(COLOURS[item.colour], COLOURS[other]))
        return mean, _mask(item.shape, x, y, size)

    return _redraw_one(scene, rng, redraw)


def two_colours(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One half of an object, the left or the upper one, has another colour."""
    positions = place_objects(scene, rng)
    index, is_left = int(rng.integers(len(positions))), bool(rng.integers(2))
    item, (x, y, size) = scene.objects[index], positions[index]
    other = _one_of([name for name in COLOURS if name != item.colour], rng)
    half = _mask(item.shape, x, y, size) & ((x > _COLUMNS) if is_left else (y > _ROWS))
    return _render([*_layers(scene, positions), (COLOURS[other], half)])


# Ways of being wrong, by the number of objects of the scenes that they apply to.
WRONG: dict[str, tuple[Callable[[Scene, np.random.Generator], Image.Image], tuple[int, ...]]] = {
    "wrong colour": (wrong_colour, (1, 2)),
    "wrong shape": (wrong_shape, (1, 2)),
    "swapped relation": (swapped_relation, (2,)),
    "relation on the other axis": (other_axis, (2,)),
    "swapped colours": (swapped_colours, (2,)),
    "missing object": (missing_object, (1, 2)),
    "extra object": (extra_object, (1, 2)),
    "blob: ellipse": (ellipse, (1, 2)),
    "blob: lump": (lump, (1, 2)),
    "blob: noise": (noise_blob, (1, 2)),
    "blob: merged objects": (merged, (1, 2)),
    "half drawn": (half_drawn, (1, 2)),
    "quarter missing": (quarter_missing, (1, 2)),
    "colour between two": (colour_between, (1, 2)),
    "two colours": (two_colours, (1, 2)),
    "spots": (spots, (1, 2)),
}


def draw_wrong(kind: str, number: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """`number` prompts, each with an image that is wrong in the way `kind`."""
    draw, num_objects = WRONG[kind]
    rng = np.random.default_rng((seed, list(WRONG).index(kind)))
    for index in range(number):
        scene = sample_scene(rng, num_objects[index % len(num_objects)])
        while kind == "swapped colours" and (
            scene.objects[0].colour == scene.objects[1].colour or scene.objects[0].shape == scene.objects[1].shape
        ):
            scene = sample_scene(rng, 2)
        yield scene.prompt, draw(scene, rng)


def share_read(number: int, seed: int) -> float:
    """The share of `number` drawn images that the oracle reads as what they were drawn from."""
    rng = np.random.default_rng(seed)
    scenes = [sample_drawn(index, rng) for index in range(number)]
    return float(np.mean([read_scene(draw_scene(it, place_objects(it, rng))) == it.canonical for it in scenes]))


def share_refused(kind: str, number: int, seed: int) -> float:
    """The share of `number` images, wrong in the way `kind`, that the oracle calls wrong."""
    return float(np.mean([not shows(image, prompt) for prompt, image in draw_wrong(kind, number, seed)]))


def digits_read() -> dict[str, float]:
    """Of the held-out digits: the share whose value is read, and the share of wrong values that are refused."""
    values, indices = load_digits()[1], digit_indices(held_out=True)
    read = [read_digit(draw_digit(int(index))) for index in indices]
    right = [value == values[index] for index, value in zip(indices, read)]
    # Each image is refused for all of the nine wrong values but the one that is read, if it is wrong.
    refused = [9 - (value is not None and not is_right) for value, is_right in zip(read, right)]
    return {"right": float(np.mean(right)), "refused": float(np.mean(refused)) / 9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=5000, help="drawn images")
    parser.add_argument("--num-wrong", type=int, default=1000, help="wrong images of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    digits = digits_read()
    num_digits = len(digit_indices(held_out=True))
    print("| Images | Number | The oracle says | Share |\n|---|---|---|---|")
    print(
        f"| drawn scenes | {arguments.num_images} | right | {share_read(arguments.num_images, arguments.seed):.2%} |"
    )
    print(f"| held-out digits | {num_digits} | right | {digits['right']:.2%} |")
    print(f"| held-out digits, wrong values | {9 * num_digits} | wrong | {digits['refused']:.2%} |")
    for kind in WRONG:
        share = share_refused(kind, arguments.num_wrong, arguments.seed)
        print(f"| {kind} | {arguments.num_wrong} | wrong | {share:.2%} |")


if __name__ == "__main__":
    main()
