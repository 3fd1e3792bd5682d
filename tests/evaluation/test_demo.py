"""The questions of the demo have known answers, and its contact sheet shows all images."""

import pytest

from latte_flow_hf.evaluation.demo import DEMO_PROMPTS, contact_sheet, demo_questions, generate_and_ask, peak_memory_gb


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", [("what is in the picture?", "a red circle"), ("what colour is it?", "red")]),
        (
            "a white cross right of a green circle",
            [
                ("what is in the picture?", "a green circle left of a white cross"),
                ("what is left of the white cross?", "a green circle"),
            ],
        ),
        (
            "a handwritten three",
            [("what is in the picture?", "a handwritten three"), ("which digit is this?", "three")],
        ),
    ],
)
def test_questions_have_the_answers_of_the_prompt(prompt, expected):
    assert [(item.question, item.answer) for item in demo_questions(prompt)] == expected


def test_all_prompts_have_two_questions():
    assert all(len(demo_questions(prompt)) == 2 for prompt in DEMO_PROMPTS)


def test_a_random_model_is_incorrect(pipe):
    item = generate_and_ask(pipe, "a red circle", seed=0)
    assert item.image.size == (64, 64) and item.seconds > 0 and len(item.answers) == 2
    assert not item.is_correct
    # Four images in the first row, one in the second.
    sheets = [contact_sheet([item] * number) for number in (4, 5)]
    assert sheets[0].width == sheets[1].width and sheets[0].height < sheets[1].height
    assert 0.05 < peak_memory_gb() < 100
