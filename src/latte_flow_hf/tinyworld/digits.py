# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The real half of the tiny world: the 1,797 handwritten digits of the UCI data set included in scikit-learn.

They are 8x8 images of 17 grey levels, enlarged smoothly to 64x64.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from .shapes import BACKGROUND, COLOURS, IMAGE_SIZE


DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@lru_cache(maxsize=1)
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, `(1797, 8, 8)` in [0, 1], and their values, `(1797,)` in 0 to 9."""
    from sklearn.datasets import load_digits as sklearn_load_digits

    bunch = sklearn_load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target


def digit_indices(held_out: bool) -> np.ndarray:
    """The indices of the digits excluded from training (every fifth), or of all the others."""
    indices = np.arange(len(load_digits()[1]))
    return indices[(indices % 5 == 0) == held_out]


def digit_prompt(value: int) -> str:
    """`a handwritten seven`."""
    return f"a handwritten {DIGIT_NAMES[value]}"


def draw_digit(index: int, rng: np.random.Generator | None = None, jitter: float = 1.0) -> Image.Image:
    """Digit number `index` as an RGB image of 64x64 pixels, white on the dark background.

    Args:
        index (`int`): 0 to 1796.
        rng (`np.random.Generator`, *optional*):
            If given, the digit is slightly rotated, scaled, sheared and shifted, as augmentation. Without it the image
            is only enlarged.
        jitter (`float`, defaults to 1.0):
            Strength of the augmentation: 1 allows 10 degrees, 8% of scale, a shear of 0.1 and 3 pixels.

    Raises:
        `ValueError`: if `index` is out of range.
    """
    images, _ = load_digits()
    if not 0 <= index < len(images):
        raise ValueError(f"index must be from 0 to {len(images) - 1}, got {index}.")
    ink = Image.fromarray(images[index]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    if rng is not None and jitter > 0:
        angle = np.deg2rad(rng.uniform(-10, 10) * jitter)
        scale = 1 + rng.uniform(-0.08, 0.08) * jitter
        shear = rng.uniform(-0.1, 0.1) * jitter
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / scale
        centre = np.full(2, IMAGE_SIZE / 2)
        offset = centre - matrix @ (centre + rng.uniform(-3, 3, size=2) * jitter)
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        ink = ink.transform(ink.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    amount = np.clip(np.asarray(ink), 0.0, 1.0)[..., None]
    background, white = np.array(BACKGROUND), np.array(COLOURS["white"])
    return Image.fromarray(np.round(background + amount * (white - background)).astype(np.uint8))
