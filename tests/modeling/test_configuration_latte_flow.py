# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The configuration alone: no weights are made here."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, Qwen2VLConfig

from latte_flow_hf import LatteFlowConfig


def vlm_config(num_hidden_layers: int = 12, hidden_size: int = 32) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={"depth": 1, "embed_dim": 16},
    )


def test_defaults_are_the_paper_s():
    config = LatteFlowConfig()
    assert isinstance(config.vlm_config, Qwen2VLConfig)
    assert (config.num_experts, config.latent_channels, config.latent_patch_size) == (4, 32, 1)
    assert config.residual_attention == "scores"
    assert config.expert_boundaries == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert config.timestep_frequency_dim == 256
    assert config.timestep_embed_dim == config.vlm_config.text_config.hidden_size


def test_timestep_embedding_is_as_wide_as_the_backbone_unless_given():
    assert LatteFlowConfig(vlm_config=vlm_config(hidden_size=48)).timestep_embed_dim == 48
    assert LatteFlowConfig(vlm_config=vlm_config(), timestep_embed_dim=20).timestep_embed_dim == 20


def test_a_token_is_embedded_from_its_own_latent_pixels_unless_told_otherwise():
    assert LatteFlowConfig(vlm_config=vlm_config(), latent_patch_size=2).latent_kernel_size == 2
    assert LatteFlowConfig(vlm_config=vlm_config(), latent_patch_size=2, latent_kernel_size=6).latent_kernel_size == 6


@pytest.mark.parametrize(("patch_size", "kernel_size"), [(2, 1), (2, 3), (1, 4), (1, 0)])
def test_a_kernel_that_cannot_be_centred_is_refused(patch_size, kernel_size):
    with pytest.raises(ValueError, match=f"latent_kernel_size must be .* got {kernel_size}"):
        LatteFlowConfig(vlm_config=vlm_config(), latent_patch_size=patch_size, latent_kernel_size=kernel_size)


def test_sub_config_may_be_a_dict_or_an_object():
    given = vlm_config()
    by_object = LatteFlowConfig(vlm_config=given)
    by_dict = LatteFlowConfig(vlm_config=given.to_dict())
    assert type(by_dict.vlm_config) is Qwen2VLConfig
    assert by_object.vlm_config.to_dict() == by_dict.vlm_config.to_dict() == given.to_dict()


def test_text_config_is_the_backbone_s():
    config = LatteFlowConfig(vlm_config=vlm_config())
    assert config.text_config is config.vlm_config.text_config
    assert config.get_text_config() is config.vlm_config.text_config
    assert config.get_text_config(decoder=True).num_hidden_layers == 12


def test_vision_config_is_the_backbone_s():
    config = LatteFlowConfig(vlm_config=vlm_config())
    assert config.vision_config is config.vlm_config.vision_config
    assert "vision_config" not in config.to_dict()


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 6, 12])
def test_experts_share_the_layers_evenly(num_experts):
    config = LatteFlowConfig(vlm_config=vlm_config(12), num_experts=num_experts)
    assert config.layers_per_expert == [12 // num_experts] * num_experts
    layers = torch.arange(12).view(num_experts, -1).tolist()
    assert [list(config.expert_layers(k)) for k in range(num_experts)] == layers
    assert len(config.expert_boundaries) == num_experts + 1


def test_experts_of_unequal_size():
    config = LatteFlowConfig(vlm_config=vlm_config(12), num_experts=3, layers_per_expert=[6, 5, 1])
    assert [list(config.expert_layers(k)) for k in range(3)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11]]
    assert [config.expert_of_layer(index) for index in (0, 5, 6, 10, 11)] == [0, 0, 1, 1, 2]
    assert config.describe_layers() == "6, 5, 1 layers"
    assert LatteFlowConfig(vlm_config=vlm_config(12), num_experts=3).describe_layers() == "4 layers"


def test_a_tower_of_some_of_the_backbone_s_layers():
    config = LatteFlowConfig(vlm_config=vlm_config(12), num_experts=2, tower_layers=[0, 2, 4, 11])
    assert config.layers_per_expert == [2, 2] and list(config.expert_layers(1)) == [2, 3]
    assert LatteFlowConfig(vlm_config=vlm_config(12)).tower_layers == list(range(12))
    with pytest.raises(ValueError, match=r"num_experts must divide the tower's 3 layers, got 2; use one of \[1, 3\]"):
        LatteFlowConfig(vlm_config=vlm_config(12), num_experts=2, tower_layers=[0, 2, 4])


@pytest.mark.parametrize("tower_layers", [[], [0, 12], [-1, 0], [2, 1], [1, 1]])
def test_tower_layers_are_rising_indices(tower_layers):
    with pytest.raises(
        ValueError, match=r"tower_layers must be rising indices of the backbone's 12 layers, from 0 to 11"
    ):
        LatteFlowConfig(vlm_config=vlm_config(12), num_experts=1, tower_layers=tower_layers)


