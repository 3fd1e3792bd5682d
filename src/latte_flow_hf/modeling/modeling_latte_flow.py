# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""LaTtE-Flow (arXiv 2506.06952): image generation beside a frozen vision-language model.

What is unusual here: the backbone (`self.vlm`) is the stock transformers model, unchanged, and the generation tower
does not run through it. The tower reads the keys and values that the backbone has left in its cache after one prefill
of the prompt. At each sampling step only one contiguous group of its layers runs: the expert of that timestep.

Shapes: B images, P prompts, N latent tokens, T prompt tokens, D hidden size, H heads, G key-value heads, d head size,
E size of the timestep embedding, S timesteps, K experts.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import AutoModelForImageTextToText, Cache, GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

# `PreTrainedModel` must be visible here: diffusers looks for the known base class in the module of a component.
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from ..files import check_files, component_subfolder
from .adapters import LatteFlowAdapterMixin
from .attention import attend_to_context, check_attention_implementation
from .backbone import (
    TOLERANCE,
    DecoderStates,
    check_positions,
    check_vlm,
    copied_modules,
    find_decoder,
    kinds_of_layers,
    layer_type,
    max_positions,
    new_layer,
    rotary_cos_sin,
    rotates_pairs,
    shrink_text_config,
    sliding_window,
    small_models,
    tower_text_config,
    with_weights,
)
from .configuration_latte_flow import LatteFlowConfig
from .context import LatteFlowContext, prefill_context
from .conversion_mapping import CHECKPOINT_CONVERSIONS
from .distributed import all_gather_list
from .flow_matching import (
    expert_of_sigma,
)
from .generation import LatteFlowGenerationMixin
from .layerwise_casting import LatteFlowLayerwiseCastingMixin
from .losses import LatteFlowLossMixin
from .positions import interleaved_rotary_embedding, sincos_pos_embed


logger = logging.get_logger(__name__)

register_checkpoint_conversion_mapping("latte_flow", CHECKPOINT_CONVERSIONS, overwrite=True)


