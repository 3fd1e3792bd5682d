# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What can be asked in the tiny world, and the right answers: sentences in, words out."""

from dataclasses import dataclass

import numpy as np

from .digits import DIGIT_NAMES, digit_prompt
from .shapes import ALL_OBJECTS, COLOURS, RELATIONS, SHAPES, Scene, SceneObject


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about a picture (or about a sentence that describes one) and its only right answer."""

    question: str
    answer: str
    kind: str


# Several wordings a kind, so that the model reads the question and not its position. The first is the plain one.
_WORDINGS = {
    "what": ("what is in the picture?", "what is this?", "what do you see?", "describe the picture."),
    "colour": ("what colour is the {shape}?", "what color is the {shape}?", "which colour is the {shape}?"),
    "colour_alone": ("what colour is it?", "what color is it?", "what colour is the {shape}?"),
    "shape": ("what shape is the {colour} object?", "which shape is {colour}?"),
    "shape_alone": ("what shape is it?", "which shape is it?", "what shape is the {colour} object?"),
    "count": ("how many objects are there?", "how many shapes are there?", "how many objects are in the picture?"),
    "exists": ("is there a {item}?", "is there a {item} in the picture?", "do you see a {item}?"),
    "digit": ("which digit is this?", "what digit is this?", "which digit is in the picture?", "what number is this?"),
    "relation": ("what is {relation} the {item}?", "which object is {relation} the {item}?"),
    "has_colour": ("is there anything {colour}?", "is anything {colour}?", "is there a {colour} object?"),
    "has_shape": ("is there a {shape}?", "is there a {shape} in the picture?", "do you see a {shape}?"),
    "has_digit": ("is this a {digit}?", "is it a {digit}?", "do you see a {digit}?"),
    "is_colour": ("is the {shape} {colour}?",),
    "is_shape": ("is the {colour} object a {shape}?",),
}


def parse_prompt(prompt: str) -> Scene | int:
    """The scene, or the digit's value, that a sentence of the tiny world names.

    Raises:
        `ValueError`: if `prompt` is no such sentence.
    """
    if prompt.startswith("a handwritten ") and prompt.removeprefix("a handwritten ") in DIGIT_NAMES:
        return DIGIT_NAMES.index(prompt.removeprefix("a handwritten "))
    for relation in RELATIONS:
        first, separator, second = prompt.partition(f" {relation} ")
        if separator:
            return Scene((_parse_object(first, prompt), _parse_object(second, prompt)), relation)
    return Scene((_parse_object(prompt, prompt),))


def _parse_object(text: str, prompt: str) -> SceneObject:
    words = text.split(" ")
    if len(words) != 3 or words[0] != "a" or words[1] not in COLOURS or words[2] not in SHAPES:
        raise ValueError(
            f"prompt {prompt!r} is no sentence of the tiny world; write `a COLOUR SHAPE`, two of them joined by one "
            f"of {list(RELATIONS)}, or `a handwritten DIGIT`; colours: {list(COLOURS)}, shapes: {list(SHAPES)}."
        )
    return SceneObject(words[1], words[2])


def questions_about(content: Scene | int, rng: np.random.Generator) -> list[QuestionAnswer]:
    """One question of each kind that has a single right answer for `content` (a scene, or a digit's value).

    Args:
        content (`Scene` or `int`): what the picture shows.
        rng (`np.random.Generator`): chooses wordings, objects, and which yes-or-no questions are answered yes.
    """
    if isinstance(content, Scene):
        return _about_scene(content.canonical, rng)
    return _about_digit(content, rng)


def practice_questions(content: Scene | int, rng: np.random.Generator) -> list[QuestionAnswer]:
    """More questions, for training alone: the hard kinds once more, and easy yes-or-no questions on the way to them.

    Without the easy ones a small model never finds out what `is there a red circle?` asks for.
    """
    if not isinstance(content, Scene):
        found = [_about_digit(content, rng)[-1] for _ in range(3)]
        for _ in range(2):
            digit = _digit_to_ask(content, rng)
            found.append(_ask("has_digit", _yes(digit == content), rng, digit=DIGIT_NAMES[digit]))
        return found
    scene = content.canonical
    found = [_ask_exists(scene, rng), _ask_exists(scene, rng)]
    for kind, attribute, values in (("has_colour", "colour", tuple(COLOURS)), ("has_shape", "shape", SHAPES)):
        there = [getattr(item, attribute) for item in scene.objects]
        asked = _present_or_absent(there, values, rng)
        found.append(_ask(kind, _yes(asked in there), rng, **{attribute: asked}))
    item = scene.objects[rng.integers(len(scene.objects))]
    colours = [other.colour for other in scene.objects]
    shapes = [other.shape for other in scene.objects]
    if shapes.count(item.shape) == 1:
        asked = _present_or_absent([item.colour], tuple(COLOURS), rng)
        found.append(_ask("is_colour", _yes(asked == item.colour), rng, shape=item.shape, colour=asked))
    if colours.count(item.colour) == 1:
        asked = _present_or_absent([item.shape], SHAPES, rng)
        found.append(_ask("is_shape", _yes(asked == item.shape), rng, shape=asked, colour=item.colour))
    if scene.relation is not None:
        found.append(_ask_relation(scene, rng))
    return found


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _present_or_absent(there: list[str], values: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of `there`, or as often one of the other `values`."""
    choices = there if rng.random() < 0.5 else [value for value in values if value not in there]
    return choices[rng.integers(len(choices))]


def _digit_to_ask(value: int, rng: np.random.Generator) -> int:
    return value if rng.random() < 0.5 else int(rng.choice([v for v in range(10) if v != value]))


def _about_digit(value: int, rng: np.random.Generator) -> list[QuestionAnswer]:
    asked = _digit_to_ask(value, rng)
    return [
        _ask("what", digit_prompt(value), rng),
        _ask("digit", DIGIT_NAMES[value], rng),
        _ask("exists", _yes(asked == value), rng, item=digit_prompt(asked).removeprefix("a ")),
    ]


def _about_scene(scene: Scene, rng: np.random.Generator) -> list[QuestionAnswer]:
    objects = scene.objects
    picked = objects[rng.integers(len(objects))]
    found = [
        _ask("what", scene.prompt, rng),
        _ask("count", ("one", "two")[len(objects) - 1], rng),
        _ask_exists(scene, rng),
    ]
    if len(objects) == 1:
        found.append(_ask("colour_alone", picked.colour, rng, shape=picked.shape))
        found.append(_ask("shape_alone", picked.shape, rng, colour=picked.colour))
        return found
    if objects[0].shape != objects[1].shape:
        found.append(_ask("colour", picked.colour, rng, shape=picked.shape))
    if objects[0].colour != objects[1].colour:
        found.append(_ask("shape", picked.shape, rng, colour=picked.colour))
    found.append(_ask_relation(scene, rng))
    return found


def _ask_exists(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    if rng.random() < 0.5:
        return _ask("exists", "yes", rng, item=scene.objects[rng.integers(len(scene.objects))])
    absent = [item for item in ALL_OBJECTS if item not in scene.objects]
    # Half of the absent ones share a colour or a shape with what is there: telling them apart takes binding.
    near = [
        item for item in absent if any((item.colour == o.colour) or (item.shape == o.shape) for o in scene.objects)
    ]
    choices = near if rng.random() < 0.5 else absent
    return _ask("exists", "no", rng, item=choices[rng.integers(len(choices))])


def _ask_relation(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    """What stands in a relation to one of the two objects: the other one, or nothing."""
    assert scene.relation is not None
    first, second = scene.objects
    relation, item, answer = (
        (scene.relation, second, f"a {first}"),
        (scene.converse, first, f"a {second}"),
        (scene.relation, first, "nothing"),
        (scene.converse, second, "nothing"),
    )[rng.choice(4, p=(0.375, 0.375, 0.125, 0.125))]
    return _ask("relation", answer, rng, relation=relation, item=item)


def _ask(kind: str, answer: str, rng: np.random.Generator, **values) -> QuestionAnswer:
    wordings = _WORDINGS[kind]
    return QuestionAnswer(wordings[rng.integers(len(wordings))].format(**values), answer, kind.removesuffix("_alone"))
