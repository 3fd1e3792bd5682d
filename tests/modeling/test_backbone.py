# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers import Qwen3VLConfig

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration
from latte_flow_hf.modeling.backbone import linear_like, rms_norm_like


def test_backbone_with_other_layers_is_refused():
    # Its queries and keys are normalised, which the tower would leave out and paint nonsense.
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vlm_config = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    with pytest.raises(
        ValueError,
        match=r"Qwen3VLTextDecoderLayer cannot be mirrored.*q_norm.*like those of Qwen2-VL",
    ):
        LatteFlowForConditionalGeneration(LatteFlowConfig(vlm_config=vlm_config, num_experts=2))


@pytest.mark.parametrize("bias", [True, False])
def test_new_linear_map_has_the_same_sizes(bias):
    new = linear_like(torch.nn.Linear(3, 5, bias=bias))
    assert (new.in_features, new.out_features, new.bias is not None) == (3, 5, bias)


def test_new_norm_is_of_the_same_class_size_and_epsilon(backbone):
    norm = backbone.get_decoder().layers[0].input_layernorm
    new = rms_norm_like(norm)
    assert type(new) is type(norm) and new.weight.shape == norm.weight.shape
    assert new.variance_epsilon == norm.variance_epsilon and (new.weight == 1).all()
