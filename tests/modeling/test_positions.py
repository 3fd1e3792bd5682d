# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Positions of the latent tokens against their closed forms."""

import math

import pytest
import torch

from latte_flow_hf.modeling.positions import interleaved_rotary_embedding, sincos_pos_embed


def wave(position: float, size: int) -> list[float]:
    angles = [position / 10000 ** (2 * i / size) for i in range(size // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 2)])
def test_sincos_embedding_is_the_column_then_the_row(height, width):
    found = sincos_pos_embed(8, height, width)
    expected = torch.tensor([wave(column, 4) + wave(row, 4) for row in range(height) for column in range(width)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert sincos_pos_embed(8, height, width, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (3, 2)])
def test_rotary_frequencies_alternate_between_row_and_column(height, width):
    def rotary_emb(positions):
        angles = positions[..., None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    next_position = torch.tensor([5, 9])
    cos, sin = interleaved_rotary_embedding(rotary_emb, next_position, height, width)
    for image, start in enumerate(next_position.tolist()):
        for token in range(height * width):
            row, column = start + token // width, start + token % width
            angles = torch.tensor([row * 1.0, column * 0.5, row * 0.25, column * 0.125]).repeat(2)
            torch.testing.assert_close(cos[image, token], angles.cos())
            torch.testing.assert_close(sin[image, token], angles.sin())