@pytest.mark.parametrize("layers_per_expert", [[], [12], [6, 5], [12, 0], [13, -1], [4, 4, 4]])
def test_layers_per_expert_are_all_layers(layers_per_expert):
    expected = "layers_per_expert must be num_experts = 2 positive numbers with the sum 12"
    with pytest.raises(ValueError, match=expected) as caught:
        LatteFlowConfig(vlm_config=vlm_config(12), num_experts=2, layers_per_expert=layers_per_expert)
    assert f"got {layers_per_expert}" in str(caught.value)


@pytest.mark.parametrize("residual_attention", ["scores", "probabilities", None])
def test_round_trip_through_a_folder(tmp_path, residual_attention):
    config = LatteFlowConfig(
        vlm_config=vlm_config(),
        num_experts=3,
        expert_boundaries=[1, 0.9, 0.2, 0],
        latent_channels=8,
        latent_patch_size=2,
        sample_size=32,
        residual_attention=residual_attention,
        tower_layers=[0, 1, 3, 5, 8, 9],
        layers_per_expert=[3, 1, 2],
        timestep_frequency_dim=64,
        timestep_embed_dim=40,
    )
    config.save_pretrained(tmp_path)
    for loaded in (LatteFlowConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LatteFlowConfig
        # Where it was loaded from is all that differs.
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert type(loaded.vlm_config) is Qwen2VLConfig
        assert loaded.vlm_config.to_dict() == config.vlm_config.to_dict()
        assert loaded.residual_attention == residual_attention
        assert loaded.expert_boundaries == [1.0, 0.9, 0.2, 0.0]


def test_file_holds_every_number(tmp_path):
    LatteFlowConfig(vlm_config=vlm_config(), num_experts=2).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "latte_flow"
    assert written["vlm_config"]["model_type"] == "qwen2_vl"
    assert written["num_experts"] == 2
    assert written["expert_boundaries"] == [1.0, 0.5, 0.0]


def test_size_is_of_whole_tokens():
    with pytest.raises(ValueError, match=r"sample_size must be a multiple of latent_patch_size = 2, got 9\."):
        LatteFlowConfig(vlm_config=vlm_config(), latent_patch_size=2, sample_size=9)


@pytest.mark.parametrize("num_experts", [5, 7, 24])
def test_experts_must_divide_the_layers(num_experts):
    expected = f"num_experts must divide the backbone's 12 layers, got {num_experts}; use one of [1, 2, 3, 4, 6, 12]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        LatteFlowConfig(vlm_config=vlm_config(12), num_experts=num_experts)


@pytest.mark.parametrize(
    "name", ["num_experts", "latent_channels", "latent_patch_size", "sample_size", "timestep_frequency_dim"]
)
@pytest.mark.parametrize("value", [0, -4, 2.0])
def test_counts_are_positive_integers(name, value):
    # transformers checks declared types itself: its message comes first for a float, and names both as well.
    with pytest.raises(Exception, match=name) as caught:
        LatteFlowConfig(vlm_config=vlm_config(), **{name: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["num_experts", "latent_channels", "latent_patch_size", "sample_size", "timestep_frequency_dim"]
)
@pytest.mark.parametrize("value", [0, -4])
def test_counts_say_what_would_do(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a positive integer, got {value}.")):
        LatteFlowConfig(vlm_config=vlm_config(), **{name: value})


@pytest.mark.parametrize("value", [0, -1])
def test_timestep_embedding_must_have_a_size(value):
    with pytest.raises(ValueError, match=f"timestep_embed_dim.*{value}"):
        LatteFlowConfig(vlm_config=vlm_config(), timestep_embed_dim=value)


@pytest.mark.parametrize("value", ["score", "none", ""])
def test_residual_attention_is_one_of_three(value):
    expected = f"residual_attention must be one of ['scores', 'probabilities', None], got {value!r}."
    with pytest.raises(ValueError, match=re.escape(expected)):
        LatteFlowConfig(vlm_config=vlm_config(), residual_attention=value)


@pytest.mark.parametrize("boundaries", [[1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.5], [0.9, 0.5, 0.0]])
def test_boundaries_fall_from_one_to_zero(boundaries):
    with pytest.raises(ValueError, match="expert_boundaries must be 3 strictly falling sigmas") as caught:
        LatteFlowConfig(vlm_config=vlm_config(), num_experts=2, expert_boundaries=boundaries)
    assert f"got {boundaries}; for example [1.0, 0.5, 0.0]" in str(caught.value)


def test_timestep_sampling_is_one_of_two():
    with pytest.raises(ValueError, match=r"timestep_sampling must be one of .*, got 'normal'"):
        LatteFlowConfig(vlm_config=vlm_config(), timestep_sampling="normal")


@pytest.mark.parametrize("content", [{}, {"model_type": "latte_flow"}, {"num_experts": 2}])
def test_a_configuration_without_a_backbone_is_refused(content):
    """transformers would build the defaults, a 72B backbone."""
    with pytest.raises(ValueError, match="has no vlm_config"):
        LatteFlowConfig.from_dict(content)
