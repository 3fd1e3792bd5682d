# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The shapes of a model, as the formulas of costs.py take them. The model may be on the meta device."""

from typing import Any

from torch import nn

from ..modeling.backbone import find_decoder
from .costs import DecoderShape, LayerShape, Projection, TowerShape


def tower_shape(model: Any) -> TowerShape:
    """The shapes of the tower of a [`LatteFlowForConditionalGeneration`], adapters included.

    Raises:
        `ValueError`: if a layer has weights that no formula knows, such as a mixture of experts.
    """
    tower, config = model.tower, model.config
    has_softcap = getattr(config.text_config, "attn_logit_softcapping", None) is not None
    layers = [layer_shape(layer, has_softcap) for layer in tower.layers]
    mlp, head = tower.timestep_embedding.mlp, tower.head
    return TowerShape(
        experts=tuple(
            tuple(layers[index] for index in config.expert_layers(expert)) for expert in range(config.num_experts)
        ),
        latent_channels=config.latent_channels,
        patch_size=config.latent_patch_size,
        kernel_size=config.latent_kernel_size,
        trains_embedding=_is_trained(tower.latent_embedding),
        timestep_embedding=(projection(mlp.linear_1), projection(mlp.linear_2)),
        head_modulation=projection(head.modulation),
        head=projection(head.proj),
        trains_head_norm=_is_trained(head.norm),
        residual_attention=config.residual_attention,
        is_fused=config._attn_implementation != "eager" and not has_softcap,
    )


def layer_shape(layer: Any, has_softcap: bool = False) -> LayerShape:
    """The shape of one layer of the tower.

    Raises:
        `ValueError`: as for [`tower_shape`].
    """
    check_linear(layer)
    norm = type(layer.attention_post_norm).__name__
    if not norm.endswith("RMSNorm"):
        raise ValueError(f"the memory of a {norm} is not known; use a backbone with RMSNorm.")
    names = projection_names(layer)
    own = [name for name in names if name in ("modulation", "self_attn.residual_gate")]
    outputs = [name for name in ("self_attn.o_proj", "mlp.down_proj") if name in names]
    inputs = [name for name in names if name not in own + outputs]
    if len(outputs) != 2 or any(not name.startswith(("self_attn.", "mlp.")) for name in inputs):
        raise ValueError(f"the costs of a layer with the linear maps {names} are not known; use another backbone.")
    attention_output, mlp_output = (projection(layer.get_submodule(name)) for name in outputs)
    attention_inputs, mlp_inputs = (
        tuple(projection(layer.get_submodule(name)) for name in inputs if name.startswith(part))
        for part in ("self_attn.", "mlp.")
    )
    num_groups, head_dim = layer.context_head_shape
    num_factors, rest = divmod(sum(part.num_outputs for part in mlp_inputs), mlp_output.num_inputs)
    if rest or num_factors not in (1, 2):
        raise ValueError(f"the costs of a {type(layer.mlp).__name__} are not known; use another backbone.")
    return LayerShape(
        hidden_size=attention_output.num_outputs,
        num_heads=attention_output.num_inputs // head_dim,
        num_groups=num_groups,
        head_dim=head_dim,
        attention_inputs=attention_inputs,
        attention_output=attention_output,
        mlp_inputs=mlp_inputs,
        mlp_output=mlp_output,
        modulation=projection(layer.modulation),
        gate=projection(layer.self_attn.residual_gate) if layer.has_residual else None,
        trains_norms=_is_trained(layer.attention_post_norm),
        has_head_norms=any(name in ("q_norm", "k_norm") for name, _ in layer.self_attn.named_children()),
        is_gated=num_factors == 2,
        is_parallel=layer.is_parallel,
        has_softcap=has_softcap,
    )


def decoder_shape(vlm: Any) -> DecoderShape:
    """The shapes of a backbone's decoder.

    Raises:
        `ValueError`: as for [`tower_shape`].
    """
    decoder = find_decoder(vlm)
    weights = []
    for layer in decoder.layers:
        check_linear(layer)
        parts = [projection(layer.get_submodule(name)) for name in projection_names(layer)]
        weights.append(sum(part.num_inputs * part.num_outputs for part in parts))
    attention, config = decoder.layers[0].self_attn, decoder.config
    num_heads = config.num_attention_heads
    return DecoderShape(tuple(weights), num_heads, num_heads // attention.num_key_value_groups, attention.head_dim)


def projection(module: Any) -> Projection:
    """A linear map, or one with a low-rank adapter of peft."""
    linear = getattr(module, "base_layer", module)
    rank = sum(part.out_features for part in getattr(module, "lora_A", {}).values())
    return Projection(linear.in_features, linear.out_features, linear.weight.requires_grad, rank)


def projection_names(layer: nn.Module) -> list[str]:
    """The names of the linear maps of a layer, in the order of use; one with an adapter is one."""
    return [
        name.removesuffix(".base_layer")
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]


def check_linear(layer: nn.Module) -> None:
    """
    Raises:
        `ValueError`: if a layer has matrices that are not those of linear maps.
    """
    linear = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    others = [name for name, weight in layer.named_parameters() if weight.ndim > 1 and name not in linear]
    if others:
        raise ValueError(
            f"the costs of a {type(layer).__name__} are not known: it has weights that are not linear maps, "
            f"{others[:3]}, as a mixture of experts has; use a backbone with a dense feed-forward part."
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
