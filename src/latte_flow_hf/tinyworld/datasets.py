# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Training data of the tiny world. Each example is drawn on access and depends on a seed and its index alone.

Held-out digits and two-object images with a held-out pair never appear.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digits import digit_indices, digit_prompt, draw_digit, load_digits
from .questions import practice_questions, questions_about
from .shapes import (
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    Scene,
    draw_doodle,
    draw_scene,
    place_objects,
    sample_scene,
)


@dataclass(frozen=True)
class Example:
    """An image with what it shows (a scene, or a digit's value), its prompt, and the positions of its objects.

    The positions are those of `place_objects`; a digit has none, it fills the image.
    """

    image: Image.Image
    content: Scene | int
    prompt: str
    positions: list[tuple[float, float, float]]


def draw_example(
    rng: np.random.Generator, digit_share: float = 0.3, single_share: float = 1 / 3, jitter: float = 1.0
) -> Example:
    """Draw a training image: a digit, or a scene of one (`single_share` of the scenes) or two objects."""
    if rng.random() < digit_share:
        index = int(rng.choice(digit_indices(held_out=False)))
        value = int(load_digits()[1][index])
        return Example(draw_digit(index, rng, jitter), value, digit_prompt(value), [])
    scene = sample_scene(rng, 1 if rng.random() < single_share else 2)
    positions = place_objects(scene, rng)
    return Example(draw_scene(scene, positions), scene, scene.prompt, positions)


def vary_prompt(prompt: str, rng: np.random.Generator) -> str:
    """Augment a prompt: in one case of five, perhaps with a capital letter, a full stop or without the article."""
    if rng.random() < 0.8:
        return prompt
    if rng.random() < 0.3:
        prompt = prompt.removeprefix("a ")
    if rng.random() < 0.5:
        prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.5:
        prompt = prompt + "."
    return prompt


class TinyWorldImages(Dataset):
    """Images with prompts, as `{"image", "prompt"}`.

    Args:
        seed (`int`): example `i` depends on `seed` and `i` alone.
        num_images (`int`, defaults to 1000): how many there are.
        digit_share (`float`, defaults to 0.3): the share of handwritten digits, 0 to 1.
        single_share (`float`, defaults to 1/3): the share of scenes with a single object, 0 to 1.
    """

    def __init__(self, seed: int, num_images: int = 1000, digit_share: float = 0.3, single_share: float = 1 / 3):
        self.seed, self.num_images = seed, num_images
        self.digit_share, self.single_share = digit_share, single_share

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        example = draw_example(rng, self.digit_share, self.single_share, jitter=0.5)
        return {"image": example.image, "prompt": vary_prompt(example.prompt, rng)}


class DoodleImages(Dataset):
    """`num_images` images of random polygons, as `{"image"}`; example `i` depends on `seed` and `i` alone."""

    def __init__(self, seed: int, num_images: int):
        self.seed, self.num_images = seed, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        return {"image": draw_doodle(np.random.default_rng((self.seed, index)))}


