# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Functions that several test files use; fixtures are in conftest.py."""

import torch


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bytes(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fill(module: torch.nn.Module, seed: int, std: float) -> None:
    """Small random numbers in every parameter: norms around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1.0 + values if "norm" in name and name.endswith("weight") else values)
