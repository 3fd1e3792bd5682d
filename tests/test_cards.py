# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Model cards of written checkpoints."""

import pytest
from huggingface_hub import ModelCard

from latte_flow_hf.cards import backbone_card, pipeline_card, state_dict_card
from latte_flow_hf.conversion import initialize


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


def test_converted_folders_do_not_name_local_paths(backbone_folder, vae_folder, tmp_path):
    initialize(backbone_folder, vae_folder, 2).write(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert backbone_folder.name in card.text
    assert not any(str(tmp_path.parent) in path.read_text() for path in (tmp_path / "out").rglob("*.[jm]*"))