class LabelledImages(Dataset):
    """`num_images` images as `{"image", "cells"}`, with labels of each cell of a `grid` x `grid` raster, row by row.

    `cells` has shape (grid * grid, 4), with the columns

    - colour: that of the object whose bounding box covers most of the cell, at least a quarter (0 to 5, by `COLOURS`);
      6 for a digit, which fills the image; 7 for the background;
    - shape: that of the same object (0 to 3, by `SHAPES`), the digit (4 to 13), or the background (14);
    - role: the relation of that object to the other one (0 to 3, by `RELATIONS`), or 4 if there is none;
    - position: the index of the cell, because the vision tower only encodes relative positions.
    """

    def __init__(self, seed: int, num_images: int, grid: int):
        self.seed, self.num_images, self.grid = seed, num_images, grid

    @property
    def num_labels(self) -> tuple[int, int, int, int]:
        """The number of labels in each column."""
        return len(COLOURS) + 2, len(SHAPES) + 10 + 1, len(RELATIONS) + 1, self.grid**2

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        example = draw_example(np.random.default_rng((self.seed, index)), digit_share=0.4, jitter=1.3)
        # The last label of each is the background.
        colour, shape, role = (np.full((self.grid, self.grid), count - 1) for count in self.num_labels[:3])
        if isinstance(example.content, Scene):
            largest = np.full((self.grid, self.grid), 0.25)
            edges = np.linspace(0, IMAGE_SIZE, self.grid + 1)
            roles = [len(RELATIONS)]
            if example.content.relation is not None:
                roles = [list(RELATIONS).index(r) for r in (example.content.relation, example.content.converse)]
            for item, (x, y, size), object_role in zip(example.content.objects, example.positions, roles):
                covered = np.outer(_covered(edges, y - size, y + size), _covered(edges, x - size, x + size))
                visible = covered > largest
                colour[visible] = list(COLOURS).index(item.colour)
                shape[visible] = SHAPES.index(item.shape)
                role[visible] = object_role
                largest = np.maximum(largest, covered)
        else:
            colour[:] = len(COLOURS)
            shape[:] = len(SHAPES) + example.content
        position = np.arange(self.grid**2)
        cells = np.stack([colour.reshape(-1), shape.reshape(-1), role.reshape(-1), position], axis=-1)
        return {"image": example.image, "cells": cells}


def _covered(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """The fraction of each interval between `edges` that is in [low, high]."""
    inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(inside, 0, None) / np.diff(edges)


class Conversations(Dataset):
    """Conversations about images, or about sentences, as `{"messages"}`.

    In a conversation about a sentence the user describes a scene, the assistant repeats the description in its
    canonical form (`left of` or `above`), and the questions are about that scene. This trains the backbone on the
    prompts of image generation.

    Args:
        seed (`int`): example `i` depends on `seed` and `i` alone.
        num_conversations (`int`, defaults to 1000): how many there are.
        text_share (`float`, defaults to 0.3): the share of conversations about a sentence, 0 to 1.
        turns (`int`, defaults to 6): questions per conversation; the same for all, so that little is padded.
        digit_share (`float`, defaults to 0.35): the share of handwritten digits, 0 to 1.
        single_share (`float`, defaults to 1/3): the share of scenes with a single object, 0 to 1.
        practice (`bool`, defaults to `True`): whether to add the easier questions of `practice_questions`.
    """

    def __init__(
        self,
        seed: int,
        num_conversations: int = 1000,
        text_share: float = 0.3,
        turns: int = 6,
        digit_share: float = 0.35,
        single_share: float = 1 / 3,
        practice: bool = True,
    ):
        self.seed, self.num_conversations, self.text_share, self.turns = seed, num_conversations, text_share, turns
        self.digit_share, self.single_share, self.practice = digit_share, single_share, practice

    def __len__(self) -> int:
        return self.num_conversations

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        example = draw_example(rng, self.digit_share, self.single_share, jitter=1.3)
        more_questions = practice_questions if self.practice else questions_about
        questions = questions_about(example.content, rng) + more_questions(example.content, rng)
        questions = [questions[i] for i in rng.permutation(len(questions))[: self.turns]]
        turns = [(vary_question(item.question, rng), item.answer) for item in questions]
        if rng.random() >= self.text_share:
            messages = _turns_to_messages(turns)
            messages[0]["content"].insert(0, {"type": "image", "image": example.image})
            return {"messages": messages}
        description = example.content.canonical.prompt if isinstance(example.content, Scene) else example.prompt
        return {"messages": _turns_to_messages([(vary_prompt(example.prompt, rng), description), *turns[1:]])}


def vary_question(question: str, rng: np.random.Generator) -> str:
    """Augment a question: sometimes with a capital letter or without its question mark."""
    if rng.random() < 0.3:
        question = question[0].upper() + question[1:]
    return question.removesuffix("?") if rng.random() < 0.1 else question


def _turns_to_messages(turns: list[tuple[str, str]]) -> list[dict]:
    messages: list[dict] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
