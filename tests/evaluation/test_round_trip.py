# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A model says what it sees in its own images; what it says is compared by its meaning."""

import pytest

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.evaluation.round_trip import make_round_trip, parse_description
from latte_flow_hf.evaluation.tinyworld import check_world, evaluate_generation, generation_prompts


@pytest.fixture(scope="module")
def embedded():
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_descriptions_are_compared_by_meaning():
    scene = parse_description("a red circle left of a blue square")
    assert scene == parse_description("A blue square right of a red circle.") is not None
    assert scene != parse_description("a blue square left of a red circle")
    assert parse_description("a handwritten seven") == 7
    for text in ("", "a red circle left of", "red circle", "a dog", "seven"):
        assert parse_description(text) is None


def test_the_embedded_checkpoint_mostly_recognises_what_it_generates(embedded):
    prompts = generation_prompts(11, one=3, two=4, held_out=2, digits=3)
    # Its answers to this one are in the wording of training.
    prompts["two objects"][0] = "a red circle right of a blue square"
    results = make_round_trip(embedded, prompts, seed=11, num_inference_steps=10)
    generation = evaluate_generation(embedded, prompts, seed=11, num_inference_steps=10)
    for kind, result in results.items():
        assert result["count"] == len(prompts[kind]) == sum(sum(row.values()) for row in result["table"].values())
        # The same images as in the evaluation.
        assert result["oracle_accuracy"] == pytest.approx(generation[kind]["accuracy"])
        assert result["agreement"] == pytest.approx(
            sum(row["agrees"] for row in result["table"].values()) / result["count"]
        )
    assert sum(result["table"]["right"]["agrees"] for result in results.values()) >= 9
    assert all(item["prompt"] != "a red circle right of a blue square" for item in results["two objects"]["differing"])


def test_a_random_model_agrees_with_nothing(pipe):
    prompts = {"one object": ["a red circle", "a blue cross"], "digit": ["a handwritten one"]}
    results = make_round_trip(pipe, prompts, seed=0, num_inference_steps=2)
    assert results["one object"]["agreement"] == results["one object"]["oracle_accuracy"] == 0
    assert results["one object"]["table"] == {
        "right": {"agrees": 0, "differs": 0},
        "wrong": {"agrees": 0, "differs": 2},
    }
    assert results["one object"]["oracle_agreement"] is None and results["one object"]["oracle_count"] == 0
    assert [item["index"] for item in results["one object"]["differing"]] == [0, 1]


def test_other_prompts_and_other_worlds_are_refused_before_the_work(own_pipe, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("an image was generated")

    monkeypatch.setattr(LatteFlowPipeline, "__call__", forbidden)
    with pytest.raises(ValueError, match="'a dog' of 'one object' is not a prompt of the tiny world"):
        make_round_trip(own_pipe, {"one object": ["a dog"]}, seed=0)
    with pytest.raises(ValueError, match="prompts of 'one object' are empty"):
        make_round_trip(own_pipe, {"one object": []}, seed=0)
    check_world(own_pipe)
    own_pipe.model.config.trained_words = ["a", "red", "circle"]
    with pytest.raises(ValueError, match=r"trained on another world: it does not know the words .*square"):
        make_round_trip(own_pipe, {"one object": ["a red circle"]}, seed=0)
    own_pipe.model.config.trained_words = None
    own_pipe.model.config.sample_size *= 2
    with pytest.raises(ValueError, match="64x64, and this model generates 128x128"):
        check_world(own_pipe)
