# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One process; tests/integration/test_processes.py has several."""

import torch

from latte_flow_hf.modeling import distributed
from latte_flow_hf.modeling.distributed import all_gather_list, local_rows, randn_local_rows, rank_and_world_size


def test_one_process_has_everything():
    assert rank_and_world_size() == (0, 1)
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(local_rows(rows), rows) and all_gather_list([1, 2]) == [1, 2]


def test_processes_share_one_draw(monkeypatch):
    like = torch.zeros(2, 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda rank=rank: (rank, 3))
        parts.append(randn_local_rows(like, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.cat(parts), torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
