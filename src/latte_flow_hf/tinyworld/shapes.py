# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The drawn half of the tiny world: one or two coloured shapes on a dark background, and the prompt for them.

A scene is the meaning (which shapes, which relation); an image is one of many drawings of it. All randomness comes
from the generator that the caller passes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw


IMAGE_SIZE = 64
BACKGROUND = (20, 20, 24)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Each relation with its converse and the unit step (x to the right, y down) from the second object to the first.
RELATIONS = {
    "left of": ("right of", (-1, 0)),
    "right of": ("left of", (1, 0)),
    "above": ("below", (0, -1)),
    "below": ("above", (0, 1)),
}

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape; `str()` gives `"red circle"`."""

    colour: str
    shape: str
    colours: ClassVar[dict[str, tuple[int, int, int]]] = COLOURS
    shapes: ClassVar[tuple[str, ...]] = SHAPES

    def __post_init__(self) -> None:
        if self.colour not in self.colours:
            raise ValueError(f"colour must be one of {list(self.colours)}, got {self.colour!r}.")
        if self.shape not in self.shapes:
            raise ValueError(f"shape must be one of {list(self.shapes)}, got {self.shape!r}.")

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether this pair never appears in a training image of two objects.

        Chosen: `(colour + 2 * shape) % 8 == 5` by index, which is one pair in eight, each with a different colour and
        shape: white circle, yellow square, green triangle. They do appear alone, so the test is of composition, not
        of new words.
        """
        return (list(self.colours).index(self.colour) + 2 * self.shapes.index(self.shape)) % 8 == 5


class WiderObject(SceneObject):
    """An object that may have a colour and a shape unknown to the embedded checkpoint, for training adapters."""

    colours = {**COLOURS, "orange": (240, 140, 30)}
    shapes = (*SHAPES, "star")


