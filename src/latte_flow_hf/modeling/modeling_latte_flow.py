# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""LaTtE-Flow (arXiv 2506.06952): image generation beside a frozen vision-language model.

What is unusual here: the backbone (`self.vlm`) is the stock transformers model, untouched, and the generation tower
never runs through it. The tower reads the keys and values that the backbone left in its cache after one prefill of the
prompt, and at each sampling step only one contiguous group of its layers runs: the expert that owns the timestep.

Shapes: B batch, N latent tokens, T prompt tokens, D hidden size, H heads, G key-value heads, d head size.
The file reads in the order data flows: embed, modulation, attention, layer, expert, tower, model.
"""

import contextlib
import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationConfig
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

# `PreTrainedModel` must be visible here: diffusers looks in a component's defining module for the base class it knows.
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.peft_utils import find_adapter_config_file

from ..files import check_files, read_json
from .adapters import check_adapter
from .configuration_latte_flow import LatteFlowConfig
from .distributed import all_gather_list, local_rows, rank_and_world_size
from .expert_offload import ExpertOffload
from .flow_matching import draw_expert_sigmas, expert_of_sigma, interpolate, velocity_loss, velocity_target


@dataclass
class LatteFlowContext:
    """A prompt as the frozen backbone sees it, from one prefill; reused at every sampling step.

    Args:
        keys, values (`tuple[torch.Tensor, ...]`): per decoder layer (B, G, T, d); keys carry their rotary position.
        attention_mask (`torch.Tensor`): (B, T), bool, `False` at padding.
        next_position (`torch.Tensor`): (B,), the first rotary position after the prompt.
        padded (`bool`): whether any of the mask is `False`; known here once, so that no step has to ask the device.

    B prompts may serve m * B pictures: the first m of them the first prompt, and so on. Nothing is copied for that.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    attention_mask: torch.Tensor
    next_position: torch.Tensor
    padded: bool

    def __len__(self) -> int:
        return self.next_position.shape[0]

    def rows(self, index: torch.Tensor) -> "LatteFlowContext":
        """The prompts at `index` (int64, any shape (n,)), in that order; the same one may come several times."""
        return LatteFlowContext(
            tuple(keys.index_select(0, index) for keys in self.keys),
            tuple(values.index_select(0, index) for values in self.values),
            self.attention_mask.index_select(0, index),
            self.next_position.index_select(0, index),
            self.padded,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LatteFlowContext":
        """The same prompts on another device; accelerate's data loaders move a batch by this name."""
        return LatteFlowContext(
            tuple(keys.to(device, non_blocking=non_blocking) for keys in self.keys),
            tuple(values.to(device, non_blocking=non_blocking) for values in self.values),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.next_position.to(device, non_blocking=non_blocking),
            self.padded,
        )

    def split(self) -> list["LatteFlowContext"]:
        """Each prompt alone, its padding on the left taken off; `cat` puts them together again."""
        alone = []
        for row, length in enumerate(self.attention_mask.sum(dim=1).tolist()):
            kept = slice(self.attention_mask.shape[1] - length, None)
            alone.append(
                LatteFlowContext(
                    tuple(keys[row : row + 1, :, kept] for keys in self.keys),
                    tuple(values[row : row + 1, :, kept] for values in self.values),
                    self.attention_mask[row : row + 1, kept],
                    self.next_position[row : row + 1],
                    padded=False,
                )
            )
        return alone

    @classmethod
    def cat(cls, contexts: Sequence["LatteFlowContext"]) -> "LatteFlowContext":
        """All prompts of several contexts in one batch, padded on the left to the longest."""
        length = max(context.attention_mask.shape[1] for context in contexts)

        def padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(tensor.shape)
            shape[dim] = length - shape[dim]
            return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor

        def joined(name: str) -> tuple[torch.Tensor, ...]:
            layers = zip(*(getattr(context, name) for context in contexts))
            return tuple(torch.cat([padded(item, 2) for item in layer]) for layer in layers)

        return cls(
            joined("keys"),
            joined("values"),
            torch.cat([padded(context.attention_mask, 1) for context in contexts]),
            torch.cat([context.next_position for context in contexts]),
            any(context.padded or context.attention_mask.shape[1] < length for context in contexts),
        )


@dataclass
class LatteFlowModelOutput(ModelOutput):
    """What a training step gives.

    Args:
        loss (`torch.Tensor`): scalar, the sum of what was asked for.
        flow_loss (`torch.Tensor`): scalar, the velocity's mean squared error summed over the experts (paper).
        expert_losses (`torch.Tensor`): (K,), each expert's own share of it, without gradients; 0 if it does not learn.
        lm_loss (`torch.Tensor`, *optional*): scalar, the backbone's own loss on `labels`.
        logits (`torch.Tensor`, *optional*): (B, T, vocabulary), with `labels` only.
    """

    loss: torch.Tensor | None = None
    flow_loss: torch.Tensor | None = None
    expert_losses: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class LatteFlowZeroLinear(nn.Linear):
    """A linear map that is zero at the start of training."""


class LatteFlowLatentEmbedding(nn.Linear):
    """Latents -> tokens: a linear map of what each token sees of the latents, plus where it lies.

    A token sees its own square of `latent_patch_size` latent pixels, or, with a larger `latent_kernel_size`, a square
    of so many around it: a convolution, with zeros beyond the edge (as in overlapping patch embeddings).

    The place is DiT's fixed 2D sine-cosine embedding. Chosen: because the backbone's M-RoPE alone leaves neighbours
    apart by almost nothing (it gives columns its lowest frequencies), and without it pictures smear along the rows.
    """

    def __init__(self, config: LatteFlowConfig):
        super().__init__(config.latent_channels * config.latent_kernel_size**2, config.text_config.hidden_size)
        self.patch_size, self.kernel_size = config.latent_patch_size, config.latent_kernel_size

    def places(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The embedding of the places of height x width tokens, (N, D)."""
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        return get_2d_sincos_pos_embed_from_grid(self.out_features, grid, output_type="pt").to(dtype)

    def forward(self, latents: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) and `places` (N, D) -> (B, N, D), row by row."""
        around = (self.kernel_size - self.patch_size) // 2
        patches = nn.functional.unfold(latents, self.kernel_size, padding=around, stride=self.patch_size)
        return super().forward(patches.transpose(1, 2)) + places


class LatteFlowTimestepEmbedding(nn.Module):
    """timestep (B,) in 0 to 1000 -> (B, E), after the SiLU that every modulation begins with."""

    def __init__(self, config: LatteFlowConfig):
        super().__init__()
        self.frequencies = Timesteps(config.timestep_frequency_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(config.timestep_frequency_dim, config.timestep_embed_dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = self.frequencies(timestep).to(self.mlp.linear_1.weight.dtype)
        return nn.functional.silu(self.mlp(frequencies))


@dataclass
class LatteFlowLayout:
    """Where latents lie, in the picture and after the prompt.

    Args:
        places (`torch.Tensor`): (N, D), what is added to the embedded latents.
        position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): rotary cos and sin of queries and keys, (B, N, d).
        context_bias (`torch.Tensor`, *optional*): (prompts, 1, 1, T), 0 or -inf (padding); `None` if none is padded.
    """

    places: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    context_bias: torch.Tensor | None


class LatteFlowSteps:
    """All steps of one call, for what they have in common: it is worked out at the first step that needs it.

    That is the layout, and whatever is a function of the timestep alone: an expert's modulations of all its steps come
    from one matrix product.

    Args:
        timesteps (`torch.Tensor`): (S,), 0 to 1000.
        experts (`list[int]`): the expert of each.
    """

    def __init__(self, timesteps: torch.Tensor, experts: list[int]):
        self.timesteps = timesteps.float()
        self.experts = experts
        self.current = 0
        self._known: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, called the first time that `key` is asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @property
    def own(self) -> list[int]:
        """The steps of the current step's expert."""
        expert = self.experts[self.current]
        return [step for step, owner in enumerate(self.experts) if owner == expert]

    @property
    def next_expert(self) -> int | None:
        """The expert that takes over after the current step; `None` if it goes on, or the call ends."""
        ahead = self.experts[self.current + 1 : self.current + 2]
        return ahead[0] if ahead and ahead[0] != self.experts[self.current] else None

    def modulate(self, linear: nn.Module, embedding: torch.Tensor) -> torch.Tensor:
        """`linear` of the current step's row of `embedding` (own steps, E): (1, outputs)."""
        row = self.own.index(self.current)
        if len(self.own) == 1:  # there is nothing to share, and a row for every picture
            return linear(embedding)
        # The head's serves every expert.
        rows = self.once((linear, self.experts[self.current]), lambda: linear(embedding))
        return rows[row : row + 1]


def _modulate(linear: nn.Module, timestep_embedding: torch.Tensor, steps: LatteFlowSteps | None) -> torch.Tensor:
    return linear(timestep_embedding) if steps is None else steps.modulate(linear, timestep_embedding)


def _linear_like(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)


def _rms_norm_like(norm: nn.Module) -> nn.Module:
    return type(norm)(norm.weight.shape[0], eps=norm.variance_epsilon)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (B, heads, N, d) by cos and sin (B, N, d), halves rotated as in Llama and Qwen."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def repeat_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, G, n, d) -> (B, H, n, d): each key-value head serves H / G query heads."""
    return states.repeat_interleave(num_heads // states.shape[1], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling * Q K^T + attention_mask) V -> (B, N, H, d) and the map (B, H, N, T + N)."""
    scores = torch.matmul(query, repeat_heads(key, query.shape[1]).transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, repeat_heads(value, query.shape[1])).transpose(1, 2), weights


def one_pass_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    context_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax([Q K_prompt^T + bias, Q K^T + residual]) [V_prompt; V], each product taken once.

    Neither keys and values are joined, nor those of a key-value head repeated for its queries, nor those of a prompt
    for its pictures: the queries that share them lie below each other in one product.

    Args:
        query: (B, H, N, d); scaled here.
        key, value: (B, G, N, d), of the latents.
        context_keys, context_values: (P, G, T, d), of the prompts; each serves B / P pictures in a row.
        context_bias: (P, 1, 1, T) or `None`.
        residual: (B, H, N, N) or `None`.

    Returns:
        (B, N, H, d), and the scores of latents to latents, residual included, (B, H, N, N).
    """
    batch, num_heads, length, size = query.shape
    prompts, groups, num_context, _ = context_keys.shape
    context_keys, context_values = context_keys.to(query.dtype), context_values.to(query.dtype)
    # (B, G, H / G * N, d) and (P, G, B / P * H / G * N, d)
    grouped = (query * scaling).reshape(batch, groups, -1, size)
    shared = grouped.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, num_heads, length, length)
    if residual is not None:
        scores = scores + residual
    to_context = torch.matmul(shared, context_keys.transpose(2, 3))
    if context_bias is not None:
        to_context = to_context + context_bias
    to_context = to_context.unflatten(2, (batch // prompts, -1)).transpose(1, 2)
    to_context = to_context.reshape(batch, num_heads, length, num_context)
    weights = torch.cat([to_context, scores], dim=-1)
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    from_context, from_latents = weights.view(batch, groups, -1, num_context + length).split([num_context, length], -1)
    from_context = from_context.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)
    output = torch.matmul(from_context, context_values).unflatten(2, (batch // prompts, -1)).transpose(1, 2)
    output = output.reshape(grouped.shape) + torch.matmul(from_latents, value)
    return output.reshape(query.shape).transpose(1, 2), scores


def xformers_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same through xFormers' `memory_efficient_attention`, which gives no map."""
    # Not by a statement: transformers refuses carried code that imports what is not installed, wherever it does so.
    memory_efficient_attention = importlib.import_module("xformers.ops").memory_efficient_attention
    query, key, value = (
        states.transpose(1, 2)
        for states in (query, repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1]))
    )
    if attention_mask is not None:
        # ImageRows must begin at multiples of 16 bytes: a wider tensor, cut.
        num_keys = key.shape[1]
        wide = attention_mask.expand(-1, query.shape[2], -1, -1)
        attention_mask = nn.functional.pad(wide, (0, -num_keys % 8)).contiguous()[..., :num_keys]
    output = memory_efficient_attention(
        query,
        key,
        value,
        attn_bias=attention_mask,
        p=dropout if module.training else 0.0,
        scale=scaling,
        op=getattr(module, "xformers_op", None),
    )
    return output, None


# The backbone, too, runs with `set_attn_implementation("xformers")`: its masks are then eager's, numbers to be added.
ALL_ATTENTION_FUNCTIONS.register("xformers", xformers_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("xformers", eager_mask)


def check_attention(implementation: str, residual_attention: str | None) -> None:
    """Refuse an attention implementation that the tower cannot be right with.

    Args:
        implementation (`str`): transformers' name of it, as `set_attn_implementation` takes it.
        residual_attention (`str` or `None`): the model's.

    Raises:
        `ValueError`: if its kernel cannot add the residual, or has nothing to run on.
        `ImportError`: if it is xFormers, and that is not installed.
    """
    backbone = (
        f'attn_implementation={{"": "sdpa", "vlm_config": {implementation!r}}} would run it in the backbone alone.'
    )
    if residual_attention == "probabilities" and implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation {implementation!r} never shows the attention map, to which "
            f"residual_attention='probabilities' adds; {backbone}"
        )
    if residual_attention == "scores" and "flash" in implementation:
        raise ValueError(
            f"attn_implementation {implementation!r} takes no numbers to add to the scores, which "
            f"residual_attention='scores' needs; 'sdpa' or 'flex_attention' would do, and {backbone}"
        )
    if implementation == "xformers":
        if not torch.cuda.is_available():
            raise ValueError("attn_implementation 'xformers' needs a GPU, and torch finds none; 'sdpa' would do.")
        if importlib.util.find_spec("xformers") is None:
            raise ImportError("xformers is not installed: pip install 'latte_flow_hf[xformers]'")


class LatteFlowAttention(nn.Module):
    """Latents attend to the prompt's cached keys and values and, in both directions, to each other.

    Timestep-conditioned residual attention (paper; details chosen): with S the scaled scores of latents to latents,
    S^l <- S^l + g^l(t) * S^(l-1) before the softmax, g = tanh(linear(timestep embedding)), one value a head, zero at
    the start of training. S^(l-1) already holds its own residual; the first layer of a group has none.
    """

    def __init__(self, config: LatteFlowConfig, like: nn.Module, is_first: bool):
        super().__init__()
        text_config = config.text_config
        self.config = config
        self.is_causal = False
        self.num_heads = text_config.num_attention_heads
        self.head_dim = like.q_proj.out_features // self.num_heads
        self.num_key_value_groups = self.num_heads // text_config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = _linear_like(like.q_proj)
        self.k_proj = _linear_like(like.k_proj)
        self.v_proj = _linear_like(like.v_proj)
        self.o_proj = _linear_like(like.o_proj)
        self.residual = None if is_first else config.residual_attention
        if self.residual is not None:
            self.residual_gate = LatteFlowZeroLinear(config.timestep_embed_dim, self.num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        gate: torch.Tensor | None,
        previous: torch.Tensor | None,
        context_keys: torch.Tensor,
        context_values: torch.Tensor,
        context_bias: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, N, D).
            gate: (1 or B, H), how much of `previous` to reuse.
            previous: (B, H, N, N), what the layer before kept.
            context_keys, context_values: (P, G, T, d); each prompt serves B / P pictures in a row.
            context_bias: (P, 1, 1, T), 0 or -inf (padding); `None` if nothing is padded.
            position_embeddings: cos and sin, (B, N, d).
            keep: whether to return what the next layer reuses.

        Returns:
            (B, N, D), and (B, H, N, N) or `None`.
        """
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)

        residual = None
        if previous is not None and gate is not None:
            residual = gate[..., None, None] * previous

        mode, implementation = self.config.residual_attention, self.config._attn_implementation
        if mode != "probabilities" and (implementation == "eager" or (mode == "scores" and implementation == "sdpa")):
            # What is handed on are the scores, which a fused kernel does not show: with it each would be taken twice.
            output, scores = one_pass_attention(
                query, key, value, context_keys, context_values, context_bias, residual, self.scaling
            )
            return self.o_proj(output.reshape(batch, length, -1)), scores if keep and mode is not None else None

        pictures = batch // len(context_keys)
        if pictures > 1:
            context_keys, context_values = (
                states.repeat_interleave(pictures, dim=0) for states in (context_keys, context_values)
            )
            context_bias = None if context_bias is None else context_bias.repeat_interleave(pictures, dim=0)
        all_keys = torch.cat([context_keys, key], dim=2)
        all_values = torch.cat([context_values, value], dim=2)
        if mode == "probabilities":
            output, kept = self._add_probabilities(query, all_keys, all_values, context_bias, residual)
            return self.o_proj(output.reshape(batch, length, -1)), kept if keep else None

        kept = None
        if keep and mode == "scores":
            kept = torch.matmul(query, repeat_heads(key, self.num_heads).transpose(2, 3)) * self.scaling
            kept = kept if residual is None else kept + residual
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        bias = self._bias(context_bias, residual, query, context_keys.shape[2])
        form: dict[str, Any] = {"attention_mask": bias}
        if bias is not None and implementation == "flex_attention":
            # Its mask is read for the first head alone; the bias has one for every head.
            form = {"attention_mask": None, "position_bias": bias.expand(batch, self.num_heads, -1, -1)}
        elif bias is not None and "flash" in implementation:
            # There is no residual (`check_attention`): all queries and heads see the same keys, (B, T + N).
            form = {"attention_mask": bias[:, 0, 0] == 0}
        output, _ = attention(self, query, all_keys, all_values, scaling=self.scaling, dropout=0.0, **form)
        return self.o_proj(output.reshape(batch, length, -1)), kept

    def _bias(
        self, context_bias: torch.Tensor | None, residual: torch.Tensor | None, query: torch.Tensor, num_context: int
    ) -> torch.Tensor | None:
        """What is added to the scores, (B, 1 or H, N, T + N): minus infinity at padding, the residual at latents."""
        if context_bias is None and residual is None:
            return None
        batch, _, length, _ = query.shape
        if residual is None:
            residual = query.new_zeros(batch, 1, length, length)
        if context_bias is None:
            context_bias = query.new_zeros(1, 1, 1, num_context)
        return torch.cat([context_bias.expand(batch, residual.shape[1], length, -1), residual], dim=-1)

    def _add_probabilities(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        context_bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ablation that adds the map after the softmax; it needs the map itself, so no fused kernel can do it."""
        num_context = keys.shape[2] - query.shape[2]
        bias = self._bias(context_bias, None, query, num_context)
        _, weights = eager_attention_forward(self, query, keys, values, bias, self.scaling)
        to_latents = weights[..., num_context:]
        if residual is not None:
            to_latents = to_latents + residual.to(weights.dtype)
            weights = torch.cat([weights[..., :num_context], to_latents], dim=-1)
        return torch.matmul(weights, repeat_heads(values, self.num_heads)).transpose(1, 2), to_latents


class LatteFlowLayer(GradientCheckpointingLayer):
    """One generation layer, in the order of the paper's figure, with its four modulation vectors.

    x <- x + a(t) * norm(attention(norm(x)))
    x <- x + b(t) * norm(feed_forward((1 + c(t)) * norm(x) + d(t)))

    The four are zero at the start of training, so that a new layer is the identity (chosen: as in DiT).

    Args:
        config (`LatteFlowConfig`): the model's.
        like (`nn.Module`): the backbone's decoder layer whose shapes (and, by `from_vlm`, weights) this one takes.
        is_first (`bool`): whether it opens its group: then there is no attention map to reuse.
    """

    # Which modules start from the backbone's layer, and from which of its modules. All others are new.
    copied_modules = {
        **{name: name for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")},
        "mlp": "mlp",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }

    def __init__(self, config: LatteFlowConfig, like: nn.Module, is_first: bool):
        super().__init__()
        self.attention_norm = _rms_norm_like(like.input_layernorm)
        self.self_attn = LatteFlowAttention(config, like.self_attn, is_first)
        self.attention_post_norm = _rms_norm_like(like.input_layernorm)
        self.mlp_norm = _rms_norm_like(like.post_attention_layernorm)
        self.mlp = type(like.mlp)(config.text_config)
        self.mlp_post_norm = _rms_norm_like(like.post_attention_layernorm)
        self.modulation = LatteFlowZeroLinear(config.timestep_embed_dim, 4 * config.text_config.hidden_size)

    def copy_from(self, layer: nn.Module) -> None:
        """Take over the weights of the backbone's decoder layer."""
        for name, source in self.copied_modules.items():
            self.get_submodule(name).load_state_dict(layer.get_submodule(source).state_dict())

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep_embedding: torch.Tensor,
        previous: torch.Tensor | None = None,
        steps: LatteFlowSteps | None = None,
        **attention: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, D) -> (B, N, D), and what the next layer reuses; `attention` as in [`LatteFlowAttention`].

        What carries gradients goes by position: gradient checkpointing with `use_reentrant=True` sees nothing else.
        With `steps` there is a row of `timestep_embedding` for every step of this expert.
        """
        modulation = _modulate(self.modulation, timestep_embedding, steps)
        gate = None
        if self.self_attn.residual is not None:
            gate = torch.tanh(_modulate(self.self_attn.residual_gate, timestep_embedding, steps))
        return self.update(hidden_states, modulation.unsqueeze(1), gate, previous, **attention)

    def update(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        gate: torch.Tensor | None,
        previous: torch.Tensor | None,
        **attention: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What depends on the latents, of tensors alone: this is what `pipe.compile()` compiles."""
        attention_scale, mlp_scale_in, mlp_shift_in, mlp_scale = modulation.chunk(4, dim=-1)
        attended, kept = self.self_attn(self.attention_norm(hidden_states), gate, previous, **attention)
        hidden_states = hidden_states + attention_scale * self.attention_post_norm(attended)
        fed = self.mlp((1.0 + mlp_scale_in) * self.mlp_norm(hidden_states) + mlp_shift_in)
        return hidden_states + mlp_scale * self.mlp_post_norm(fed), kept


class LatteFlowHead(nn.Module):
    """Tokens -> velocity: norm, scale and shift by the timestep, a linear map that starts at zero."""

    def __init__(self, config: LatteFlowConfig, like: nn.Module):
        super().__init__()
        self.patch_size = config.latent_patch_size
        hidden_size = config.text_config.hidden_size
        self.norm = _rms_norm_like(like)
        self.modulation = LatteFlowZeroLinear(config.timestep_embed_dim, 2 * hidden_size)
        self.proj = LatteFlowZeroLinear(hidden_size, config.latent_channels * self.patch_size**2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep_embedding: torch.Tensor,
        height: int,
        width: int,
        steps: LatteFlowSteps | None = None,
    ) -> torch.Tensor:
        """(B, N, D) -> (B, C, height, width), height and width in latent pixels; `steps` as in [`LatteFlowLayer`]."""
        modulation = _modulate(self.modulation, timestep_embedding, steps)
        scale, shift = modulation.unsqueeze(1).chunk(2, dim=-1)
        patches = self.proj((1.0 + scale) * self.norm(hidden_states) + shift).transpose(1, 2)
        patches = patches.unflatten(2, (height // self.patch_size, width // self.patch_size))
        return nn.functional.pixel_shuffle(patches, self.patch_size)


class LatteFlowTower(nn.Module):
    """The trainable replica of the decoder's layers, with what all experts share around them."""

    def __init__(self, config: LatteFlowConfig, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.latent_embedding = LatteFlowLatentEmbedding(config)
        self.timestep_embedding = LatteFlowTimestepEmbedding(config)
        # The backbone's, but its own: when the backbone is off-loaded the tower needs nothing of it.
        self.rotary_emb = copy.deepcopy(decoder.rotary_emb)
        self.layers = nn.ModuleList(
            LatteFlowLayer(config, layer, is_first=index % config.layers_per_expert == 0)
            for index, layer in enumerate(decoder.layers)
        )
        self.head = LatteFlowHead(config, decoder.layers[0].input_layernorm)
        self.expert_offload: ExpertOffload | None = None

    def expert_layers(self, expert: int) -> range:
        """The indices of the layers of expert `expert`."""
        size = self.config.layers_per_expert
        return range(expert * size, (expert + 1) * size)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        expert: int,
        context: LatteFlowContext,
        steps: LatteFlowSteps | None = None,
    ) -> torch.Tensor:
        """Velocity of `latents` (B, C, height, width) by the layers of one expert alone; `timestep` is (1,) or (B,).

        With `steps`, what their steps have in common is taken from there.
        """
        if steps is None or torch.compiler.is_compiling():
            # A graph of the whole step would be another one at each of them.
            steps = None
            layout = self.layout(latents, context)
            timestep_embedding = self.timestep_embedding(timestep)
        else:
            layout = steps.once((id(context), latents.shape), lambda: self.layout(latents, context))
            shared = timestep if len(steps.own) == 1 else steps.timesteps[steps.own]
            timestep_embedding = steps.once(expert, lambda: self.timestep_embedding(shared))
        hidden_states = self.latent_embedding(latents, layout.places)
        kept = None
        layers = self.expert_layers(expert)
        if self.expert_offload is not None:
            self.expert_offload.prepare(layers)
        for index in layers:
            if self.expert_offload is not None:
                self.expert_offload.wait(index)
            hidden_states, kept = self.layers[index](
                hidden_states,
                timestep_embedding,
                kept,
                steps,
                context_keys=context.keys[index],
                context_values=context.values[index],
                context_bias=layout.context_bias,
                position_embeddings=layout.position_embeddings,
                keep=index + 1 in layers,
            )
            if self.expert_offload is not None and steps is not None and steps.next_expert is not None:
                self.expert_offload.release(index)
                self.expert_offload.fetch(index - layers.start + self.expert_layers(steps.next_expert).start)
        return self.head(hidden_states, timestep_embedding, *latents.shape[2:], steps)

    def layout(self, latents: torch.Tensor, context: LatteFlowContext) -> LatteFlowLayout:
        """What is the same at every step, for latents like these (B, C, height, width)."""
        height, width = (side // self.config.latent_patch_size for side in latents.shape[2:])
        places = self.latent_embedding.places(height, width, latents.device, latents.dtype)
        next_position = context.next_position.repeat_interleave(len(latents) // len(context))
        context_bias = None
        if context.padded:
            context_bias = torch.zeros_like(context.attention_mask, dtype=latents.dtype)
            context_bias = context_bias.masked_fill(~context.attention_mask, float("-inf"))[:, None, None]
        positions = self._latent_position_embeddings(latents, next_position)
        return LatteFlowLayout(places, positions, context_bias)

    def _latent_position_embeddings(
        self, latents: torch.Tensor, next_position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's rotary embedding of the latents, right after the prompt: cos and sin, (B, N, d) each.

        The frequencies go to rows and columns in turn. Chosen: Qwen2-VL's own M-RoPE gives columns its lowest ones
        alone, by which neighbours cannot be told apart (Qwen3-VL interleaves for the same reason). Keys of text carry
        one position on every axis, so that they meet this order and the backbone's alike.
        """
        patch_size = self.config.latent_patch_size
        height, width = latents.shape[2] // patch_size, latents.shape[3] // patch_size
        tokens = torch.arange(height * width, device=latents.device)

        def along(offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            position = next_position[:, None] + offset
            return self.rotary_emb(latents, position.expand(3, -1, -1) if self.config.has_mrope else position)

        rows, columns = along(tokens // width), along(tokens % width)
        of_rows = torch.arange(rows[0].shape[-1] // 2, device=latents.device) % 2 == 0
        cos, sin = (torch.where(torch.cat([of_rows, of_rows]), row, column) for row, column in zip(rows, columns))
        return cos, sin


class LatteFlowPreTrainedModel(PreTrainedModel):
    config_class = LatteFlowConfig
    config: LatteFlowConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LatteFlowLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # diffusers' group off-loading: the tower goes layer by layer, the backbone as a whole.
    _group_offload_block_modules = ["vlm", "tower"]
    # What no quantizer may touch (patterns of names): small, and every layer's size hangs on it.
    _keep_in_fp32_modules = [
        r"tower\.(timestep_embedding|latent_embedding|head)",
        r"tower\.layers\.\d+\.(modulation|self_attn\.residual_gate)",
    ]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As of `PreTrainedModel`, but what is not quantized has the dtype of all the rest, also in float16."""
        plan = super()._get_dtype_plan(dtype)
        return {
            name: kept for name, kept in plan.items() if name not in LatteFlowPreTrainedModel._keep_in_fp32_modules
        }

    # The loss is a mean of means: the Trainer divides it by the number of accumulated batches, not by a token count.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatteFlowLatentEmbedding):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, LatteFlowZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class LatteFlowForConditionalGeneration(LatteFlowPreTrainedModel, GenerationMixin):
    """A frozen vision-language model that answers, and a tower of timestep experts beside it that paints.

    `self.vlm` is the backbone as transformers builds it: text through this class is text through the backbone.

    Args:
        config ([`LatteFlowConfig`]): the architecture. All weights are random; `from_vlm` starts from a backbone.
    """

    def __init__(self, config: LatteFlowConfig):
        super().__init__(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        decoder = self.vlm.get_decoder()
        _check_decoder(decoder)
        self.tower = LatteFlowTower(config, decoder)
        # How far training widens each expert's interval towards the data: 0 not at all, 1 down to sigma 0.
        self.interval_overlap = 0.0
        self.vlm.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As of `PreTrainedModel`; loading makes new parameters, hence the backbone is frozen again here.

        Raises:
            `OSError`: if a local folder lacks its configuration, or its weights are cut off.
            `ValueError`: if the weights are not exactly the model's: what is missing would be random.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path is not None and folder.is_dir():
            check_files(folder, "config.json|adapter_config.json")
        with_info = kwargs.pop("output_loading_info", False)
        any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        for what, keys in (
            ("lack", info["missing_keys"]),
            ("hold, but the model does not,", info["unexpected_keys"]),
            ("hold in another shape (theirs, the model's)", () if any_shape else info["mismatched_keys"]),
        ):
            if keys:
                raise ValueError(
                    f"weights of {pretrained_model_name_or_path} {what} {sorted(keys)[:3]} ({len(keys)} in all): "
                    "they are of another architecture than its config.json tells (`ignore_mismatched_sizes=True` lets "
                    "other shapes pass, and begins those weights anew)."
                )
        if model.generation_config.eos_token_id is None:
            # Of a pipeline on the hub diffusers fetches no generation_config.json; no answer would end.
            model.generation_config = GenerationConfig.from_model_config(model.config)
        model.vlm.requires_grad_(False)
        return (model, info) if with_info else model

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As of `PreTrainedModel`, but under the module's own names: the stock Trainer resumes by `load_state_dict`,
        which would pass over a backbone that is stored under its original ones."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    # diffusers reads it to know what to pass: without it neither `variant` nor `max_shard_size`.
    save_pretrained.__signature__ = inspect.signature(PreTrainedModel.save_pretrained)  # type: ignore[attr-defined]

    @classmethod
    def from_vlm(
        cls, vlm: PreTrainedModel, copy_layers: bool = True, **config: Any
    ) -> "LatteFlowForConditionalGeneration":
        """A new model around a loaded backbone, its tower initialised from the backbone's own layers.

        Args:
            vlm (`PreTrainedModel`): the backbone; it is used as it is, not copied, and frozen.
            copy_layers (`bool`, defaults to `True`): `False` leaves the tower's layers random (chosen for the embedded
                checkpoint, whose small backbone's layers learned more slowly; see the departures).
            config: arguments of [`LatteFlowConfig`] other than `vlm_config`, e.g. `num_experts=4`.

        Raises:
            `ValueError`: if the configuration does not fit the backbone.
        """
        model = cls(LatteFlowConfig(vlm_config=copy.deepcopy(vlm.config), **config))
        # The backbone's own config object from here on, so that what is changed on one side is seen on the other.
        model.config.vlm_config = vlm.config
        model.vlm = vlm.requires_grad_(False).eval()
        model.tower.to(device=vlm.device, dtype=vlm.dtype)
        model.tower.rotary_emb = copy.deepcopy(vlm.get_decoder().rotary_emb)
        if copy_layers:
            for layer, source in zip(model.tower.layers, vlm.get_decoder().layers):
                layer.copy_from(source)
        if vlm.generation_config is not None:
            model.generation_config = copy.deepcopy(vlm.generation_config)
        return model

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """As of `PreTrainedModel`, which asks here whenever one is chosen; `check_attention` says what is refused."""
        if attn_implementation is not None:
            check_attention(attn_implementation, self.config.residual_attention)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """What `pipe.enable_xformers_memory_efficient_attention()` and its counterpart call: xFormers in the tower."""
        if valid:
            self.set_attn_implementation({"": "xformers"})
        elif self.config._attn_implementation == "xformers":
            self.set_attn_implementation({"": "sdpa"})
        for layer in self.tower.layers:
            layer.self_attn.xformers_op = attention_op

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        load_config: Any = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of `PreTrainedModel`, for adapters of this model alone.

        Raises:
            `ValueError`: if the adapter was made for another number of experts, of layers or another width.
        """
        name = peft_model_id or adapter_name or "default"
        if peft_config is not None:
            check_adapter(self.config, getattr(peft_config, "target_modules", None), name)
        elif peft_model_id is not None:
            download = {**(load_config.download_kwargs if load_config else {}), **(adapter_kwargs or {})}
            file = find_adapter_config_file(peft_model_id, **download)
            if file is not None:
                check_adapter(self.config, read_json(file).get("target_modules"), name)
        before = set(getattr(self, "peft_config", ()))
        try:
            return super().load_adapter(
                peft_model_id,
                adapter_name,
                peft_config,
                load_config=load_config,
                adapter_kwargs=adapter_kwargs,
                **kwargs,
            )
        except Exception:
            # Its layers are in place by now, and its weights are not.
            for added in set(getattr(self, "peft_config", ())) - before:
                self.delete_adapter(added)
            raise

    def _load_from_state_dict(self, *args: Any) -> None:
        # The way of peft's own loading, `PeftModel.from_pretrained` among it.
        for name, adapter in (getattr(self, "peft_config", None) or {}).items():
            check_adapter(self.config, getattr(adapter, "target_modules", None), name)
        super()._load_from_state_dict(*args)

    @property
    def training_experts(self) -> list[int]:
        """The experts that a training step goes to: those with a trainable weight of their own, adapters included.

        All of them if what they share is trainable too (it answers for every interval), or if nothing is.
        """

        def learns(module: nn.Module) -> bool:
            return any(parameter.requires_grad for parameter in module.parameters())

        experts = range(self.config.num_experts)
        own = [k for k in experts if any(learns(self.tower.layers[i]) for i in self.expert_layers(k))]
        shared = any(learns(module) for name, module in self.tower.named_children() if name != "layers")
        return own if own and not shared else list(experts)

    def train(self, mode: bool = True) -> "LatteFlowForConditionalGeneration":
        """Training mode for the tower alone: a frozen backbone stays as it is (and in training keeps no cache)."""
        super().train(mode)
        self.vlm.eval()
        return self

    # What the backbone does, and this class only hands on.

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

    @apply_forward_hook
    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs: Any):
        """Text, as the backbone's own `generate`: same arguments, same tokens."""
        if generation_config is None:
            generation_config = copy.deepcopy(self.generation_config)
            kwargs = generation_config.update(**kwargs)
        # Pictures are encoded before the backbone's `forward`, which is all that group off-loading listens to.
        hooks = getattr(self.vlm, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            hooks.get_hook("group_offloading").pre_forward(self.vlm)
        return self.vlm.generate(inputs, generation_config=generation_config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        context: LatteFlowContext | Mapping[str, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Without `latents`, the backbone's own output; with them, the training losses.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_thw, labels, and anything else: as the backbone's.
            latents (`torch.Tensor`, *optional*): (B, C, height, width), clean latents of the pictures that the
                prompts describe, scaled as the pipeline scales them.
            noise (`torch.Tensor`, *optional*): like `latents`; drawn if not given.
            context ([`LatteFlowContext`] or a mapping, *optional*): the prompts, encoded before, or the arguments of
                `encode_context`; then nothing else is needed, and `input_ids` may be of other examples, with `labels`.
            generator (`torch.Generator`, *optional*): source of the noise and the timesteps.

        Raises:
            `ValueError`: if `latents` does not fit the model or the number of prompts, `noise` is not like `latents`,
                or there is neither `input_ids` nor `context` to paint from.
        """
        if latents is None:
            return self.vlm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                labels=labels,
                **kwargs,
            )
        text = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            **kwargs,
        }
        prompts = text if context is None else context
        flow_loss, expert_losses = self.flow_loss(latents, prompts, noise, generator)
        output = LatteFlowModelOutput(loss=flow_loss, flow_loss=flow_loss, expert_losses=expert_losses)
        if labels is not None:
            spoken = self.vlm(labels=labels, **text)
            # A mean over words: a process with more of them counts for more in the mean over processes.
            words = [int((labels[:, 1:] != -100).sum())]
            every = all_gather_list(words)
            output.lm_loss, output.logits = spoken.loss * (len(every) * words[0] / max(sum(every), 1)), spoken.logits
            output.loss = flow_loss + output.lm_loss
        return output

    def flow_loss(
        self,
        latents: torch.Tensor,
        context: LatteFlowContext | Mapping[str, Any],
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity's mean squared error, summed over the experts, each on timesteps of its interval (paper).

        The batch is split over the experts (chosen: a step then costs what one expert costs): example i goes to expert
        i mod K. A batch smaller than K is gone through again from its start, so that no expert is left out. Experts
        that do not learn ([`~LatteFlowForConditionalGeneration.training_experts`]) get no example. In training mode
        each interval reaches down to (1 - `interval_overlap`) times its lower end ([`IntervalWarmupCallback`]).

        `context` are the prompts, or the arguments of `encode_context`. Each expert's prompts are then prefilled on
        their own, through the layers that the expert reads and no further; prompts with pictures, whose patches are
        not parted by prompt, all together.

        With several processes, "the batch" is all of theirs: the mean of what they return is what one process returns
        for it. `latents`, `context` and a given `noise` are this process's share, of the same size in each.

        Returns:
            The sum (scalar), and the summands (K,) without gradients, 0 where no example went.
        """
        if not isinstance(context, LatteFlowContext):
            _check_prompts(context.get("input_ids"), context.get("attention_mask"))
            pictures = [name for name in context if name.startswith(("pixel_values", "image_", "video_"))]
            if any(context[name] is not None for name in pictures):
                context = self.encode_context(**context)
        num_prompts = len(context if isinstance(context, LatteFlowContext) else context["input_ids"])
        self._check_latents(latents, num_prompts)
        if num_prompts != len(latents):
            raise ValueError(f"context must hold a prompt for each of {len(latents)} latents, got {num_prompts}.")
        size, (process, num_processes) = len(latents), rank_and_world_size()
        if noise is None:
            noise = torch.randn(
                (num_processes * size, *latents.shape[1:]),
                generator=generator,
                device=latents.device if generator is None else generator.device,
                dtype=latents.dtype,
            )
            noise = local_rows(noise).to(latents.device)
        elif noise.shape != latents.shape:
            raise ValueError(f"noise must be of shape {tuple(latents.shape)}, as latents, got {tuple(noise.shape)}.")
        experts = self.training_experts
        boundaries = self.config.expert_boundaries
        overlap = self.interval_overlap if self.training else 0.0
        order = torch.arange(max(num_processes * size, len(experts))) % (num_processes * size)
        losses = []
        for place, expert in enumerate(experts):
            rows = order[place :: len(experts)]
            interval = (boundaries[expert], boundaries[expert + 1] * (1.0 - overlap))
            sigma = draw_expert_sigmas(len(rows), interval, generator, self.config.timestep_sampling)
            own = (rows // size == process).nonzero().squeeze(1)
            weight = num_processes * len(own) / len(rows)
            if not len(own):
                # Every process reaches every weight, or the others would wait for its gradients: here by zero.
                own = torch.zeros(1, dtype=torch.int64)
            rows, own = (rows[own] % size).to(latents.device), own.to(sigma.device)
            sigma = sigma[own].to(latents.device)
            data, expert_noise = latents[rows], noise[rows]
            if isinstance(context, LatteFlowContext):
                own_context = context.rows(rows)
            else:
                by_prompt = {name: context[name][rows] for name in _BY_PROMPT if context.get(name) is not None}
                own_context = self.encode_context(
                    **{**context, **by_prompt}, num_layers=self.expert_layers(expert).stop
                )
            predicted = self.predict_velocity(
                interpolate(data, expert_noise, sigma), 1000.0 * sigma, own_context, expert=expert
            )
            losses.append(weight * velocity_loss(predicted, velocity_target(data, expert_noise)))
        stacked = torch.stack(losses)
        expert_losses = stacked.new_zeros(self.config.num_experts)
        expert_losses[experts] = stacked.detach()
        return stacked.sum(), expert_losses

    @apply_forward_hook
    @torch.no_grad()
    def encode_context(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        num_layers: int | None = None,
        **vision: torch.Tensor | None,
    ) -> LatteFlowContext:
        """Prefill the prompts once.

        Args:
            input_ids, attention_mask: (B, T); padding on either side.
            mm_token_type_ids: (B, T), 1 at image tokens, as the processor gives it; needed with pictures.
            num_layers: only through the first so many layers of the decoder: enough for experts that end there.
            vision: `pixel_values`, `image_grid_thw`, as the processor gives them.

        Returns:
            [`LatteFlowContext`]: B prompts.

        Raises:
            `ValueError`: if there are no `input_ids`, the mask is not of their shape, pictures come without
                `mm_token_type_ids`, or something else is given in place of tokens.
        """
        _check_prompts(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if vision.get("image_grid_thw") is not None and mm_token_type_ids is None:
            raise ValueError("mm_token_type_ids must be given with pictures, as the processor gives them; got None.")
        vision.pop("use_cache", None)  # a context is a cache, also where a training loop wants none of the backbone's
        for name in ("inputs_embeds", "position_ids", "past_key_values"):
            if vision.pop(name, None) is not None:
                raise ValueError(f"{name} must be left out: a context is made from the prompts' tokens alone.")
        if vision.get("image_grid_thw") is not None:
            position_ids, _ = self.get_rope_index(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=vision["image_grid_thw"],
                attention_mask=attention_mask,
            )
        else:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            if self.config.has_mrope:
                position_ids = position_ids.expand(3, -1, -1)
        # A cache without a config keeps every key, also of layers with a sliding window.
        cache = DynamicCache()
        # Off-load hooks listen to `forward`, hence the whole backbone; its language head sees one token.
        with _first_layers(self.vlm.get_decoder(), num_layers):
            self.vlm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                mm_token_type_ids=mm_token_type_ids,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **vision,
            )
        last = position_ids.amax(dim=0) if position_ids.ndim == 3 else position_ids
        last = last.masked_fill(attention_mask == 0, -1).amax(dim=-1)
        return LatteFlowContext(
            tuple(layer.keys for layer in cache.layers),
            tuple(layer.values for layer in cache.layers),
            attention_mask.bool(),
            last + 1,
            padded=not bool(attention_mask.all()),
        )

    @apply_forward_hook
    def predict_velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | float,
        context: LatteFlowContext,
        expert: int | None = None,
        steps: LatteFlowSteps | None = None,
    ) -> torch.Tensor:
        """The velocity (noise - data) at `latents`, by the expert that owns `timestep` alone.

        Args:
            latents (`torch.Tensor`): (B, C, height, width), noisy; taken in the tower's dtype, that of the velocity.
            timestep (`float` or `torch.Tensor`): 0 to 1000, one for all or (B,); all of one expert.
            context ([`LatteFlowContext`]): the prompts: B, or fewer that serve several latents each.
            expert (`int`, *optional*): which one, for callers that know it; read off `timestep` if not given, which
                on an accelerator waits for the device.
            steps ([`LatteFlowSteps`], *optional*): all steps of the call, the current one being that of `timestep`.

        Raises:
            `ValueError`: if the timesteps belong to several experts or lie outside 0 to 1000, there is no such expert,
                or a shape does not fit.
        """
        self._check_latents(latents, len(context))
        # That of a norm: no quantization touches it.
        latents = latents.to(self.tower.head.norm.weight.dtype)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).reshape(-1)
        if len(timestep) not in (1, len(latents)):
            raise ValueError(f"timestep must be one, or one for each of {len(latents)} latents, got {len(timestep)}.")
        if expert is None:
            owners = {self.expert_of(t) for t in timestep.tolist()}
            if len(owners) != 1:
                raise ValueError(f"timestep must lie in the interval of one expert, got those of {sorted(owners)}.")
            (expert,) = owners
        elif not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert must be from 0 to {self.config.num_experts - 1}, got {expert}.")
        return self.tower(latents, timestep.expand(len(latents)), expert, context, steps)

    def expert_of(self, timestep: float) -> int:
        """The expert that owns `timestep`; expert 0 owns the noisiest.

        Raises:
            `ValueError`: if `timestep` is not from 0 to 1000.
        """
        return expert_of_sigma(float(timestep) / 1000.0, self.config.expert_boundaries)

    def expert_layers(self, expert: int) -> range:
        """The indices of expert `expert`'s layers in `model.tower.layers`.

        Raises:
            `ValueError`: if there is no such expert.
        """
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert must be from 0 to {self.config.num_experts - 1}, got {expert}.")
        return self.tower.expert_layers(expert)

    def chat(
        self,
        processor: Any,
        messages: str | list[dict],
        images: Any = None,
        streamer: Any = None,
        device: torch.device | None = None,
        **generate: Any,
    ) -> str:
        """Answer a question or go on with a conversation.

        Args:
            processor ([`LatteFlowProcessor`]): the model's.
            messages (`str` or `list[dict]`): a question, or a conversation in the chat-template form.
            images (*optional*): one picture or a list of them (PIL image, array, path or URL) that go before the
                question; only with a string.
            streamer (*optional*): a transformers streamer that gets the tokens as they come.
            device (`torch.device`, *optional*): where the model runs, if its weights wait elsewhere (off-loaded).
            generate: arguments of `generate`; `max_new_tokens` is 256 unless given.

        Returns:
            `str`: the answer.

        Raises:
            `ValueError`: if `messages` is empty, or an image is none.
        """
        inputs = processor.encode_conversations([processor.conversation(messages, images)])
        inputs = inputs.to(self.device if device is None else device)
        tokens = self.generate(**inputs, streamer=streamer, **{"max_new_tokens": 256, **generate})
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _check_latents(self, latents: torch.Tensor, num_prompts: int) -> None:
        channels, patch_size = self.config.latent_channels, self.config.latent_patch_size
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must be (batch, {channels}, height, width), got {tuple(latents.shape)}.")
        if latents.shape[2] % patch_size or latents.shape[3] % patch_size:
            raise ValueError(f"latents' sides must be multiples of {patch_size}, got {tuple(latents.shape[2:])}.")
        if not num_prompts or len(latents) % num_prompts:
            raise ValueError(
                f"context must hold a prompt for each of {len(latents)} latents, or one for every so many, got "
                f"{num_prompts}."
            )


# The arguments of `encode_context` that have a row for each prompt.
_BY_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")


def _check_prompts(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        found = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be the prompts' tokens, (batch, length), got {found}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be of shape {tuple(input_ids.shape)}, as input_ids, got "
            f"{tuple(attention_mask.shape)}."
        )


@contextlib.contextmanager
def _first_layers(decoder: nn.Module, count: int | None) -> Iterator[None]:
    """Inside, `decoder` ends after `count` of its layers."""
    layers = decoder.layers
    decoder.layers = layers if count is None else layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers


def _check_decoder(decoder: nn.Module) -> None:
    """The tower mirrors layers of Llama's and Qwen2's kind; anything else must fail here and not paint nonsense."""
    layer = decoder.layers[0]
    names = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += ["mlp", "input_layernorm", "post_attention_layernorm"]
    modules = dict(layer.named_modules())
    missing = [name for name in names if name not in modules]
    unknown = [name for name in ("self_attn.q_norm", "self_attn.k_norm") if name in modules]
    if missing or unknown or not hasattr(decoder, "rotary_emb"):
        raise ValueError(
            f"the backbone's decoder layer {type(layer).__name__} cannot be mirrored (missing: {missing}, not "
            f"supported: {unknown}); a layer like Qwen2-VL's would do."
        )
