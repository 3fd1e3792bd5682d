"""The checkpoint inside the package: loads like any other, fits its size, and does what the README says of it.

The quick tests look at a handful of prompts; `--run-slow` measures all of what the README's table reports, against the
project's targets.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.evaluation import tinyworld
from latte_flow_hf.evaluation.demo import DEMO_PROMPTS, contact_sheet, generate_and_ask


@pytest.fixture(scope="module")
def tiny():
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in Path(tiny_checkpoint()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    configs = [path.read_text() for path in files if path.suffix == ".json"]
    assert not any(re.search(r'"_name_or_path": "/', text) for text in configs)


def test_it_computes_in_single_precision_through_every_door(tiny):
    model = AutoModel.from_pretrained(Path(tiny_checkpoint()) / "model")
    assert model.dtype == tiny.model.dtype == tiny.vae.dtype == torch.float32
    assert type(model) is type(tiny.model)
    assert type(AutoProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor")) is type(tiny.processor)
    for (name, ours), (_, theirs) in zip(tiny.model.named_parameters(), model.named_parameters()):
        assert torch.equal(ours, theirs), name


def test_the_demo_paints_and_answers(tiny):
    items = [generate_and_ask(tiny, prompt, number) for number, prompt in enumerate(DEMO_PROMPTS)]
    assert len(items) == 8 and sum(item.painted_right for item in items) >= 7
    right = [answer == asked.answer for item in items for answer, asked in zip(item.answers, item.asked)]
    assert len(right) == 16 and sum(right) >= 14
    assert contact_sheet(items).width > 4 * 256


def test_it_reads_handwriting_and_colours_it_never_saw(tiny):
    questions = tinyworld.understanding_questions(seed=2, scenes=60)
    asked = {
        "digits": [item for item in questions["held-out digits"] if item[3] == "digit"][::5],
        "colours": [item for item in questions["shapes"] if item[1] == "what colour is it?"],
    }
    results = tinyworld.evaluate_understanding(tiny, asked)
    assert results["digits"]["count"] == 72 and results["digits"]["right"] >= 0.93
    assert results["colours"]["count"] >= 5 and results["colours"]["right"] >= 0.95


def test_prompt_and_guidance_change_the_picture(tiny):
    def paint(prompt, **call):
        picture = tiny(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **call).images[0]
        assert np.isfinite(picture).all() and picture.std() > 0.05
        return picture

    red = paint("a red circle")
    assert np.abs(red - paint("a blue square")).mean() > 0.02
    assert np.abs(red - paint("a red circle", guidance_scale=1.0)).max() > 0.02
    assert np.abs(red - paint("a red circle", negative_prompt="a blue square")).max() > 0.02


def test_one_prompt_gives_many_pictures(tiny):
    variety = tinyworld.evaluate_variety(tiny, "a red circle left of a blue square", seeds=16)
    assert variety["different"] == 16 and variety["closest"] > 1.0


def test_saved_again_it_paints_the_same_picture(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = LatteFlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (
        pipe("a green cross above a red circle", generator=torch.Generator().manual_seed(5)).images[0]
        for pipe in (tiny, again)
    )
    assert first.tobytes() == second.tobytes()


missed = pytest.mark.xfail(strict=True, reason="missed: the README's table tells by how much")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        pytest.param("one object", 0.99, marks=missed),
        ("two objects", 0.96),
        ("held-out pair", 0.85),
        ("digit", 0.93),
    ],
)
def test_painting_reaches_the_target(tiny, kind, target):
    prompts = tinyworld.generation_prompts(seed=1)[kind]
    assert tinyworld.evaluate_generation(tiny, {kind: prompts}, seed=1)[kind]["right"] >= target


@pytest.mark.slow
def test_understanding_reaches_the_targets(tiny):
    results = tinyworld.evaluate_understanding(tiny, tinyworld.understanding_questions(seed=1))
    assert results["shapes"]["right"] >= 0.97
    assert results["held-out digits"]["right"] >= 0.95
