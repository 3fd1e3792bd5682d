# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tower's attention, and xFormers, each as one of transformers' attention implementations.

The tower's layers contain attention modules of the backbone's own class. Such a module computes queries, keys and
values its own way, and then calls the implementation that its configuration names: in the tower,
[`tower_attention_forward`], which adds the keys and values of the prompt.

Residual attention adds to the attention map of a layer the map of the layer before it, so every layer has to return
its map. No fused kernel does, hence the two kernels here. A tower without a residual uses transformers' attention
interface, and with it whatever implementation is chosen there.

Shapes: B images, P prompts (each serves B / P images in a row), N latent tokens, T prompt tokens, H heads, G key-value
heads, d head size.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Gemma 2's, because it can limit the scores; without a limit, those of all models compute the same.
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward, repeat_kv

from .backbone import TOWER_ATTENTION


def tower_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    residual: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What attention modules in the tower call as transformers' attention function: `attend`, the layer's
    [`attend_to_context`], with what the layer has passed through the attention module.

    Other arguments (`kwargs`) are not needed: the sliding window is in the mask, and latents see all of each other.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, context_keys, context_values, attention_mask, residual, scaling, softcap)


def attend_to_context(
    residual_attention: str | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    attention_mask: Any,
    residual: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of latents to the prompt and, bidirectionally, to each other.

    Timestep-conditioned residual attention (paper; details chosen): with S^l the scaled scores of latents to latents,
    S^l <- S^l + g^l(t) * S^(l-1) before the softmax, g = tanh(linear(timestep embedding)), one value for each head,
    zero at the start of training. S^(l-1) includes its own residual; the first layer of an expert has none.

    Args:
        residual_attention (`str`, *optional*):
            `"scores"` and `"probabilities"` have kernels of their own, whatever attention implementation is chosen,
            since the next layer needs the map.
        module (`nn.Module`): what transformers' attention functions read settings from, with `num_key_value_groups` =
            H / G, `is_causal` and `config`, which names the implementation without a residual.
        query (`torch.Tensor`): (B, H, N, d), with its position.
        key, value (`torch.Tensor`): (B, G, N, d), of the latents.
        context_keys, context_values (`torch.Tensor`): (P, G, T, d), of the prompts.
        attention_mask (*optional*): as in [`LatteFlowLayout`].
        residual (`torch.Tensor`, *optional*): (B, H, N, N), the gated attention map of the layer before.
        scaling (`float`): factor of the scores.
        softcap (`float`, *optional*): the backbone's limit c of the scores s (Gemma 2): c * tanh(s / c).

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: the output (B, N, H, d), and this layer's map of latents to latents
        (B, H, N, N), `None` without residual attention.
    """
    context = (context_keys, context_values, attention_mask, residual, scaling, softcap)
    if residual_attention == "scores":
        return residual_scores_attention(query, key, value, *context)
    if residual_attention == "probabilities":
        return residual_probabilities_attention(module, query, key, value, *context)
    implementation = module.config._attn_implementation
    if softcap is not None and implementation == "sdpa":
        # Which cannot limit scores: transformers uses eager attention for such a backbone, too.
        implementation = "eager"
        if attention_mask is not None:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                ~attention_mask, torch.finfo(query.dtype).min
            )
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    keys, values = join_context(key, value, context_keys, context_values)
    limit = {} if softcap is None else {"softcap": softcap}
    output, _ = attention(
        module, query, keys, values, attention_mask=attention_mask, scaling=scaling, dropout=0.0, **limit
    )
    return output, None


def residual_scores_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_keys: torch.Tensor,
    context_values: torch.Tensor,
    context_mask: torch.Tensor | None,
    residual: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
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
        softcap (`float`, *optional*): limit c of the scores s before the mask and the residual, c * tanh(s / c).

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
    context_scores = torch.matmul(by_prompt, context_keys.transpose(2, 3))
    if softcap is not None:
        scores, context_scores = (softcap * torch.tanh(found / softcap) for found in (scores, context_scores))
    if residual is not None:
        scores = scores + residual
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
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax([s Q K_prompt^T + mask, s Q K^T]) with the residual added to its last N columns, times [V_prompt; V].

    The ablation that adds the residual after the softmax, on transformers' eager attention. Rows no longer sum to 1.

    Args:
        module (`nn.Module`): the attention module, with `num_key_value_groups` = H / G.
        query, key, value, context_keys, context_values, context_mask, residual, scaling, softcap:
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
    _, weights = eager_attention_forward(module, query, keys, values, attention_mask, 0.0, scaling, softcap)
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
    if kwargs.get("softcap") is not None:
        raise ValueError(
            "attn_implementation 'xformers' cannot limit the attention scores, as this backbone does; use 'eager' "
            "instead."
        )
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
ALL_ATTENTION_FUNCTIONS.register(TOWER_ATTENTION, tower_attention_forward)


def check_attention_implementation(implementation: str) -> None:
    """Refuse xFormers where it cannot run, and the tower's own attention. transformers itself checks the others.

    Args:
        implementation (`str`): name of the implementation, as for `set_attn_implementation`.

    Raises:
        `ValueError`: if it is xFormers and there is no GPU, or the tower's own.
        `ImportError`: if it is xFormers and that is not installed.
    """
    if implementation == TOWER_ATTENTION:
        raise ValueError(f"attn_implementation {implementation!r} is the tower's own; use 'sdpa' or 'eager' instead.")
    if implementation != "xformers":
        return
    if not torch.cuda.is_available():
        raise ValueError("attn_implementation 'xformers' needs a GPU, but torch finds none; use 'sdpa' instead.")
    if importlib.util.find_spec("xformers") is None:
        raise ImportError("xformers is not installed; from a clone, run: pip install -e '.[xformers]'")
