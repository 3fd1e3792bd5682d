# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Model cards of written checkpoints."""

import pytest
from huggingface_hub import ModelCard

from latte_flow_hf.cards import backbone_card, pipeline_card, state_dict_card


@pytest.mark.parametrize(
    ("make", "library", "words"),
    [
        (
            lambda config: pipeline_card(config, "It came from `a/b`."),
            "diffusers",
            ("It came from `a/b`.", "K =\n2 timestep experts of 2 layers", "LatteFlowPipeline.from_pretrained"),
        ),
        (
            lambda config: backbone_card("a/b", "Qwen2VLForConditionalGeneration"),
            "transformers",
            ("of `a/b`", "Qwen2VLForConditionalGeneration.from_pretrained"),
        ),
        (lambda config: state_dict_card("a/b", config), None, ("`a/b` (K = 2)", "latte-flow convert from-original")),
    ],
)
def test_a_card_says_what_it_is_and_how_to_load_it(make, library, words, model):
    card = ModelCard(make(model.config).decode())
    card.data.to_yaml()
    assert card.data.library_name == library and (library != "diffusers" or card.data.pipeline_tag == "text-to-image")
    for part in (*words, "## Licence", "latte_flow_hf"):
        assert part in card.text
