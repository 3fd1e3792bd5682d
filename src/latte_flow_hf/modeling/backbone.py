# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the generation tower takes over from the backbone: new modules of the same kind and size as its decoder's."""

from torch import nn


def check_decoder(decoder: nn.Module) -> None:
    """Refuse a decoder whose layers are not like those of Llama and Qwen2, which the tower's layers mirror.

    Raises:
        `ValueError`: with the modules that are missing or not supported.
    """
    layer = decoder.layers[0]
    names = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += ["mlp", "input_layernorm", "post_attention_layernorm"]
    modules = dict(layer.named_modules())
    missing = [name for name in names if name not in modules]
    unsupported = [name for name in ("self_attn.q_norm", "self_attn.k_norm") if name in modules]
    if missing or unsupported or not hasattr(decoder, "rotary_emb"):
        raise ValueError(
            f"the backbone's decoder layer {type(layer).__name__} cannot be mirrored (missing: {missing}, not "
            f"supported: {unsupported}); use a backbone with layers like those of Qwen2-VL instead."
        )


def linear_like(linear: nn.Linear) -> nn.Linear:
    """A new linear map of the same size, with or without a bias."""
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)


def rms_norm_like(norm: nn.Module) -> nn.Module:
    """A new norm of the same class, size and epsilon."""
    return type(norm)(norm.weight.shape[0], eps=norm.variance_epsilon)
