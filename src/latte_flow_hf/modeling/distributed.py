# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Random draws that the processes of one training run share.

Each process makes every draw for the global batch, from the same random state, and keeps its own rows. Two processes
with half of a batch each then learn the same as one process with all of it. The global batch is the concatenation of
the processes' batches in the order of their ranks, all of one size, as accelerate's data loaders distribute them.
"""

from typing import Any

import torch
from torch import distributed
from torch.utils.data import get_worker_info


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without a process group."""
    # A worker of a data loader inherits the process group but must not communicate.
    if not distributed.is_available() or not distributed.is_initialized() or get_worker_info() is not None:
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def local_rows(global_rows: torch.Tensor) -> torch.Tensor:
    """(world_size * B, ...) -> (B, ...), the rows of this process."""
    rank, world_size = rank_and_world_size()
    return global_rows.chunk(world_size)[rank]


def randn_local_rows(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Noise like `like` (B, ...): this process's rows of the noise for the batch of all processes."""
    _, world_size = rank_and_world_size()
    noise = torch.randn(
        (world_size * len(like), *like.shape[1:]),
        generator=generator,
        device=like.device if generator is None else generator.device,
        dtype=like.dtype,
    )
    return local_rows(noise).to(like.device)


def all_gather_list(items: list) -> list:
    """The lists of all processes, concatenated in the order of their ranks. Every process must call it."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return items
    gathered: list[Any] = [None] * world_size
    distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