ALL_OBJECTS = tuple(SceneObject(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first stands in `relation` to the second."""

    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, got {len(self.objects)}.")
        if (self.relation is None) != (len(self.objects) == 1):
            raise ValueError(f"relation goes with two objects, got {self.relation!r} with {len(self.objects)}.")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"relation must be one of {list(RELATIONS)}, got {self.relation!r}.")

    @property
    def prompt(self) -> str:
        """The prompt for this scene: `a red circle`, `a red circle left of a blue square`."""
        return f" {self.relation} ".join(f"{'an' if str(item)[0] in 'aeiou' else 'a'} {item}" for item in self.objects)

    @property
    def converse(self) -> str:
        """The relation of the second object to the first."""
        assert self.relation is not None
        return RELATIONS[self.relation][0]

    @property
    def canonical(self) -> "Scene":
        """The same scene described with `left of` or `above`, so that equivalent scenes compare equal."""
        if self.relation in ("right of", "below"):
            return Scene(self.objects[::-1], self.converse)
        return self

    @property
    def held_out(self) -> bool:
        """Whether the scene is excluded from training: two objects, at least one of them a held-out pair."""
        return len(self.objects) == 2 and any(item.held_out for item in self.objects)


def sample_scene(rng: np.random.Generator, num_objects: int, held_out: bool = False) -> Scene:
    """Sample a scene of one or two (different) objects.

    Args:
        rng (`np.random.Generator`): the source of randomness.
        num_objects (`int`): 1 or 2.
        held_out (`bool`, defaults to `False`):
            With two objects: whether at least one must be a held-out pair (`True`) or none may be (`False`).
    """
    if num_objects == 1:
        return Scene((ALL_OBJECTS[rng.integers(len(ALL_OBJECTS))],))
    while True:
        first, second = rng.choice(len(ALL_OBJECTS), size=2, replace=False)
        relation = tuple(RELATIONS)[rng.integers(len(RELATIONS))]
        scene = Scene((ALL_OBJECTS[first], ALL_OBJECTS[second]), relation)
        if scene.held_out == held_out:
            return scene


def place_objects(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Sample the position of each object: (x, y, half-extent), in pixels.

    Half-extents are 11 to 20 for a single object, 8 to 11.5 for each of two. Of two objects the bounding boxes are at
    least 5 pixels apart along the axis of the relation.
    """
    margin = 2.0
    if scene.relation is None:
        size = rng.uniform(11, 20)
        x, y = rng.uniform(margin + size, IMAGE_SIZE - margin - size, size=2)
        return [(x, y, size)]
    _, (step_x, step_y) = RELATIONS[scene.relation]
    sizes = rng.uniform(8, 11.5, size=2)
    # `along` is the axis of the relation; the object with the smaller coordinate is first.
    order = (0, 1) if step_x + step_y < 0 else (1, 0)
    first, second = sizes[order[0]], sizes[order[1]]
    slack = IMAGE_SIZE - 2 * margin - 5.0 - 2 * first - 2 * second
    before, between = np.sort(rng.uniform(0, slack, size=2))
    along = np.empty(2)
    along[order[0]] = margin + before + first
    along[order[1]] = margin + between + 5.0 + 2 * first + second
    # Across that axis the two stay close to each other, so that the relation is unambiguous.
    across = IMAGE_SIZE / 2 + rng.uniform(-8, 8) + rng.uniform(-6, 6, size=2)
    across = np.clip(across, margin + sizes, IMAGE_SIZE - margin - sizes)
    xs, ys = (along, across) if step_x else (across, along)
    return [(float(x), float(y), float(size)) for x, y, size in zip(xs, ys, sizes)]


def draw_scene(scene: Scene, positions: list[tuple[float, float, float]]) -> Image.Image:
    """Draw `scene` with its objects at `positions`: an antialiased RGB image of 64x64 pixels."""
    canvas = Image.new("RGB", (IMAGE_SIZE * _SUPERSAMPLING,) * 2, BACKGROUND)
    drawing = ImageDraw.Draw(canvas)
    for item, (x, y, size) in zip(scene.objects, positions):
        _draw_object(drawing, item, x, y, size)
    return canvas.reduce(_SUPERSAMPLING)


def draw_doodle(rng: np.random.Generator) -> Image.Image:
    """Draw one to three random polygons, each with 3 to 12 corners, plain or spiky, in any RGB colour.

    Chosen: because an autoencoder trained on the world's six colours and four shapes alone cannot reconstruct a
    seventh colour or a fifth shape, and no adapter of the tower can compensate for that.
    """
    canvas = Image.new("RGB", (IMAGE_SIZE * _SUPERSAMPLING,) * 2, BACKGROUND)
    drawing = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 4)):
        corners = int(rng.integers(3, 13))
        if rng.random() < 0.5:
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        radii = rng.uniform(5, 22) * np.where(np.arange(corners) % 2 == 0, 1.0, rng.uniform(0.3, 1.0))
        x, y = rng.uniform(10, IMAGE_SIZE - 10, size=2)
        points = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=-1) * _SUPERSAMPLING
        drawing.polygon([tuple(point) for point in points.tolist()], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return canvas.reduce(_SUPERSAMPLING)


def _draw_object(drawing: ImageDraw.ImageDraw, item: SceneObject, x: float, y: float, size: float) -> None:
    fill = item.colours[item.colour]
    for polygon in outline(item.shape):
        points = [((x + size * px) * _SUPERSAMPLING, (y + size * py) * _SUPERSAMPLING) for px, py in polygon]
        drawing.polygon(points, fill=fill)


def outline(shape: str) -> list[list[tuple[float, float]]]:
    """The polygons of a shape with half-extent 1 around the origin (x to the right, y down)."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return [[(float(np.cos(a)), float(np.sin(a))) for a in angles]]
    if shape == "square":
        return [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]]
    if shape == "triangle":
        return [[(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]]
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return [[(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles)]]
    arm = 0.32
    return [[(-1, -arm), (1, -arm), (1, arm), (-1, arm)], [(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)]]
