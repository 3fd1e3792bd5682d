# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The mathematics of flow matching with timestep experts, as pure functions.

Time is diffusers' sigma: 1 is noise, 0 is data. The paper's own axis runs the other way (t = 1 - sigma).
Shapes: `data`, `noise`, `noisy` and velocities are (batch, ...); `sigma` is (batch,), or a scalar for all.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


# Sigmas reach us as float32 and through `timestep = 1000 * sigma`: what is this close to a boundary is on it.
BOUNDARY_TOLERANCE = 1e-5

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


def interpolate(data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """The straight path: x_sigma = (1 - sigma) * data + sigma * noise. (Paper: flow matching.)"""
    sigma = _per_example(sigma, data)
    return (1.0 - sigma) * data + sigma * noise


def velocity_target(data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The path's derivative, d x_sigma / d sigma = noise - data, the same at every sigma."""
    return noise - data


def data_from_velocity(noisy: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """Where the path through `noisy` starts: data = x_sigma - sigma * velocity."""
    return noisy - _per_example(sigma, noisy) * velocity


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity over all elements, in float32. (Paper: the training objective.)"""
    return nn.functional.mse_loss(predicted.float(), target.float())


def uniform_boundaries(num_experts: int) -> list[float]:
    """K + 1 evenly spaced sigmas from 1 to 0. (Chosen: the sources do not say how the intervals are laid.)"""
    return [1.0 - k / num_experts for k in range(num_experts)] + [0.0]


def check_boundaries(boundaries: Sequence[float], num_experts: int) -> list[float]:
    """The boundaries as a list of floats.

    Raises:
        `ValueError`: if they are not `num_experts` + 1 strictly falling sigmas from 1 to 0.
    """
    found = [float(b) for b in boundaries]
    falling = all(a > b for a, b in pairwise(found))
    if num_experts < 1 or len(found) != num_experts + 1 or not falling or found[0] != 1.0 or found[-1] != 0.0:
        num_experts = max(num_experts, 1)
        raise ValueError(
            f"expert_boundaries must be {num_experts + 1} strictly falling sigmas from 1 to 0 for {num_experts} "
            f"expert(s), got {list(boundaries)}; {uniform_boundaries(num_experts)} would do."
        )
    return found


def expert_of_sigma(sigma: float, boundaries: Sequence[float], ends_step: bool = False) -> int:
    """The expert k with boundaries[k] >= sigma > boundaries[k + 1]; the last one owns 0 too.

    A solver step that starts on a boundary runs below it, hence belongs to the expert below; an evaluation where a
    step ends (`ends_step`, a corrector's) belongs to the expert above.

    Raises:
        `ValueError`: if sigma is not in [0, 1].
    """
    sigma = float(sigma)
    if not -BOUNDARY_TOLERANCE <= sigma <= 1.0 + BOUNDARY_TOLERANCE:
        raise ValueError(f"sigma must be from 0 to 1 (a timestep from 0 to 1000), got {sigma} ({1000 * sigma}).")
    tolerance = -BOUNDARY_TOLERANCE if ends_step else BOUNDARY_TOLERANCE
    return sum(sigma <= boundary + tolerance for boundary in boundaries[1:-1])


def draw_expert_sigmas(
    count: int,
    interval: tuple[float, float],
    generator: torch.Generator | None = None,
    sampling: str = "uniform",
) -> torch.Tensor:
    """`count` sigmas of one expert, stratified: the j-th falls into the j-th of `count` parts of equal probability.

    uniform: sigma_j = high - (high - low) * (j + u_j) / count with u_j uniform in [0, 1), so high >= sigma > low.

    logit_normal: sigma_j = F^-1(F(high) - (F(high) - F(low)) * (j + u_j) / count), F the distribution of a sigma whose
    logit is standard normal. (Chosen: the density of Stable Diffusion 3, cut to the interval, so that inside it each
    expert sees what one network for all timesteps would see there.)

    Args:
        count (`int`): how many.
        interval (`tuple[float, float]`): the expert's boundaries, (high, low).
        generator (`torch.Generator`, *optional*): where the randomness comes from.
        sampling (`str`, defaults to `"uniform"`): or `"logit_normal"`.

    Returns:
        `torch.Tensor` of shape (count,), float32, falling, on the generator's device (the CPU without one).
    """
    high, low = interval
    device = None if generator is None else generator.device
    uniform = torch.rand(count, generator=generator, device=device)
    part = torch.arange(count, device=device) + uniform
    if sampling == "logit_normal":
        top, bottom = torch.special.ndtr(torch.tensor(interval, dtype=torch.float64).logit()).tolist()
        sigma = torch.special.ndtri(top - (top - bottom) * part.double() / count).sigmoid().float()
    else:
        sigma = high - (high - low) * part / count
    # In float32 the last part can round to `low` itself, which belongs to the next expert.
    return sigma.clamp(min=low + BOUNDARY_TOLERANCE, max=high)


def _per_example(sigma: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """(batch,) -> (batch, 1, ..., 1), so that it multiplies `like`."""
    if isinstance(sigma, torch.Tensor) and sigma.ndim == 1:
        return sigma.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
    return sigma
