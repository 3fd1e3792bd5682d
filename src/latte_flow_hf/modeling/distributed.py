# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What several processes that train one model draw together.

Every draw is made for the global batch, by each process from the same random state, and each takes its own rows: so
two processes with half of a batch each learn what one learns from all of it. The global batch is the processes'
batches in their order, all of one size, as accelerate's data loaders share them out.
"""

from typing import Any

import torch
from torch import distributed
from torch.utils.data import get_worker_info


def rank_and_world_size() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are: (0, 1) if there is no process group."""
    # A data loader's worker inherits the group, but cannot speak in it.
    if not distributed.is_available() or not distributed.is_initialized() or get_worker_info() is not None:
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def local_rows(every: torch.Tensor) -> torch.Tensor:
    """(processes * B, ...) -> (B, ...), the rows of this process."""
    index, count = rank_and_world_size()
    return every.chunk(count)[index]


def all_gather_list(own: list) -> list:
    """The lists of all processes, joined in their order; each of them must ask."""
    _, count = rank_and_world_size()
    if count == 1:
        return own
    parts: list[Any] = [None] * count
    distributed.all_gather_object(parts, own)
    return [item for part in parts for item in part]
