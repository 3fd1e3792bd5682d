# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Training examples of the tiny world, each a function of a seed and an index: nothing is stored, any order resumes.

Neither held-out digits nor two-object pictures with a held-out pair can come out of here.
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
    """A picture, what it shows (a scene, or a digit's value), the prompt that paints it, and where its objects are.

    Places are as `place_objects` gives them; a digit has none, it fills the picture.
    """

    image: Image.Image
    content: Scene | int
    prompt: str
    places: list[tuple[float, float, float]]


def draw_example(
    rng: np.random.Generator, digit_share: float = 0.3, single_share: float = 1 / 3, jitter: float = 1.0
) -> Example:
    """A training picture: a digit, or a scene of one (`single_share` of the scenes) or two objects."""
    if rng.random() < digit_share:
        index = int(rng.choice(digit_indices(held_out=False)))
        value = int(load_digits()[1][index])
        return Example(draw_digit(index, rng, jitter), value, digit_prompt(value), [])
    scene = sample_scene(rng, 1 if rng.random() < single_share else 2)
    places = place_objects(scene, rng)
    return Example(draw_scene(scene, places), scene, scene.prompt, places)


def vary_prompt(prompt: str, rng: np.random.Generator) -> str:
    """The prompt as people type it: mostly plain, at times with a capital, a full stop or no article."""
    if rng.random() < 0.8:
        return prompt
    if rng.random() < 0.3:
        prompt = prompt.removeprefix("a ")
    if rng.random() < 0.5:
        prompt = prompt[0].upper() + prompt[1:]
    if rng.random() < 0.5:
        prompt = prompt + "."
    return prompt


class Pictures(Dataset):
    """`size` pictures as `{"image", "prompt"}`; example `i` depends on `seed` and `i` alone."""

    def __init__(self, seed: int, size: int, digit_share: float = 0.3, single_share: float = 1 / 3):
        self.seed, self.size, self.shares = seed, size, (digit_share, single_share)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        example = draw_example(rng, *self.shares, jitter=0.5)
        return {"image": example.image, "prompt": vary_prompt(example.prompt, rng)}


class Doodles(Dataset):
    """`size` pictures of polygons without a name as `{"image"}`; example `i` depends on `seed` and `i` alone."""

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"image": draw_doodle(np.random.default_rng((self.seed, index)))}


class LabelledPictures(Dataset):
    """`size` pictures as `{"image", "cells"}`: what each cell of a `grid` x `grid` raster shows, row by row.

    `cells` is (grid * grid, 4), by column:

    - colour of the object whose bounding box covers most of the cell, at least a quarter (0 to 5, by `COLOURS`), of a
      digit, which fills the picture (6), of the ground (7);
    - shape of it (0 to 3, by `SHAPES`), or the digit (4 to 13), or the ground (14);
    - role: how that object stands to the other one (0 to 3, by `RELATIONS`), or 4 if there is none;
    - where: the cell's own number, as the vision tower has relative positions alone.
    """

    def __init__(self, seed: int, size: int, grid: int):
        self.seed, self.size, self.grid = seed, size, grid

    @property
    def num_labels(self) -> tuple[int, int, int, int]:
        """How many labels each column knows."""
        return len(COLOURS) + 2, len(SHAPES) + 10 + 1, len(RELATIONS) + 1, self.grid**2

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        example = draw_example(np.random.default_rng((self.seed, index)), digit_share=0.4, jitter=1.3)
        # The last label of each is the ground's.
        colour, shape, role = (np.full((self.grid, self.grid), count - 1) for count in self.num_labels[:3])
        if isinstance(example.content, Scene):
            largest = np.full((self.grid, self.grid), 0.25)
            edges = np.linspace(0, IMAGE_SIZE, self.grid + 1)
            roles = [len(RELATIONS)]
            if example.content.relation is not None:
                roles = [list(RELATIONS).index(r) for r in (example.content.relation, example.content.converse)]
            for item, (x, y, size), its_role in zip(example.content.objects, example.places, roles):
                covered = np.outer(_covered(edges, y - size, y + size), _covered(edges, x - size, x + size))
                shown = covered > largest
                colour[shown] = list(COLOURS).index(item.colour)
                shape[shown] = SHAPES.index(item.shape)
                role[shown] = its_role
                largest = np.maximum(largest, covered)
        else:
            colour[:] = len(COLOURS)
            shape[:] = len(SHAPES) + example.content
        where = np.arange(self.grid**2)
        cells = np.stack([colour.reshape(-1), shape.reshape(-1), role.reshape(-1), where], axis=-1)
        return {"image": example.image, "cells": cells}


def _covered(edges: np.ndarray, low: float, high: float) -> np.ndarray:
    """The share of each interval between `edges` that lies in [low, high]."""
    inside = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    return np.clip(inside, 0, None) / np.diff(edges)


class Conversations(Dataset):
    """`size` conversations as `{"messages"}`: `turns` questions about a picture, or about a sentence.

    In `text_share` of them a sentence takes the picture's place: the user writes what they see, the assistant says it
    back in its canonical form (`left of` or `above`), and the questions are about that. It teaches the backbone to
    read the sentences that the tower will later paint. All have the same number of turns, so that little is padded.
    `digit_share` and `single_share` are those of `draw_example`; with `practice`, easy questions are among the hard.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        text_share: float = 0.3,
        turns: int = 6,
        digit_share: float = 0.35,
        single_share: float = 1 / 3,
        practice: bool = True,
    ):
        self.seed, self.size, self.text_share, self.turns = seed, size, text_share, turns
        self.shares, self.practice = (digit_share, single_share), practice

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        example = draw_example(rng, *self.shares, jitter=1.3)
        more = practice_questions if self.practice else questions_about
        asked = questions_about(example.content, rng) + more(example.content, rng)
        asked = [asked[i] for i in rng.permutation(len(asked))[: self.turns]]
        turns = [(vary_question(item.question, rng), item.answer) for item in asked]
        if rng.random() >= self.text_share:
            messages = _turns_to_messages(turns)
            messages[0]["content"].insert(0, {"type": "image", "image": example.image})
            return {"messages": messages}
        said = example.content.canonical.prompt if isinstance(example.content, Scene) else example.prompt
        return {"messages": _turns_to_messages([(vary_prompt(example.prompt, rng), said), *turns[1:]])}


def vary_question(question: str, rng: np.random.Generator) -> str:
    """The question as people type it: at times with a capital, or without its question mark."""
    if rng.random() < 0.3:
        question = question[0].upper() + question[1:]
    return question.removesuffix("?") if rng.random() < 0.1 else question


def _turns_to_messages(turns: list[tuple[str, str]]) -> list[dict]:
    messages: list[dict] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
