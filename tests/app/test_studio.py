# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the tabs do."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latte_flow_cli import app as command
from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.app.conversation import user_turn
from latte_flow_hf.app.model_queue import Waiting
from latte_flow_hf.app.runs import Generated, Progress
from latte_flow_hf.app.studio import Inside, Side, Studio


def images(updates):
    return [update for update in updates if isinstance(update, Generated)]


def test_several_images_are_those_of_their_seeds(studio):
    settings = studio.settings("a red circle", "3", "4")
    together = images(studio.create("me", studio.series(settings, 3)))
    assert [one.settings.seed for one in together] == [3, 4, 5]
    for one in together:
        (alone,) = images(studio.create("me", [one.settings]))
        assert np.array_equal(alone.image, one.image)


def test_an_empty_seed_is_drawn(studio):
    assert len({studio.settings("a red circle", "").seed for _ in range(4)}) > 1
    with pytest.raises(ValueError, match="Seed must be"):
        studio.settings("a red circle", "-1")


def test_limits_are_checked_before_the_queue(studio):
    for arguments, told in (
        (("a" * 10_000,), "10,000 characters"),
        (("a", "0", "500"), "Steps must be"),
        (("a", "0", "", "99"), "Guidance must be"),
        (("a", "0", "", "", 4096), "Width must be"),
    ):
        with pytest.raises(ValueError, match=told):
            studio.settings(*arguments)
    with pytest.raises(ValueError, match="number of images must be a whole number from 1 to 8"):
        studio.series(studio.settings("a"), 9)


def test_variations_differ_and_can_be_repeated(studio):
    base = studio.settings("a red circle", "3", "3")
    first, second = images(studio.create("me", studio.variations(base, 2, "0.5")))
    assert not np.array_equal(first.image, second.image)
    (again,) = images(studio.create("me", [first.settings]))
    assert np.array_equal(again.image, first.image)
    (same,) = images(studio.create("me", studio.variations(base, 1, "0")))
    (plain,) = images(studio.create("me", [base]))
    assert np.array_equal(same.image, plain.image)


def test_stop_ends_the_loop_of_one_visitor_only(studio):
    runs = []
    studio.pipe.model.tower.register_forward_hook(lambda *_: runs.append(1))
    mine = studio.create("me", [studio.settings("a red circle", "0", "200")])
    assert isinstance(next(mine), Progress)
    theirs = []
    other = threading.Thread(
        target=lambda: theirs.extend(studio.create("you", [studio.settings("a red circle", "0", "2")]))
    )
    other.start()
    assert studio.stop("me") == 1
    assert images(mine) == []
    other.join(30)
    assert len(images(theirs)) == 1
    assert len(runs) < 150
    assert studio.stop("me") == 0 and not studio._jobs


def test_a_visitor_who_leaves_frees_the_model(studio):
    """Closing the generator is what the page does when its client is gone."""
    runs = []
    studio.pipe.model.tower.register_forward_hook(lambda *_: runs.append(1))
    updates = studio.create("me", studio.series(studio.settings("a red circle", "0", "200"), 8))
    next(updates)
    updates.close()
    assert len(images(studio.create("you", [studio.settings("a red circle", "0", "2")]))) == 1
    assert len(runs) < 1600 / 2 and not studio._jobs


def test_inside_is_the_same_image_with_its_reports(studio):
    settings = studio.settings("a red circle", "5", "3, 3")
    (generated,) = images(studio.create("me", [settings]))
    *_, inside = studio.inside("me", settings)
    assert isinstance(inside, Inside)
    assert np.array_equal(inside.generated.image, generated.image)
    assert [report.expert for report in inside.reports] == [0, 1]
    assert len(inside.estimates) == 3 and len(inside.changes) == 5
    # The estimate of the last step is the image.
    assert np.abs(np.asarray(inside.estimates[-1], int) - np.asarray(generated.image, int)).max() <= 1
    with torch.no_grad():
        expected = studio.pipe.decode_latents(inside.reports[0].estimate)[0]
    assert np.array_equal(inside.estimates[1], expected)


