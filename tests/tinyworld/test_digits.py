"""The digits are loaded completely, held out by a fixed rule, and stay readable when augmented."""

import numpy as np
import pytest

from latte_flow_hf.tinyworld.digits import digit_indices, digit_prompt, draw_digit, load_digits
from latte_flow_hf.tinyworld.oracle import read_digit


def test_every_fifth_digit_is_held_out():
    held_out, seen = digit_indices(held_out=True), digit_indices(held_out=False)
    assert set(held_out) == set(range(0, 1797, 5))
    assert set(held_out) | set(seen) == set(range(1797)) and not set(held_out) & set(seen)


def test_the_classifier_reads_held_out_handwriting():
    _, values = load_digits()
    right = [read_digit(draw_digit(int(i))) == values[i] for i in digit_indices(held_out=True)]
    assert np.mean(right) >= 0.98


def test_enlarging_keeps_the_brightness():
    images, _ = load_digits()
    pixels = np.asarray(draw_digit(3), dtype=np.float32)
    brightness = (pixels.mean(-1) - 21.33) / (240 - 21.33)
    assert np.abs(brightness.reshape(8, 8, 8, 8).mean((1, 3)) - images[3]).max() < 0.2


def test_jitter_moves_a_digit_but_keeps_it_readable():
    _, values = load_digits()
    rng = np.random.default_rng(0)
    drawn = [draw_digit(i, rng, jitter=0.5) for i in range(1, 101)]
    assert all(np.asarray(a).tobytes() != np.asarray(draw_digit(i)).tobytes() for i, a in enumerate(drawn, 1))
    assert np.mean([read_digit(a) == values[i] for i, a in enumerate(drawn, 1)]) >= 0.98


def test_an_index_outside_the_set_is_refused():
    with pytest.raises(ValueError, match="index must be from 0 to 1796, got 1797"):
        draw_digit(1797)


def test_prompts_are_in_words():
    assert digit_prompt(7) == "a handwritten seven"
