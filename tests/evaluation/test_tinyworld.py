"""The evaluation counts what it should: a pipeline that draws the scene is always correct, a random one never."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latte_flow_hf.evaluation import tinyworld
from latte_flow_hf.tinyworld.digits import digit_indices, draw_digit, load_digits
from latte_flow_hf.tinyworld.questions import parse_prompt
from latte_flow_hf.tinyworld.shapes import Scene, draw_scene, place_objects


class DrawingPipeline:
    """Draws prompts exactly, except the prompts in `wrong`."""

    def __init__(self, wrong=()):
        self.wrong = wrong

    def __call__(self, prompt, generator, num_images_per_prompt=1):
        prompts = [prompt] * num_images_per_prompt if isinstance(prompt, str) else prompt
        return SimpleNamespace(images=[self.draw(*pair) for pair in zip(prompts, generator)])

    def draw(self, prompt, generator):
        rng = np.random.default_rng(generator.initial_seed())
        content = parse_prompt("a red circle" if prompt in self.wrong else prompt)
        if isinstance(content, Scene):
            return draw_scene(content, place_objects(content, rng))
        values = load_digits()[1]
        return draw_digit(int(next(i for i in digit_indices(held_out=False) if values[i] == content)))


def test_prompts_are_of_their_kind_and_depend_on_the_seed():
    prompts = tinyworld.generation_prompts(3, one=5, two=6, held_out=7, digits=8)
    assert [len(items) for items in prompts.values()] == [5, 6, 7, 8]
    assert all(parse_prompt(prompt).held_out for prompt in prompts["held-out pair"])
    assert not any(parse_prompt(prompt).held_out for prompt in prompts["two objects"])
    assert prompts == tinyworld.generation_prompts(3, 5, 6, 7, 8) != tinyworld.generation_prompts(4, 5, 6, 7, 8)


def test_generation_counts_correct_images():
    prompts = tinyworld.generation_prompts(0, one=4, two=9, held_out=4, digits=4)
    wrong = prompts["two objects"][5]
    results = tinyworld.evaluate_generation(DrawingPipeline([wrong]), prompts, seed=0, batch_size=3)
    assert {kind: result["count"] for kind, result in results.items()} == {
        kind: len(items) for kind, items in prompts.items()
    }
    num_wrong = prompts["two objects"].count(wrong)
    assert results["two objects"]["accuracy"] == pytest.approx(1 - num_wrong / 9)
    assert [item["prompt"] for item in results["two objects"]["wrong"]] == [wrong] * num_wrong
    assert results["two objects"]["wrong"][0]["index"] == prompts["two objects"].index(wrong)
    # Only one of its two objects is drawn.
    assert results["two objects"]["errors"]["missing"] == num_wrong
    assert results["digit"]["categories"] == {"digits": 1} and results["digit"]["errors"] == {}
    assert all(result["accuracy"] == 1 for kind, result in results.items() if kind != "two objects")


@pytest.mark.parametrize(
    ("drawn", "errors", "right"),
    [
        ("a red circle left of a blue square", ["colour"], {"two objects", "position"}),
        ("a blue circle right of a red square", ["relation"], {"two objects", "colour attribution"}),
        ("a blue circle left of a red cross", ["shape"], set()),
        ("a blue circle", ["missing"], set()),
    ],
)
def test_categories_count_the_errors_that_concern_them(drawn, errors, right):
    asked = "a blue circle left of a red square"

    class Other(DrawingPipeline):
        def draw(self, prompt, generator):
            return super().draw(drawn, generator)

    results = tinyworld.evaluate_generation(Other(), {"two objects": [asked]}, seed=0)["two objects"]
    assert results["wrong"] == [{"index": 0, "prompt": asked, "errors": errors}]
    assert results["errors"] == {errors[0]: 1}
    assert results["categories"] == {
        name: float(name in right) for name in ("two objects", "position", "colour attribution")
    }


def test_another_judge_needs_no_errors():
    prompts = {"one object": ["a red circle", "a blue cross"]}
    results = tinyworld.evaluate_generation(DrawingPipeline(), prompts, 0, is_correct=lambda image, prompt: False)
    assert results["one object"] == {
        "accuracy": 0,
        "count": 2,
        "wrong": [{"index": i, "prompt": prompt} for i, prompt in enumerate(prompts["one object"])],
    }


def test_variety_compares_all_images():
    variety = tinyworld.evaluate_variety(DrawingPipeline(), "a red circle", num_images=4)
    assert variety["num_distinct"] == variety["num_images"] == 4 and variety["min_distance"] > 0
    same = tinyworld.evaluate_variety(DrawingPipeline(), "a handwritten three", num_images=3)
    assert same["num_distinct"] == 1 and same["min_distance"] == 0


def test_understanding_counts_exact_answers(pipe, monkeypatch):
    questions = {subject: items[:5] for subject, items in tinyworld.understanding_questions(0, num_scenes=2).items()}
    answers = [item.answer for items in questions.values() for _, item in items]
    results = tinyworld.evaluate_understanding(pipe, questions)
    assert all(result["count"] == 5 and result["accuracy"] < 1 for result in results.values())
    # The same with the known answers in place of those of the random model, all but one.
    answers[7] = answers[7] + " or not"
    decoded = iter([answers[:5], answers[5:]])
    monkeypatch.setattr(pipe.processor, "batch_decode", lambda *_, **__: next(decoded), raising=False)
    monkeypatch.setattr(pipe.model, "generate", lambda input_ids, **_: torch.zeros(len(input_ids), 200))
    results = tinyworld.evaluate_understanding(pipe, questions)
    shapes, digits = results.values()
    assert shapes["accuracy"] == 1 and digits["accuracy"] == pytest.approx(0.8)
    assert [item["prediction"] for item in digits["wrong"]] == [answers[7]]
    assert sum(accuracy == 1 for accuracy in shapes["kinds"].values()) == len(shapes["kinds"])