def test_compare_starts_from_the_same_noise(own_pipe, make_model, processor, vae):
    other = make_model(num_experts=1)
    k1 = LatteFlowPipeline(other, processor, vae, LatteFlowScheduler(expert_boundaries=other.config.expert_boundaries))
    studio = Studio(own_pipe, "two", {"one": k1})
    starts = []
    for pipe in (own_pipe, k1):
        pipe.model.tower.register_forward_pre_hook(lambda module, arguments: starts.append(arguments[0][-1:].clone()))
    sides = [Side("two", "2"), Side("one", "3", "1")]
    left, right = images(studio.compare("me", "a red circle", "", sides, {}))
    assert (left.model, right.model) == ("two", "one") and left.settings.seed == right.settings.seed
    assert torch.equal(starts[0], starts[2]) and len(starts) == 5
    for bad, told in (
        ([Side("two"), Side("three")], "no model 'three'"),
        ([Side("two"), Side("one", adapters=("x",))], "Adapters are those of two"),
        ([Side("two", adapters=("x",)), Side("one")], "no adapter 'x'"),
    ):
        with pytest.raises(ValueError, match=told):
            list(studio.compare("me", "a red circle", "0", bad, {}))


def test_questions_are_answered_in_turn(studio, picture):
    messages = [user_turn("what is in the picture?", [picture])]
    *_, answer = studio.ask("me", messages, {})
    expected = studio.pipe.chat(messages, max_new_tokens=256, do_sample=False)
    assert answer == expected


def test_what_the_pipeline_refuses_is_told_and_the_next_works(studio, monkeypatch):
    monkeypatch.setattr(studio.pipe, "_check_memory", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ValueError, match="not enough memory"):
        list(studio.create("me", [studio.settings("a red circle", "0", "2")]))
    monkeypatch.undo()
    assert len(images(studio.create("me", [studio.settings("a red circle", "0", "2")]))) == 1


def test_weights_of_adapters(studio, monkeypatch):
    monkeypatch.setattr(studio.shelf, "find", lambda name, session: None)
    assert studio.choose_adapter("me", {}, "style", "0.5") == {"style": (0.5, 0.5)}
    assert studio.choose_adapter("me", {"style": (1.0, 1.0)}, "style", "0, 1") == {"style": (0.0, 1.0)}
    assert studio.choose_adapter("me", {"style": (1.0, 1.0)}, "style", "0") == {}
    for weight, told in (("", "empty"), ("1, 2, 3", "2 of them"), ("9", "from -4 to 4")):
        with pytest.raises(ValueError, match=told):
            studio.choose_adapter("me", {}, "style", weight)


def test_words_that_a_small_world_does_not_have(studio):
    assert studio.unknown_words("a dragon") == ""
    studio.pipe.model.config.trained_words = ["a", "red", "circle"]
    try:
        assert "dragon" in studio.unknown_words("a red dragon") and studio.unknown_words("A red circle") == ""
    finally:
        studio.pipe.model.config.trained_words = None


def test_the_position_is_told_to_who_waits(studio):
    first = studio.create("me", [studio.settings("a red circle", "0", "200")])
    next(first)
    second = studio.create("you", [studio.settings("a red circle", "0", "1")])
    assert next(second) == Waiting(1)
    first.close()
    assert len(images(second)) == 1


def test_the_command_repeats_an_image_of_the_studio(pipeline, tmp_path):
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    studio = Studio(pipe, "random")
    (one,) = images(studio.create("me", [studio.settings("a red circle", "5", "2, 1", "2, 1")]))
    (tmp_path / "first.png").write_bytes(one.png())
    arguments = ["generate", "--like", str(tmp_path / "first.png"), "--model", pipeline, "--device", "cpu"]
    outcome = CliRunner().invoke(command, [*arguments, "-o", str(tmp_path / "again.png")])
    assert outcome.exit_code == 0, outcome.output
    assert np.array_equal(Image.open(tmp_path / "again.png"), one.image)