@dataclass
class LatteFlowModelOutput(ModelOutput):
    """Output of a training step.

    Args:
        loss (`torch.Tensor`): scalar, the sum of `flow_loss` and, with `labels`, `lm_loss`.
        flow_loss (`torch.Tensor`): scalar, the mean squared error of the velocity, summed over the experts. (Paper.)
        expert_losses (`torch.Tensor`): (K,), detached, the summand of each expert; 0 for one that does not learn.
        lm_loss (`torch.Tensor`, *optional*): scalar, the backbone's own loss on `labels`.
        logits (`torch.Tensor`, *optional*): (B, T, vocabulary), with `labels` only.
    """

    loss: torch.Tensor | None = None
    flow_loss: torch.Tensor | None = None
    expert_losses: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class LatteFlowLatentEmbedding(nn.Module):
    """Latents to tokens: a convolution with one output pixel per token.

    A token sees its own patch of `latent_patch_size` x `latent_patch_size` latent pixels or, with a larger
    `latent_kernel_size`, an overlapping patch of that size around it, with zeros outside of the image.
    """

    def __init__(self, config: LatteFlowConfig):
        super().__init__()
        self.proj = nn.Conv2d(
            config.latent_channels,
            config.text_config.hidden_size,
            kernel_size=config.latent_kernel_size,
            stride=config.latent_patch_size,
            padding=(config.latent_kernel_size - config.latent_patch_size) // 2,
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, N, D), row by row."""
        # Contiguous, or linear layers would choose their kernel, and with it the last bits of the result, by whether
        # a weight requires gradients.
        return self.proj(latents).flatten(2).transpose(1, 2).contiguous()


class LatteFlowTimestepEmbedding(nn.Module):
    """timestep (S,) in 0 to 1000 -> (S, E), after the SiLU that comes before every modulation (as in DiT)."""

    def __init__(self, config: LatteFlowConfig):
        super().__init__()
        self.frequencies = Timesteps(config.timestep_frequency_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(config.timestep_frequency_dim, config.timestep_embed_dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = self.frequencies(timestep).to(self.mlp.linear_1.weight.dtype)
        return nn.functional.silu(self.mlp(frequencies))


@dataclass
class LatteFlowLayout:
    """Where the latents are, in the image and after the prompt; the same at every sampling step.

    Args:
        pos_embed (`torch.Tensor`): (N, D), added to the embedded latents.
        position_embeddings (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            By kind of layer (`"full_attention"`, `"sliding_attention"`), rotary cos and sin of queries and keys,
            (B, N, d), or as many features as the backbone rotates.
        position_ids (`torch.Tensor`): (B, N), the first position after the prompt. Backbones that scale queries by
            their position (Ministral 3) scale those of all latents as that of the next token.
        attention_mask (`dict[str, Any]`): By kind of layer, the mask that hides the padding of the prompts and what is
            outside of a sliding window; `None` if there is nothing to hide. With residual attention (P, 1, 1, T),
            added to the scores: 0, or -inf where hidden. Without it, the mask over all T + N keys in the form that the
            chosen attention implementation takes.
    """

    pos_embed: torch.Tensor
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    position_ids: torch.Tensor
    attention_mask: dict[str, Any]


class LatteFlowLayerModulation(NamedTuple):
    """The part of a layer that depends on the timestep alone.

    Args:
        vectors (`torch.Tensor`): (S, 4 * D), the four modulation vectors.
        gate (`torch.Tensor` or `None`): (S, H) in (-1, 1), the gate of the residual attention.
    """

    vectors: torch.Tensor
    gate: torch.Tensor | None


@dataclass
class LatteFlowModulation:
    """The modulation of all layers of one expert, and of the head, at S timesteps.

    `modulation[s]` is that of timestep number s, for all images (S = 1).

    Args:
        layers (`list[LatteFlowLayerModulation]`): of each layer of the expert.
        head (`torch.Tensor`): (S, 2 * D).
    """

    layers: list[LatteFlowLayerModulation]
    head: torch.Tensor

    def __getitem__(self, step: int) -> "LatteFlowModulation":
        row = slice(step, step + 1)
        layers = [
            LatteFlowLayerModulation(layer.vectors[row], None if layer.gate is None else layer.gate[row])
            for layer in self.layers
        ]
        return LatteFlowModulation(layers, self.head[row])

    @classmethod
    def cat(cls, modulations: Sequence["LatteFlowModulation"]) -> "LatteFlowModulation":
        """The timesteps of several modulations of one expert, one after the other: one for each image of a batch."""

        def cat_layer(layers: Sequence[LatteFlowLayerModulation]) -> LatteFlowLayerModulation:
            gates = [layer.gate for layer in layers if layer.gate is not None]
            return LatteFlowLayerModulation(
                torch.cat([layer.vectors for layer in layers]), torch.cat(gates) if gates else None
            )

        return cls(
            [cat_layer(layers) for layers in zip(*(modulation.layers for modulation in modulations))],
            torch.cat([modulation.head for modulation in modulations]),
        )


class LatteFlowLayer(GradientCheckpointingLayer):
    """One generation layer, in the order of the paper's figure, with its four modulation vectors a, b, c, d.

    x <- x + a(t) * norm(attention(norm(x)))
    x <- x + d(t) * norm(feed_forward((1 + b(t)) * norm(x) + c(t)))

    All four are zero at the start of training, so that a new layer is the identity. (Chosen: as in DiT.)

    Attention, feed-forward and norms are modules of the backbone's own classes. Where the backbone has a norm after
    attention or feed-forward, too (Gemma, GLM-4), it is the one of the figure; else that norm is new. Where attention
    and feed-forward stand side by side (Cohere), they do so here, and both see the first norm.

    Args:
        config (`LatteFlowConfig`): the configuration of the model.
        text_config (`PreTrainedConfig`): that of the backbone's decoder, for the attention of the tower.
        source (`nn.Module`): the backbone's decoder layer, which is mirrored.
        source_index (`int`): its index in the backbone.
        is_first (`bool`): whether this is the first layer of its expert, which has no map of a layer before it.
    """

    def __init__(
        self,
        config: LatteFlowConfig,
        text_config: PreTrainedConfig,
        source: nn.Module,
        source_index: int,
        is_first: bool,
    ):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.source_index = source_index
        self.layer_type = layer_type(text_config, source_index)
        # Modules that `from_vlm` copies from the backbone's layer, and their names there. All others are new.
        self.copied_modules = copied_modules(source, self.layer_type)
        parts = new_layer(source, text_config, source_index)

        def norm(name: str, otherwise: nn.Module) -> nn.Module:
            name = self.copied_modules.get(name, "")
            return parts.get_submodule(name) if name else copy.deepcopy(otherwise)

        self.attention_norm = norm("attention_norm", parts)
        self.self_attn = parts.self_attn
        self.num_key_value_groups = parts.self_attn.num_key_value_groups
        # G and d of the keys and values of the prompt that this layer attends to.
        num_key_value_heads = text_config.num_attention_heads // self.num_key_value_groups
        self.context_head_shape = (num_key_value_heads, parts.self_attn.head_dim)
        self.residual_attention = config.residual_attention
        self.has_residual = config.residual_attention is not None and not is_first
        if self.has_residual:
            num_heads = text_config.num_attention_heads
            self.self_attn.residual_gate = nn.Linear(config.timestep_embed_dim, num_heads)
        self.attention_post_norm = norm("attention_post_norm", self.attention_norm)
        self.is_parallel = "mlp_norm" not in self.copied_modules
        if not self.is_parallel:
            self.mlp_norm = norm("mlp_norm", parts)
        self.mlp = parts.mlp
        self.mlp_post_norm = norm("mlp_post_norm", self.attention_norm)
        self.modulation = nn.Linear(config.timestep_embed_dim, 4 * config.text_config.hidden_size)

    def copy_from(self, source: nn.Module) -> None:
        """Copy the weights of the backbone's decoder layer."""
        for name, source_name in self.copied_modules.items():
            weights = source.get_submodule(source_name).state_dict()
            problems = self.get_submodule(name).load_state_dict(weights, strict=False)
            assert not problems.unexpected_keys and {"residual_gate.weight", "residual_gate.bias"} >= set(
                problems.missing_keys
            )

    def attend(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention function of this layer; `inputs` are those of [`attention.attend_to_context`]."""
        return attend_to_context(self.residual_attention, self, *inputs)

    def modulate(self, timestep_embedding: torch.Tensor) -> LatteFlowLayerModulation:
        """The modulation of this layer at the timesteps of `timestep_embedding` (S, E)."""
        gate = None
        if self.has_residual:
            gate = torch.tanh(self.self_attn.residual_gate(timestep_embedding))
        return LatteFlowLayerModulation(self.modulation(timestep_embedding), gate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep_embedding: torch.Tensor | None,
        previous_scores: torch.Tensor | None = None,
        modulation: LatteFlowLayerModulation | None = None,
        *,
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        attention_mask: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor`): (B, N, D).
            timestep_embedding (`torch.Tensor`, *optional*): (1 or B, E); not needed with `modulation`.
            previous_scores (`torch.Tensor`, *optional*): (B, H, N, N), the attention map of the layer before.
            modulation ([`LatteFlowLayerModulation`], *optional*): computed from `timestep_embedding` if not given.
            context_keys, context_values (`torch.Tensor`): (P, G, T, d); each prompt serves B / P images in a row.
            attention_mask (*optional*), position_embeddings (`tuple[torch.Tensor, torch.Tensor]`), position_ids
                (`torch.Tensor`): as in [`LatteFlowLayout`], for this kind of layer.

        Inputs that carry gradients are positional: reentrant gradient checkpointing ignores keyword arguments.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: (B, N, D), and this layer's attention map (B, H, N, N), `None`
            without residual attention.
        """
        if modulation is None:
            assert timestep_embedding is not None
            modulation = self.modulate(timestep_embedding)
        attention_scale, mlp_scale_in, mlp_shift_in, mlp_scale = modulation.vectors.unsqueeze(1).chunk(4, dim=-1)
        residual = None
        if self.has_residual and previous_scores is not None and modulation.gate is not None:
            residual = modulation.gate[:, :, None, None] * previous_scores

        normed = self.attention_norm(hidden_states)
        attention_output, scores = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            context_keys=context_keys,
            context_values=context_values,
            residual=residual,
            attend=self.attend,
        )
        hidden_states = hidden_states + attention_scale * self.attention_post_norm(attention_output)

        mlp_input = normed if self.is_parallel else self.mlp_norm(hidden_states)
        mlp_output = self.mlp((1.0 + mlp_scale_in) * mlp_input + mlp_shift_in)
        hidden_states = hidden_states + mlp_scale * self.mlp_post_norm(mlp_output)
        return hidden_states, scores


class LatteFlowHead(nn.Module):
    """Tokens to velocity: norm, scale and shift by the timestep, a linear map that is zero at the start of training.

    Args:
        config (`LatteFlowConfig`): the configuration of the model.
        norm (`nn.Module`): a norm of the backbone's class, which is copied.
    """

    def __init__(self, config: LatteFlowConfig, norm: nn.Module):
        super().__init__()
        self.patch_size = config.latent_patch_size
        hidden_size = config.text_config.hidden_size
        self.norm = copy.deepcopy(norm)
        self.modulation = nn.Linear(config.timestep_embed_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, config.latent_channels * self.patch_size**2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep_embedding: torch.Tensor | None,
        height: int,
        width: int,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, D) -> (B, C, height, width), in latent pixels; `modulation` (1, 2 * D) as in [`LatteFlowLayer`]."""
        if modulation is None:
            modulation = self.modulation(timestep_embedding)
        scale, shift = modulation.unsqueeze(1).chunk(2, dim=-1)
        patches = self.proj((1.0 + scale) * self.norm(hidden_states) + shift).transpose(1, 2)
        patches = patches.unflatten(2, (height // self.patch_size, width // self.patch_size))
        return nn.functional.pixel_shuffle(patches, self.patch_size)


class LatteFlowTower(nn.Module):
    """The trainable replica of the decoder's layers, and what all experts share: embeddings and head.

    Args:
        config (`LatteFlowConfig`): the configuration of the model.
        decoder (`nn.Module`): the backbone's decoder, whose layers are mirrored.
        rotates_pairs (`bool`): see [`backbone.rotates_pairs`].
    """

    def __init__(self, config: LatteFlowConfig, decoder: Any, rotates_pairs: bool):
        super().__init__()
        self.config = config
        self.latent_embedding = LatteFlowLatentEmbedding(config)
        self.timestep_embedding = LatteFlowTimestepEmbedding(config)
        # A copy, so that the tower runs while the backbone is off-loaded.
        self.rotary_emb = copy.deepcopy(decoder.rotary_emb)
        text_config = tower_text_config(decoder.config)
        first_layers = {config.expert_layers(expert)[0] for expert in range(config.num_experts)}
        self.layers = nn.ModuleList(
            LatteFlowLayer(config, text_config, decoder.layers[source], source, is_first=index in first_layers)
            for index, source in enumerate(config.tower_layers)
        )
        self.windows = {layer.layer_type: sliding_window(text_config, layer.layer_type) for layer in self.layers}
        self.max_positions = max_positions(text_config)
        self.rotates_pairs = rotates_pairs
        self.head = LatteFlowHead(config, self.layers[0].attention_norm)

    def expert_layers(self, expert: int) -> range:
        """The indices of the layers of expert `expert`."""
        return self.config.expert_layers(expert)

    def modulate(self, timesteps: torch.Tensor, expert: int) -> LatteFlowModulation:
        """The modulation of one expert at `timesteps` (S,): one matrix product for each layer, whatever S is."""
        timestep_embedding = self.timestep_embedding(timesteps)
        return LatteFlowModulation(
            [self.layers[index].modulate(timestep_embedding) for index in self.expert_layers(expert)],
            self.head.modulation(timestep_embedding),
        )

    def layout(self, latents: torch.Tensor, context: LatteFlowContext) -> LatteFlowLayout:
        """The layout of latents like these, (B, C, height, width), after the prompts of `context`.

        Raises:
            `ValueError`: if the last position is one that the backbone has no fixed rotary frequencies for.
        """
        height, width = (side // self.config.latent_patch_size for side in latents.shape[2:])
        check_positions(context.next_position + max(height, width) - 1, self.max_positions)
        next_position = context.next_position.repeat_interleave(len(latents) // len(context))

        def position_embeddings(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
            def rotary_emb(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                positions = positions.expand(3, -1, -1) if self.config.has_mrope else positions
                return rotary_cos_sin(self.rotary_emb, latents, positions, kind)

            return interleaved_rotary_embedding(rotary_emb, next_position, height, width, self.rotates_pairs)

        return LatteFlowLayout(
            sincos_pos_embed(self.config.text_config.hidden_size, height, width, latents.device, latents.dtype),
            {kind: position_embeddings(kind) for kind in self.windows},
            next_position[:, None].expand(-1, height * width),
            {kind: self._attention_mask(height * width, latents, context, kind) for kind in self.windows},
        )

    def _attention_mask(self, num_latents: int, latents: torch.Tensor, context: LatteFlowContext, kind: str) -> Any:
        """The mask for one kind of layer, as described in [`LatteFlowLayout`].

        A layer with a sliding window shows latents what it would show the first token after the prompt. (Chosen: the
        backbone's mask, since its keys were trained for these distances. The latents see all of each other.)
        """
        visible, has_hidden = context.attention_mask, context.has_padding
        window = self.windows[kind]
        # With padding there is a mask anyway, and an exported program has no limit to its number of tokens.
        if window is not None and (has_hidden or visible.shape[1] >= window):
            has_hidden = True
            # Of each token, its distance from the first token after the prompt.
            visible = visible & (visible.flip(1).cumsum(1).flip(1) < window)
        if not has_hidden:
            return None
        if self.config.residual_attention is not None:
            mask = torch.zeros_like(visible, dtype=latents.dtype)
            return mask.masked_fill(~visible, float("-inf"))[:, None, None]
        context_mask = visible.repeat_interleave(len(latents) // len(context), dim=0)
        keys_mask = nn.functional.pad(context_mask, (0, num_latents), value=True)
        # Only the shape, dtype and device of these two matter.
        queries = latents.new_empty(len(latents), num_latents, 1)
        keys = latents.new_empty(len(latents), keys_mask.shape[1], 1)
        return create_bidirectional_mask(self.config, queries, keys_mask, encoder_hidden_states=keys)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        expert: int,
        context: LatteFlowContext,
        modulation: LatteFlowModulation | None = None,
        layout: LatteFlowLayout | None = None,
    ) -> torch.Tensor:
        """The velocity of `latents` (B, C, height, width), by the layers of one expert alone.

        `timestep` is (1,) or (B,). `modulation` and `layout` are computed here if they are not given.
        """
        if layout is None:
            layout = self.layout(latents, context)
        timestep_embedding = self.timestep_embedding(timestep) if modulation is None else None

        hidden_states = self.latent_embedding(latents) + layout.pos_embed
        expert_layers = self.expert_layers(expert)
        first_layer = self.layers[expert_layers[0]]
        if first_layer.training and first_layer.gradient_checkpointing and torch.is_grad_enabled():
            # Reentrant checkpointing passes gradients on only if an input needs some, and the embedding may be frozen.
            hidden_states.requires_grad_(True)
        scores = None
        for position, index in enumerate(expert_layers):
            layer: Any = self.layers[index]
            hidden_states, scores = layer(
                hidden_states,
                timestep_embedding,
                scores,
                None if modulation is None else modulation.layers[position],
                context_keys=context.keys[layer.source_index],
                context_values=context.values[layer.source_index],
                attention_mask=layout.attention_mask[layer.layer_type],
                position_embeddings=layout.position_embeddings[layer.layer_type],
                position_ids=layout.position_ids,
            )
        head_modulation = None if modulation is None else modulation.head
        return self.head(hidden_states, timestep_embedding, *latents.shape[2:], modulation=head_modulation)


def check_backbone(config: LatteFlowConfig) -> bool:
    """Check that the tower's layers are those of the backbone: with the same weights, the modulation neutral and the
    latent in the place of the next token, the same output.

    The layers are compared at a small size, for each kind of them, with a decoder of the backbone's own class as
    oracle. Nothing of the full size is made, and the result is kept for the next model of the same configuration.

    Returns:
        `bool`: whether its rotary embedding rotates pairs, see [`backbone.rotates_pairs`].

    Raises:
        `ValueError`: if a layer cannot be mirrored, or its output differs.
    """
    key = (config.vlm_config.to_json_string(use_diff=False), config.residual_attention)
    if key not in _CHECKED:
        _CHECKED[key] = _check_mirrored(config.vlm_config, config.residual_attention)
    return _CHECKED[key]


# Results of `check_backbone`, by the configuration of the backbone and the kind of residual attention.
_CHECKED: dict[tuple[str, str | None], bool] = {}


def _check_mirrored(vlm_config: PreTrainedConfig, residual_attention: str | None) -> bool:
    with torch.device("meta"):
        decoder = find_decoder(AutoModelForImageTextToText.from_config(copy.deepcopy(vlm_config)))
    for index, layer in enumerate(decoder.layers):
        copied_modules(layer, layer_type(decoder.config, index))
    kinds = kinds_of_layers(decoder)
    try:
        small = LatteFlowConfig(
            vlm_config=copy.deepcopy(vlm_config), num_experts=1, residual_attention=residual_attention
        )
        shrink_text_config(small.text_config, num_layers=max(kinds.index(kind) for kind in kinds) + 1)
        small.tower_layers = list(range(small.text_config.num_hidden_layers))
        small.layers_per_expert = [len(small.tower_layers)]
        small.timestep_embed_dim, small._attn_implementation = 1, "eager"
        with small_models():
            states = DecoderStates.of(type(decoder), small.text_config)
            (pairs,) = {rotates_pairs(states.decoder.rotary_emb, kind) for kind, *_ in kinds}
            tower = with_weights(LatteFlowTower(small, states.decoder, pairs))
            differences = _differences_of_layers(tower, states)
    except Exception as error:
        raise ValueError(
            f"the backbone's decoder layer {type(decoder.layers[0]).__name__} cannot be mirrored: the attempt to do "
            f"so at a small size failed with {type(error).__name__}: {error}"
        ) from error
    for index, difference in enumerate(differences):
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the backbone's decoder layer {index}, {type(decoder.layers[index]).__name__} "
                f"({tower.layers[index].layer_type}), cannot be mirrored: the output of a layer of the tower with the "
                f"same weights differs from it by {difference:.2g} standard deviations (at most {TOLERANCE:g})."
            )
    return tower.rotates_pairs


@torch.no_grad()
def _differences_of_layers(tower: "LatteFlowTower", states: DecoderStates) -> list[float]:
    """How far each layer of the tower is from the backbone's, relative to the standard deviation of the output."""
    num_context, hidden_size = DecoderStates.num_context, tower.config.text_config.hidden_size
    context = LatteFlowContext(
        tuple(states.keys),
        tuple(states.values),
        torch.ones(1, num_context, dtype=torch.bool),
        torch.tensor([num_context]),
        has_padding=False,
    )
    side = tower.config.latent_patch_size
    layout = tower.layout(torch.zeros(1, tower.config.latent_channels, side, side), context)
    one, zero = torch.ones(1, hidden_size), torch.zeros(1, hidden_size)
    neutral = LatteFlowLayerModulation(torch.cat([one, zero, zero, one], dim=1), None)
    differences = []
    for index, layer in enumerate(tower.layers):
        layer.copy_from(states.decoder.layers[index])
        for name in {"attention_post_norm", "mlp_post_norm"} - layer.copied_modules.keys():
            setattr(layer, name, nn.Identity())
        output, _ = layer(
            states.inputs[index],
            None,
            None,
            neutral,
            context_keys=states.keys[index],
            context_values=states.values[index],
            attention_mask=layout.attention_mask[layer.layer_type],
            position_embeddings=layout.position_embeddings[layer.layer_type],
            position_ids=layout.position_ids,
        )
        expected = states.outputs[index]
        differences.append(float((output - expected).abs().max() / expected.std()))
    return differences


# Linear maps that are zero at the start of training: a new layer is then the identity and a new velocity zero.
ZERO_INITIALIZED = ("modulation", "residual_gate", "head.proj")


class LatteFlowPreTrainedModel(PreTrainedModel):
    config_class = LatteFlowConfig
    config: LatteFlowConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The loss is a mean of means: the Trainer divides it by the number of accumulated batches, not of tokens.
    accepts_loss_kwargs = False
    _no_split_modules = ["LatteFlowLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # diffusers' group off-loading: the tower layer by layer, the backbone as a whole.
    _group_offload_block_modules = ["vlm", "tower"]
    # Not quantized: small, and the size of every layer's output depends on them.
    _keep_in_fp32_modules = [
        r"tower\.(timestep_embedding|latent_embedding|head)",
        r"tower\.layers\.\d+\.(modulation|self_attn\.residual_gate)",
    ]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """Same as `PreTrainedModel`, but modules that are never quantized keep the dtype of the rest in float16."""
        plan = super()._get_dtype_plan(dtype)
        return {
            name: kept for name, kept in plan.items() if name not in LatteFlowPreTrainedModel._keep_in_fp32_modules
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As the backbone does it: zeros are neutral in the norms of Gemma.
        self.get_decoder()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            # Xavier-uniform, as for a linear map of flattened patches (as in DiT).
            bound = math.sqrt(3.0) * math.sqrt(2.0 / (module.weight[0].numel() + len(module.weight)))
            init.uniform_(module.weight, -bound, bound)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Same as `PreTrainedModel.initialize_weights`, but the maps of `ZERO_INITIALIZED` are zero."""
        super().initialize_weights()
        for name, module in self.named_modules():
            if name.startswith("tower.") and name.endswith(ZERO_INITIALIZED):
                init.zeros_(module.weight)
                init.zeros_(module.bias)


class LatteFlowForConditionalGeneration(
    LatteFlowGenerationMixin,
    LatteFlowLossMixin,
    LatteFlowLayerwiseCastingMixin,
    LatteFlowAdapterMixin,
    LatteFlowPreTrainedModel,
    GenerationMixin,
):
    """A frozen vision-language model, and beside it a tower of timestep experts that generates images.

    `self.vlm` is the backbone as transformers builds it: text through this class is text through the backbone.
    `pipeline_class` is set by the package, since pipelines are built on models: `generate` makes images with it.

    Args:
        config ([`LatteFlowConfig`]): the architecture. All weights are random; `from_vlm` starts from a backbone.
    """

    output_modalities = ("image", "text")
    pipeline_class: Any = None

    def __init__(self, config: LatteFlowConfig):
        super().__init__(config)
        pairs = check_backbone(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.tower = LatteFlowTower(config, find_decoder(self.vlm), pairs)
        # How far training widens the interval of each expert towards the data: from 0 (not) to 1 (down to sigma 0).
        self.interval_overlap = 0.0
        self.vlm.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """Same as `PreTrainedModel.from_pretrained`, but the weights must be exactly those of the model, and the
        folder or hub id may be that of a whole pipeline.

        Raises:
            `OSError`: if a local folder has no configuration, or its weights are truncated.
            `ValueError`: if weights are missing or unexpected, or have another shape. With
                `ignore_mismatched_sizes=True` weights of another shape are allowed and initialised anew.
        """
        if pretrained_model_name_or_path is not None and not kwargs.get("subfolder"):
            kwargs["subfolder"] = component_subfolder(pretrained_model_name_or_path, "model", **kwargs)
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path is not None and folder.is_dir():
            check_files(folder, "config.json|adapter_config.json")
        output_loading_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        for problem, keys in (
            ("are missing", info["missing_keys"]),
            ("are not of this model", info["unexpected_keys"]),
            (
                "have another shape (the checkpoint's, the model's)",
                () if ignore_mismatched_sizes else info["mismatched_keys"],
            ),
        ):
            if keys:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {len(keys)} weights {problem}, such as {sorted(keys)[:3]}. "
                    "They are of another architecture than its config.json. (ignore_mismatched_sizes=True allows "
                    "other shapes and initialises those weights anew.)"
                )
        if model.generation_config.eos_token_id is None:
            # diffusers does not download generation_config.json with a pipeline; without it no answer would end.
            model.generation_config = GenerationConfig.from_model_config(model.config)
        # Loading creates new parameters, which are trainable.
        model.vlm.requires_grad_(False)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """Same as `PreTrainedModel.save_pretrained`, but under the module's own names by default.

        The Trainer resumes with `load_state_dict`, which ignores a backbone that is stored under its original names.
        """
        self._check_not_cast("save_pretrained")
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    # diffusers reads the signature to decide what to pass, such as `variant` and `max_shard_size`.
    save_pretrained.__signature__ = inspect.signature(PreTrainedModel.save_pretrained)  # type: ignore[attr-defined]

    @classmethod
    def from_vlm(
        cls, vlm: PreTrainedModel, copy_layers: bool = True, **config: Any
    ) -> "LatteFlowForConditionalGeneration":
        """A new model around a loaded backbone, its tower initialised from the backbone's own layers.

        Args:
            vlm (`PreTrainedModel`): the backbone; used as it is, not copied, and frozen.
            copy_layers (`bool`, defaults to `True`):
                `False` leaves the tower's layers random. (Chosen for the embedded checkpoint: the layers of its small
                backbone learned more slowly.)
            config: arguments of [`LatteFlowConfig`] except `vlm_config`, e.g. `num_experts=4`.

        Raises:
            `ValueError`: if `vlm` is not a vision-language model of transformers with a decoder whose layers can be
                mirrored (the error tells why), or the configuration does not fit it.
        """
        check_vlm(vlm)
        latte_flow_config = LatteFlowConfig(vlm_config=copy.deepcopy(vlm.config), **config)
        model = cls(latte_flow_config)
        # The same object from here on, so that a change of the backbone's configuration is seen in the model's.
        model.config.vlm_config = vlm.config
        model.vlm = vlm.requires_grad_(False).eval()
        model.tower.to(device=vlm.device, dtype=vlm.dtype)
        model.tower.rotary_emb = copy.deepcopy(vlm.get_decoder().rotary_emb)
        if copy_layers:
            for layer in model.tower.layers:
                layer.copy_from(vlm.get_decoder().layers[layer.source_index])
        if vlm.generation_config is not None:
            model.generation_config = copy.deepcopy(vlm.generation_config)
        return model

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Same as `PreTrainedModel`, which calls this whenever an implementation is chosen."""
        if attn_implementation is not None:
            check_attention_implementation(attn_implementation)
            mode = self.config.residual_attention
            if mode is not None and attn_implementation not in ("eager", "sdpa"):
                logger.warning_once(
                    f"attn_implementation {attn_implementation!r} is used by the backbone alone: the tower runs its "
                    f"own attention, because residual_attention={mode!r} needs the attention map of every layer."
                )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Called by `pipe.enable_xformers_memory_efficient_attention()` and its counterpart."""
        if valid:
            self.set_attn_implementation("xformers")
        elif self.config._attn_implementation == "xformers":
            self.set_attn_implementation("sdpa")
        for layer in self.tower.layers:
            layer.xformers_op = attention_op

    def enable_cache(self, config: Any) -> None:
        """Refuse the caches of diffusers' `CacheMixin`, which skip layers at some steps.

        Raises:
            `ValueError`: always. They know the layers of diffusers' own models only.
        """
        raise ValueError(
            f"{type(config).__name__} is not supported: diffusers' caches find no layer of this model, or cannot "
            "store its attention maps. Use fewer steps, `steps_per_expert` or `guidance_interval` instead."
        )

    def train(self, mode: bool = True) -> "LatteFlowForConditionalGeneration":
        """Training mode for the tower, and for a backbone that is trained; a frozen one stays in evaluation mode.

        Raises:
            `ValueError`: for training mode after `enable_layerwise_casting`.
        """
        if mode:
            self._check_not_cast("train")
        super().train(mode)
        self.vlm.train(mode and any(parameter.requires_grad for parameter in self.vlm.parameters()))
        return self

    # Delegated to the backbone.

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.vlm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.vlm.get_decoder()

    def get_rope_index(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vlm.model.get_rope_index(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        context: LatteFlowContext | Mapping[str, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        states: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        negative_context: LatteFlowContext | Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> ModelOutput | tuple:
        """Without `latents` or `states` the backbone's own output, with them the training losses.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_thw, mm_token_type_ids, token_type_ids,
                pixel_attention_mask, image_sizes, batch_num_images, labels, position_ids, past_key_values,
                inputs_embeds, logits_to_keep, and anything else: as for the backbone. (The `Trainer` removes what the
                signature does not name: what processors return is named.)
            latents (`torch.Tensor`, *optional*): (B, C, height, width), clean latents of the images that the prompts
                describe, scaled as by `pipe.encode_images`.
            noise (`torch.Tensor`, *optional*): same shape as `latents`; drawn if not given.
            context ([`LatteFlowContext`] or a mapping, *optional*):
                The encoded prompts, or the arguments of `encode_context`, in place of `input_ids`. With `labels`,
                `input_ids` can then be other examples.
            generator (`torch.Generator`, *optional*): source of the noise and the timesteps.
            states, sigmas (*optional*):
                States of a teacher's trajectories, in place of `latents`, see
                [`~LatteFlowLossMixin.trajectory_loss`].
            negative_context, guidance_scale (*optional*):
                With `latents`, the guidance that the weights shall contain, see
                [`~LatteFlowLossMixin.flow_loss`].

        Raises:
            `ValueError`: if `latents` or `states` do not fit the model or the number of prompts, `noise` has another
                shape than `latents`, there is neither `input_ids` nor `context`, or arguments do not go together.
        """
        if latents is not None and states is not None:
            raise ValueError("give latents or states, not both: they are two training losses.")
        for name, value, loss_input, owner in (
            ("noise", noise, latents, "latents"),
            ("sigmas", sigmas, states, "states"),
            ("context", context, states if latents is None else latents, "latents or states"),
        ):
            if value is not None and loss_input is None:
                raise ValueError(f"{name} must be given with {owner}, and has no effect alone.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            **kwargs,
        }
        # Left out rather than `None`: not every backbone has them.
        optional = {
            "mm_token_type_ids": mm_token_type_ids,
            "token_type_ids": token_type_ids,
            "pixel_attention_mask": pixel_attention_mask,
            "image_sizes": image_sizes,
            "batch_num_images": batch_num_images,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "logits_to_keep": logits_to_keep,
        }
        inputs |= {name: value for name, value in optional.items() if value is not None}
        if latents is None and states is None:
            return self.vlm(labels=labels, **inputs)
        prompts = inputs if context is None else context
        if latents is not None:
            flow_loss, expert_losses = self.flow_loss(
                latents, prompts, noise, generator, negative_context, guidance_scale
            )
        else:
            assert states is not None
            flow_loss, expert_losses = self.trajectory_loss(states, sigmas, prompts, generator)
        output = LatteFlowModelOutput(loss=flow_loss, flow_loss=flow_loss, expert_losses=expert_losses)
        if labels is not None:
            lm_output = self.vlm(labels=labels, **inputs)
            # The loss is a mean over tokens: weighted, so that the mean over processes is the mean over all tokens.
            targets = labels[:, 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
            num_tokens = int((targets != -100).sum())
            all_num_tokens = all_gather_list([num_tokens])
            output.lm_loss = lm_output.loss * (len(all_num_tokens) * num_tokens / max(sum(all_num_tokens), 1))
            output.logits = lm_output.logits
            output.loss = flow_loss + output.lm_loss
        return output

    @apply_forward_hook
    @torch.no_grad()
    def encode_context(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        num_layers: int | None = None,
        **vision_inputs: torch.Tensor | None,
    ) -> LatteFlowContext:
        """Prefill the prompts once.

        Args:
            input_ids, attention_mask (`torch.Tensor`): (P, T); padding on either side.
            mm_token_type_ids (`torch.Tensor`, *optional*): (P, T), 1 at image tokens, as the processor returns it;
                required with images.
            num_layers (`int`, *optional*): prefill the first layers of the decoder only, for experts that end there.
            vision_inputs: what else the processor returns, such as `pixel_values` and `image_grid_thw`.

        Returns:
            [`LatteFlowContext`]: P prompts.

        Raises:
            `ValueError`: if there are no `input_ids`, the mask has another shape, images come without
                `mm_token_type_ids`, something else is given in place of tokens, or a prompt is so long that dynamic
                rotary frequencies would change.
        """
        return prefill_context(
            self.vlm,
            self.config.has_mrope,
            input_ids,
            attention_mask,
            mm_token_type_ids,
            num_layers,
            **vision_inputs,
        )

    @apply_forward_hook
    def modulate(self, timesteps: torch.Tensor, expert: int) -> LatteFlowModulation:
        """The modulation of one expert at several timesteps at once, for `predict_velocity` at each of them.

        Args:
            timesteps (`torch.Tensor`): (S,), from 0 to 1000, all in the interval of `expert`.
            expert (`int`): the expert.

        Returns:
            [`LatteFlowModulation`]: `modulation[s]` is the one of timestep number s.
        """
        self._check_expert(expert)
        return self.tower.modulate(timesteps.float(), expert)

    def latent_layout(self, latents: torch.Tensor, context: LatteFlowContext) -> LatteFlowLayout:
        """Positions and masks for latents of this shape after these prompts, the same at every sampling step.

        Args:
            latents (`torch.Tensor`): (B, C, height, width); only its shape, dtype and device matter.
            context ([`LatteFlowContext`]): the prompts: B, or fewer that serve several images each.
        """
        self._check_latents(latents, len(context))
        return self.tower.layout(latents, context)

    @apply_forward_hook
    def predict_velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | float,
        context: LatteFlowContext,
        expert: int | None = None,
        modulation: LatteFlowModulation | None = None,
        layout: LatteFlowLayout | None = None,
    ) -> torch.Tensor:
        """The velocity (noise - data) at `latents`, by the expert that owns `timestep` alone.

        Args:
            latents (`torch.Tensor`): (B, C, height, width), noisy; cast to the dtype of the tower.
            timestep (`float` or `torch.Tensor`): from 0 to 1000, one for all or (B,); all of one expert.
            context ([`LatteFlowContext`]): the prompts: B, or fewer that serve several images each.
            expert (`int`, *optional*): the expert, for callers that know it. Found from `timestep` if not given, which
                synchronizes with an accelerator.
            modulation ([`LatteFlowModulation`], *optional*): `modulate(...)[s]` for `timestep`, computed if not given.
            layout ([`LatteFlowLayout`], *optional*): `latent_layout(latents, context)`, computed if not given.

        Returns:
            `torch.Tensor`: (B, C, height, width), in the dtype of the tower.

        Raises:
            `ValueError`: if the timesteps belong to several experts or are not from 0 to 1000, there is no such
                expert, or a shape does not fit.
        """
        self._check_latents(latents, len(context))
        # The dtype of a norm, which is never quantized.
        latents = latents.to(self.tower.head.norm.weight.dtype)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).reshape(-1)
        if len(timestep) not in (1, len(latents)):
            raise ValueError(f"timestep must be one, or one for each of {len(latents)} latents, got {len(timestep)}.")
        if expert is None:
            experts = {self.expert_of(t) for t in timestep.tolist()}
            if len(experts) != 1:
                raise ValueError(f"timestep must be in the interval of one expert, got those of {sorted(experts)}.")
            (expert,) = experts
        self._check_expert(expert)
        return self.tower(latents, timestep.expand(len(latents)), expert, context, modulation, layout)

    def expert_of(self, timestep: float) -> int:
        """The expert that owns `timestep`; expert 0 owns the noisiest interval.

        Raises:
            `ValueError`: if `timestep` is not from 0 to 1000.
        """
        return expert_of_sigma(float(timestep) / 1000.0, self.config.expert_boundaries)

    def expert_layers(self, expert: int) -> range:
        """The indices of the layers of expert `expert` in `model.tower.layers`.

        Raises:
            `ValueError`: if there is no such expert.
        """
        self._check_expert(expert)
        return self.tower.expert_layers(expert)

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert must be from 0 to {self.config.num_experts - 1}, got {expert}.")

    def _check_latents(self, latents: torch.Tensor, num_prompts: int) -> None:
        channels, patch_size = self.config.latent_channels, self.config.latent_patch_size
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must be (batch, {channels}, height, width), got {tuple(latents.shape)}.")
        if latents.shape[2] % patch_size or latents.shape[3] % patch_size:
            raise ValueError(
                f"latents must have a height and a width that are multiples of {patch_size}, got "
                f"{tuple(latents.shape[2:])}."
            )
        if not num_prompts or len(latents) % num_prompts:
            raise ValueError(
                f"context must have one prompt for each of {len(latents)} latents, or one for the same number of "
                f"latents each, got {num_prompts}."
            )
