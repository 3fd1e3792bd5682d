"""Answers are checked by independent rules."""

import numpy as np
import pytest

from latte_flow_hf.tinyworld.questions import parse_prompt, practice_questions, questions_about
from latte_flow_hf.tinyworld.shapes import COLOURS, RELATIONS, SHAPES, Scene, SceneObject, sample_scene


def test_prompts_are_parsed_back():
    rng = np.random.default_rng(0)
    for number in (1, 2):
        for _ in range(50):
            scene = sample_scene(rng, number)
            assert parse_prompt(scene.prompt) == scene
    assert parse_prompt("a handwritten four") == 4


@pytest.mark.parametrize("prompt", ["", "a dog", "a red star", "a red circle near a blue square", "a handwritten ten"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the tiny world"):
        parse_prompt(prompt)


def test_canonical_scenes_use_left_of_or_above():
    red, blue = SceneObject("red", "circle"), SceneObject("blue", "square")
    assert Scene((red, blue), "right of").canonical == Scene((blue, red), "left of")
    assert Scene((red, blue), "below").canonical == Scene((blue, red), "above")
    assert Scene((red, blue), "above").canonical == Scene((red, blue), "above")


def expected_answer(scene: Scene, question: str, kind: str) -> str:
    """The answer from the words of the question and the objects of the scene."""
    words = question.replace("?", "").replace(",", "").split()
    objects = scene.objects
    if kind == "what":
        return scene.canonical.prompt
    if kind == "count":
        return {1: "one", 2: "two"}[len(objects)]
    if kind == "exists":
        return "yes" if any(f"{o.colour} {o.shape}" in question for o in objects) else "no"
    if kind == "colour":
        (colour,) = {o.colour for o in objects if o.shape in words or len(objects) == 1}
        return colour
    if kind == "shape":
        (shape,) = {o.shape for o in objects if o.colour in words or len(objects) == 1}
        return shape
    assert kind == "relation"
    relation = next(name for name in RELATIONS if f" {name} " in question)
    first, second = objects
    target = first if str(first) in question else second
    other = second if target is first else first
    holds = scene.relation if other is first else RELATIONS[scene.relation][0]
    return f"a {other}" if holds == relation else "nothing"


def test_every_answer_follows_from_the_scene():
    rng = np.random.default_rng(1)
    kinds = set()
    for index in range(400):
        scene = sample_scene(rng, 1 + index % 2)
        for item in questions_about(scene, rng):
            assert item.answer == expected_answer(scene, item.question, item.kind), (scene.prompt, item)
            kinds.add(item.kind)
    assert kinds == {"what", "count", "exists", "colour", "shape", "relation"}


def test_questions_about_digits():
    rng = np.random.default_rng(2)
    items = [item for _ in range(50) for item in questions_about(7, rng)]
    assert {item.answer for item in items if item.kind == "digit"} == {"seven"}
    for item in items:
        if item.kind == "exists":
            assert (item.answer == "yes") == ("seven" in item.question)
    assert {item.answer for item in items if item.kind == "exists"} == {"yes", "no"}


def test_practice_questions_are_answered_by_the_scene():
    rng = np.random.default_rng(3)
    kinds, answers = set(), set()
    for index in range(400):
        scene = sample_scene(rng, 1 + index % 2)
        for item in practice_questions(scene, rng):
            kinds.add(item.kind)
            if item.kind in ("exists", "relation"):
                assert item.answer == expected_answer(scene, item.question, item.kind)
                continue
            words = item.question.removesuffix("?").split()
            named = [word for word in words if word in COLOURS or word in SHAPES]
            # Exactly the objects that have everything the question names.
            matching = [item for item in scene.objects if set(named) <= {item.colour, item.shape}]
            assert (item.answer == "yes") == bool(matching), (scene.prompt, item)
            answers.add((item.kind, item.answer))
    assert kinds == {"exists", "relation", "has_colour", "has_shape", "is_colour", "is_shape"}
    assert len(answers) == 8


def test_practice_questions_about_digits():
    rng = np.random.default_rng(4)
    items = [item for _ in range(50) for item in practice_questions(7, rng)]
    assert {item.kind for item in items} == {"exists", "has_digit"}
    assert all((item.answer == "yes") == ("seven" in item.question) for item in items)
