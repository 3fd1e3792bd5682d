"""Held-out examples never appear in training data; examples do not depend on the order of access."""

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf.tinyworld.datasets import (
    Conversations,
    DoodleImages,
    LabelledImages,
    TinyWorldImages,
    draw_example,
)
from latte_flow_hf.tinyworld.digits import digit_indices, draw_digit
from latte_flow_hf.tinyworld.shapes import COLOURS, RELATIONS, SHAPES, Scene


def test_training_examples_contain_nothing_held_out():
    rng = np.random.default_rng(0)
    contents = [draw_example(rng, digit_share=0.2).content for _ in range(500)]
    assert not any(content.held_out for content in contents if isinstance(content, Scene))
    held_out = {draw_digit(int(i)).tobytes() for i in digit_indices(held_out=True)}
    plain = [draw_example(rng, digit_share=1.0, jitter=0.0).image.tobytes() for _ in range(500)]
    assert not held_out & set(plain)


def content(value):
    """An example with its images as bytes, for comparison."""
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    return [content(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", [TinyWorldImages, Conversations, DoodleImages])
def test_an_example_depends_on_seed_and_index_alone(kind):
    data, again, other = kind(3, 50), kind(3, 50), kind(4, 50)
    forward = [content(data[i]) for i in range(20)]
    backward = [content(again[i]) for i in reversed(range(20))]
    assert forward == backward[::-1] and len(data) == 50
    assert all(example != content(other[i]) for i, example in enumerate(forward))


def test_conversations_alternate_and_show_at_most_one_image():
    data = Conversations(0, 200)
    images = []
    for index in range(len(data)):
        messages = data[index]["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        images.append(sum(part["type"] == "image" for m in messages for part in m["content"]))
    assert set(images) == {0, 1} and 0.2 < images.count(0) / len(data) < 0.4


def test_cell_labels_match_the_image():
    data = LabelledImages(0, 100, grid=4)
    no_colour, no_shape, no_role = (count - 1 for count in data.num_labels[:3])
    num_kinds = no_shape + 1
    for index in range(100):
        example = data[index]
        colour, shape, role, position = example["cells"].reshape(4, 4, 4).transpose(2, 0, 1)
        assert (position.reshape(-1) == np.arange(16)).all()
        if (colour == len(COLOURS)).all():
            assert len(set(shape.flat)) == 1 and len(SHAPES) <= shape[0, 0] < no_shape and (role == no_role).all()
            continue
        assert ((colour == no_colour) == (shape == no_shape)).all() and (colour != len(COLOURS)).all()
        what = colour * num_kinds + shape
        no_object = no_colour * num_kinds + no_shape
        named = set(what.flat) - {no_object}
        assert 1 <= len(named) <= 2
        pixels = np.asarray(example["image"], dtype=np.float32)
        empty = np.abs(pixels - (20, 20, 24)).max(-1).reshape(4, 16, 4, 16).max((1, 3)) == 0
        assert (what[empty] == no_object).all() and (role[what == no_object] == no_role).all()
        if len(named) == 2:
            one, other = ((what == item).nonzero() for item in named)
            roles = [role[what == item][0] for item in named]
            relations = [list(RELATIONS)[number] for number in roles]
            assert relations[1] == RELATIONS[relations[0]][0]
            axis = 0 if relations[0] in ("above", "below") else 1
            comes_first = relations[0] in ("above", "left of")
            assert (one[axis].mean() < other[axis].mean()) == comes_first
