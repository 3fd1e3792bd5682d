# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Positions of the latent tokens: a sine-cosine embedding in the image, a rotary embedding after the prompt.

Shapes: B images, N = height * width latent tokens, D hidden size, d head size. Tokens are in reading order.
"""

from collections.abc import Callable

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid


def sincos_pos_embed(
    hidden_size: int, height: int, width: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """DiT's fixed 2D sine-cosine embedding of height x width tokens, (N, D).

    Chosen: because Qwen2-VL's M-RoPE gives the columns its lowest frequencies alone, which hardly tell neighbours
    apart. Without this embedding images smear along the rows.
    """
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return get_2d_sincos_pos_embed_from_grid(hidden_size, grid, output_type="pt").to(dtype)


def interleaved_rotary_embedding(
    rotary_emb: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    next_position: torch.Tensor,
    height: int,
    width: int,
    rotates_pairs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding of height x width tokens directly after the prompts: cos and sin, (B, N, d) each.

    Token (row, column) has position `next_position` + row in the even frequencies and `next_position` + column in the
    odd ones. (Chosen: Qwen2-VL's M-RoPE gives the columns its lowest frequencies alone; Qwen3-VL interleaves for the
    same reason.) The keys of text have one position on all axes, so that both orders are the same for them.

    Args:
        rotary_emb (`Callable`): positions (B, N) -> cos and sin, (B, N, d) each, of one position on all axes.
        next_position (`torch.Tensor`): (B,), the first position after the prompt of each image.
        height, width (`int`): in tokens.
        rotates_pairs (`bool`, defaults to `False`):
            Whether the two features of one frequency are neighbours (GLM-4V), or lie in the two halves of a head.
    """
    tokens = torch.arange(height * width, device=next_position.device)
    rows = rotary_emb(next_position[:, None] + tokens // width)
    columns = rotary_emb(next_position[:, None] + tokens % width)
    even = torch.arange(rows[0].shape[-1] // 2, device=next_position.device) % 2 == 0
    is_row = even.repeat_interleave(2) if rotates_pairs else torch.cat([even, even])
    cos, sin = (torch.where(is_row, row, column) for row, column in zip(rows, columns))
    return cos, sin
