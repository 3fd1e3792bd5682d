# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One expert's velocity as a program of `torch.export`: its own layers and what all experts share, nothing else."""

import copy
from typing import Any

import torch
from torch import nn

from .backbone import check_positions, with_fixed_frequencies
from .context import LatteFlowContext


class ExpertVelocity(nn.Module):
    """The velocity of one expert, from tensors alone. The weights are those of the model, not copies.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model.
        expert (`int`): the expert.

    Raises:
        `ValueError`: if there is no such expert.
    """

    def __init__(self, model: Any, expert: int):
        super().__init__()
        self.layers = model.expert_layers(expert)
        tower = copy.copy(model.tower)
        tower._modules = {
            **model.tower._modules,
            "layers": nn.ModuleList(model.tower.layers[index] for index in self.layers),
            "rotary_emb": with_fixed_frequencies(model.tower.rotary_emb),
        }
        # Checked outside of the program, since it depends on the data.
        self.max_positions, tower.max_positions = tower.max_positions, None
        # Of a model with this expert alone.
        tower.config = copy.copy(model.tower.config)
        tower.config.num_experts = 1
        tower.config.layers_per_expert = [len(self.layers)]
        tower.config.tower_layers = [model.config.tower_layers[index] for index in self.layers]
        self.tower = tower

    def inputs(self, latents: torch.Tensor, timestep: float, context: LatteFlowContext) -> dict[str, Any]:
        """The arguments of `forward` for the arguments of `predict_velocity`.

        Raises:
            `ValueError`: if prompt and latents are so long that dynamic rotary frequencies would change.
        """
        side = max(latents.shape[2:]) // self.tower.config.latent_patch_size
        check_positions(context.next_position + side - 1, self.max_positions)
        return {
            "latents": latents,
            "timestep": torch.full((len(latents),), float(timestep), device=latents.device),
            "keys": tuple(context.keys[index] for index in self.tower.config.tower_layers),
            "values": tuple(context.values[index] for index in self.tower.config.tower_layers),
            "attention_mask": context.attention_mask,
            "next_position": context.next_position,
        }

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        keys: tuple[torch.Tensor, ...],
        values: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor,
        next_position: torch.Tensor,
    ) -> torch.Tensor:
        """Same as `predict_velocity` of the expert.

        Args:
            latents (`torch.Tensor`): (B, C, height, width).
            timestep (`torch.Tensor`): (B,), from 0 to 1000.
            keys, values (`tuple[torch.Tensor, ...]`): of the backbone's layers that those of the expert
                mirror, (B, G, T, d) each.
            attention_mask (`torch.Tensor`): (B, T), bool, `False` at padding.
            next_position (`torch.Tensor`): (B,).

        Returns:
            `torch.Tensor`: (B, C, height, width).
        """
        # In a whole context, layers are found by their index in the backbone.
        context_keys = dict(zip(self.tower.config.tower_layers, keys, strict=True))
        context_values = dict(zip(self.tower.config.tower_layers, values, strict=True))
        context = LatteFlowContext(context_keys, context_values, attention_mask, next_position, has_padding=True)  # type: ignore[arg-type]
        return self.tower(latents, timestep, 0, context)


def export_expert(
    model: Any, expert: int, height: int | None = None, width: int | None = None
) -> torch.export.ExportedProgram:
    """The velocity of one expert as a program, for latents of one size and any number of images and prompt tokens.

    Each image has a prompt of its own. With guidance both branches are one batch, as in the pipeline. Active adapters
    become part of the program.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model.
        expert (`int`): the expert.
        height, width (`int`, *optional*): in latent pixels; default to `config.sample_size`.

    Returns:
        `torch.export.ExportedProgram`: takes what [`ExpertVelocity.inputs`] gives, for 2 images and 2 tokens or more.
        `torch.export.save` writes it with the weights of this expert and of what all experts share.

    Raises:
        `ValueError`: if there is no such expert, a size does not fit, or off-loading or layerwise casting is enabled.
    """
    module = ExpertVelocity(model, expert).eval()
    if getattr(model.tower, "expert_offload", None) is not None or any(
        "_hf_hook" in part.__dict__ or "_diffusers_hook" in part.__dict__ for part in module.modules()
    ):
        raise ValueError("off-loading or layerwise casting hooks the tower; export from a model without it.")
    # Of the example only shapes matter, and which inputs are one tensor: they would be one input of the program.
    num_images, num_tokens = 3, 11
    weight = module.tower.head.norm.weight
    num_groups, head_dim = module.tower.layers[0].context_head_shape
    shape = (num_images, num_groups, num_tokens, head_dim)
    num_layers = model.config.text_config.num_hidden_layers
    context = LatteFlowContext(
        tuple(weight.new_zeros(shape) for _ in range(num_layers)),
        tuple(weight.new_zeros(shape) for _ in range(num_layers)),
        torch.ones(num_images, num_tokens, dtype=torch.bool, device=weight.device),
        torch.full((num_images,), num_tokens, device=weight.device),
        has_padding=True,
    )
    size = [model.config.sample_size if side is None else side for side in (height, width)]
    latents = weight.new_zeros(num_images, model.config.latent_channels, *size)
    model._check_latents(latents, num_images)
    images, tokens = torch.export.Dim("images", min=2), torch.export.Dim("tokens", min=2)
    per_layer = ({0: images, 2: tokens},) * len(module.layers)
    dynamic_shapes = {
        "latents": {0: images},
        "timestep": {0: images},
        "keys": per_layer,
        "values": per_layer,
        "attention_mask": {0: images, 1: tokens},
        "next_position": {0: images},
    }
    with torch.no_grad():
        return torch.export.export(
            module, (), module.inputs(latents, 500.0, context), dynamic_shapes=dynamic_shapes, strict=True
        )
