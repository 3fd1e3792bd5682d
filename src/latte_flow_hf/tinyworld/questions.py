# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Questions about images of the tiny world and their correct answers."""

from dataclasses import dataclass

import numpy as np

from .digits import DIGIT_NAMES, digit_prompt
from .shapes import ALL_OBJECTS, COLOURS, RELATIONS, SHAPES, Scene, SceneObject


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about an image (or about a sentence that describes one) and its only correct answer."""

    question: str
    answer: str
    kind: str


# Several wordings per kind; the first is the plain one.
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
    """The scene, or the digit's value, that a prompt of the tiny world describes.

    Raises:
        `ValueError`: if `prompt` is not such a prompt.
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
            f"prompt {prompt!r} is not a prompt of the tiny world; use `a COLOUR SHAPE`, two of them joined by one "
            f"of {list(RELATIONS)}, or `a handwritten DIGIT`; colours: {list(COLOURS)}, shapes: {list(SHAPES)}."
        )
    return SceneObject(words[1], words[2])


def questions_about(content: Scene | int, rng: np.random.Generator) -> list[QuestionAnswer]:
    """One question of each kind that has a single correct answer for `content` (a scene, or a digit's value).

    Args:
        content (`Scene` or `int`): what the image shows.
        rng (`np.random.Generator`): samples wordings, objects, and the answers to yes-or-no questions.
    """
    if isinstance(content, Scene):
        return _about_scene(content.canonical, rng)
    return _about_digit(content, rng)


def practice_questions(content: Scene | int, rng: np.random.Generator) -> list[QuestionAnswer]:
    """More questions, for training only: the hard kinds again, and easier yes-or-no questions.

    Chosen: because without the easier ones a small model does not learn to answer `is there a red circle?`.
    """
    if not isinstance(content, Scene):
        questions = [_about_digit(content, rng)[-1] for _ in range(3)]
        for _ in range(2):
            digit = _present_or_absent_digit(content, rng)
            questions.append(_question("has_digit", _yes_or_no(digit == content), rng, digit=DIGIT_NAMES[digit]))
        return questions
    scene = content.canonical
    questions = [_exists_question(scene, rng), _exists_question(scene, rng)]
    for kind, attribute, values in (("has_colour", "colour", tuple(COLOURS)), ("has_shape", "shape", SHAPES)):
        present = [getattr(item, attribute) for item in scene.objects]
        value = _present_or_absent(present, values, rng)
        questions.append(_question(kind, _yes_or_no(value in present), rng, **{attribute: value}))
    item = scene.objects[rng.integers(len(scene.objects))]
    colours = [other.colour for other in scene.objects]
    shapes = [other.shape for other in scene.objects]
    if shapes.count(item.shape) == 1:
        colour = _present_or_absent([item.colour], tuple(COLOURS), rng)
        questions.append(
            _question("is_colour", _yes_or_no(colour == item.colour), rng, shape=item.shape, colour=colour)
        )
    if colours.count(item.colour) == 1:
        shape = _present_or_absent([item.shape], SHAPES, rng)
        questions.append(_question("is_shape", _yes_or_no(shape == item.shape), rng, shape=shape, colour=item.colour))
    if scene.relation is not None:
        questions.append(_relation_question(scene, rng))
    return questions


def _yes_or_no(holds: bool) -> str:
    return "yes" if holds else "no"


def _present_or_absent(present: list[str], values: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of `present` or, equally often, one of the other `values`."""
    choices = present if rng.random() < 0.5 else [value for value in values if value not in present]
    return choices[rng.integers(len(choices))]


def _present_or_absent_digit(value: int, rng: np.random.Generator) -> int:
    return value if rng.random() < 0.5 else int(rng.choice([v for v in range(10) if v != value]))


def _about_digit(value: int, rng: np.random.Generator) -> list[QuestionAnswer]:
    digit = _present_or_absent_digit(value, rng)
    return [
        _question("what", digit_prompt(value), rng),
        _question("digit", DIGIT_NAMES[value], rng),
        _question("exists", _yes_or_no(digit == value), rng, item=digit_prompt(digit).removeprefix("a ")),
    ]


def _about_scene(scene: Scene, rng: np.random.Generator) -> list[QuestionAnswer]:
    objects = scene.objects
    chosen = objects[rng.integers(len(objects))]
    questions = [
        _question("what", scene.prompt, rng),
        _question("count", ("one", "two")[len(objects) - 1], rng),
        _exists_question(scene, rng),
    ]
    if len(objects) == 1:
        questions.append(_question("colour_alone", chosen.colour, rng, shape=chosen.shape))
        questions.append(_question("shape_alone", chosen.shape, rng, colour=chosen.colour))
        return questions
    if objects[0].shape != objects[1].shape:
        questions.append(_question("colour", chosen.colour, rng, shape=chosen.shape))
    if objects[0].colour != objects[1].colour:
        questions.append(_question("shape", chosen.shape, rng, colour=chosen.colour))
    questions.append(_relation_question(scene, rng))
    return questions


def _exists_question(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    if rng.random() < 0.5:
        return _question("exists", "yes", rng, item=scene.objects[rng.integers(len(scene.objects))])
    absent = [item for item in ALL_OBJECTS if item not in scene.objects]
    # Half of the absent ones share a colour or a shape with a present one, which is harder to answer.
    near = [
        item for item in absent if any((item.colour == o.colour) or (item.shape == o.shape) for o in scene.objects)
    ]
    choices = near if rng.random() < 0.5 else absent
    return _question("exists", "no", rng, item=choices[rng.integers(len(choices))])


def _relation_question(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    """Ask for the object in a relation to one of the two: it is the other one, or nothing."""
    assert scene.relation is not None
    first, second = scene.objects
    relation, item, answer = (
        (scene.relation, second, f"a {first}"),
        (scene.converse, first, f"a {second}"),
        (scene.relation, first, "nothing"),
        (scene.converse, second, "nothing"),
    )[rng.choice(4, p=(0.375, 0.375, 0.125, 0.125))]
    return _question("relation", answer, rng, relation=relation, item=item)


def _question(kind: str, answer: str, rng: np.random.Generator, **values) -> QuestionAnswer:
    wordings = _WORDINGS[kind]
    return QuestionAnswer(wordings[rng.integers(len(wordings))].format(**values), answer, kind.removesuffix("_alone"))
