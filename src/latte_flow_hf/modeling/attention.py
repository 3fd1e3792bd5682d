# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Attention kernels with a residual, and xFormers as one of transformers' attention implementations.

Residual attention adds to the attention map of a layer the map of the layer before it, so every layer has to return
its map. No fused kernel does, hence the two functions here. A tower without a residual uses transformers' attention
interface, and with it whatever implementation is chosen there.

Shapes: B images, P prompts (each serves B / P images in a row), N latent tokens, T prompt tokens, H heads, G key-value
heads, d head size.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward, repeat_kv


def residual_scores_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    context_mask: torch.Tensor | None,
    residual: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax([s Q K_prompt^T + mask, s Q K^T + residual]) [V_prompt; V], s being `scaling`.

    Grouped-query attention without copies: keys and values are neither repeated for the H / G query heads of a group
    nor for the B / P images of a prompt. Instead the queries that share them are stacked into one matrix product.

    Args:
        query (`torch.Tensor`): (B, H, N, d).
        key, value (`torch.Tensor`): (B, G, N, d), of the latents.
        context_keys, context_values (`torch.Tensor`): (P, G, T, d), of the prompts.
        context_mask (`torch.Tensor`, *optional*): (P, 1, 1, T), added to the scores: 0, or -inf at padding.
        residual (`torch.Tensor`, *optional*): (B, H, N, N), added to the scores of latents to latents.
        scaling (`float`): factor of the scores.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the output (B, N, H, d), and the scores of latents to latents with the
        residual (B, H, N, N).
    """
    batch_size, num_heads, num_latents, head_dim = query.shape
    num_prompts, num_groups, num_context, _ = context_keys.shape
    images_per_prompt = batch_size // num_prompts
    context_keys, context_values = context_keys.to(query.dtype), context_values.to(query.dtype)

    # (B, G, H/G * N, d): the queries of one group of heads; (P, G, B/P * H/G * N, d): those of all images of a prompt.
    by_group = (query * scaling).reshape(batch_size, num_groups, -1, head_dim)
    by_prompt = by_group.unflatten(0, (num_prompts, -1)).transpose(1, 2).flatten(2, 3)

    scores = torch.matmul(by_group, key.transpose(2, 3)).view(batch_size, num_heads, num_latents, num_latents)
    if residual is not None:
        scores = scores + residual
    context_scores = torch.matmul(by_prompt, context_keys.transpose(2, 3))
    if context_mask is not None:
        context_scores = context_scores + context_mask
    context_scores = context_scores.unflatten(2, (images_per_prompt, -1)).transpose(1, 2)
    context_scores = context_scores.reshape(batch_size, num_heads, num_latents, num_context)

    weights = torch.cat([context_scores, scores], dim=-1)
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = weights.view(batch_size, num_groups, -1, num_context + num_latents)
    context_weights, latent_weights = weights.split([num_context, num_latents], -1)
    context_weights = context_weights.unflatten(0, (num_prompts, -1)).transpose(1, 2).flatten(2, 3)

    output = torch.matmul(context_weights, context_values).unflatten(2, (images_per_prompt, -1)).transpose(1, 2)
    output = output.reshape(by_group.shape) + torch.matmul(latent_weights, value)
    return output.reshape(query.shape).transpose(1, 2), scores


def residual_probabilities_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    context_mask: torch.Tensor | None,
    residual: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax([s Q K_prompt^T + mask, s Q K^T]) with the residual added to its last N columns, times [V_prompt; V].

    The ablation that adds the residual after the softmax, on transformers' eager attention. Rows no longer sum to 1.

    Args:
        module (`nn.Module`): the attention module, with `num_key_value_groups` = H / G.
        query, key, value, context_keys, context_values, context_mask, residual, scaling:
            Same as `residual_scores_attention`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the output (B, N, H, d), and the weights of latents to latents with the
        residual (B, H, N, N).
    """
    keys, values = join_context(key, value, context_keys, context_values)
    num_context = context_keys.shape[2]
    attention_mask = None
    if context_mask is not None:
        context_mask = context_mask.repeat_interleave(len(query) // len(context_mask), dim=0)
        attention_mask = nn.functional.pad(context_mask, (0, key.shape[2]))
    _, weights = eager_attention_forward(module, query, keys, values, attention_mask, scaling)
    context_weights, latent_weights = weights[..., :num_context], weights[..., num_context:]
    if residual is not None:
        latent_weights = latent_weights + residual.to(weights.dtype)
        weights = torch.cat([context_weights, latent_weights], dim=-1)
    output = torch.matmul(weights, repeat_kv(values, module.num_key_value_groups)).transpose(1, 2)
    return output, latent_weights


def join_context(
    key: torch.Tensor, value: torch.Tensor, context_keys: torch.Tensor, context_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each image's prompt and latents in one tensor, (B, G, T + N, d) each."""
    images_per_prompt = len(key) // len(context_keys)
    if images_per_prompt > 1:
        context_keys = context_keys.repeat_interleave(images_per_prompt, dim=0)
        context_values = context_values.repeat_interleave(images_per_prompt, dim=0)
    return torch.cat([context_keys, key], dim=2), torch.cat([context_values, value], dim=2)


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
    """xFormers' `memory_efficient_attention` with the arguments of transformers' attention functions."""
    # Imported by name: transformers refuses remote code with an import statement for a package that is not installed.
    memory_efficient_attention = importlib.import_module("xformers.ops").memory_efficient_attention
    num_key_value_groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, num_key_value_groups), repeat_kv(value, num_key_value_groups)
    if attention_mask is not None:
        # The kernel wants rows that start at multiples of 16 bytes: a slice of a tensor with padded rows.
        num_keys = key.shape[2]
        attention_mask = attention_mask.expand(-1, query.shape[1], -1, -1)
        attention_mask = nn.functional.pad(attention_mask, (0, -num_keys % 8)).contiguous()[..., :num_keys]
    output = memory_efficient_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_bias=attention_mask,
        p=dropout if module.training else 0.0,
        scale=scaling,
        op=getattr(module, "xformers_op", None),
    )
    return output, None


# Makes "xformers" a name that `set_attn_implementation` accepts, in the backbone too. Its masks are additive, like
# those of eager attention.
ALL_ATTENTION_FUNCTIONS.register("xformers", xformers_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("xformers", eager_mask)


def check_attention_implementation(implementation: str) -> None:
    """Refuse xFormers where it cannot run. transformers itself checks the other implementations.

    Args:
        implementation (`str`): name of the implementation, as for `set_attn_implementation`.

    Raises:
        `ValueError`: if it is xFormers and there is no GPU.
        `ImportError`: if it is xFormers and that is not installed.
    """
    if implementation != "xformers":
        return
    if not torch.cuda.is_available():
        raise ValueError("attn_implementation 'xformers' needs a GPU, but torch finds none; use 'sdpa' instead.")
    if importlib.util.find_spec("xformers") is None:
        raise ImportError("xformers is not installed; from a clone, run: pip install -e '.[xformers]'")
