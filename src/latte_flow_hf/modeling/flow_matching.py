# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The mathematics of flow matching with timestep experts, as pure functions.

Time is diffusers' sigma: 1 is noise, 0 is data. The paper's own axis runs the other way (t = 1 - sigma).
Shapes: `data`, `noise`, `noisy` and velocities are (batch, ...); `sigma` is (batch,), or a scalar for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn


# Sigmas arrive in float32 and through `timestep = 1000 * sigma`: a sigma this close to a boundary is on it.
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
    """The data end of the path through `noisy`: data = x_sigma - sigma * velocity."""
    return noisy - _per_example(sigma, noisy) * velocity


def guided_velocity(
    negative_velocity: torch.Tensor, prompt_velocity: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """Classifier-free guidance: v_negative + w * (v_prompt - v_negative). (Paper: the sampler.)"""
    return negative_velocity + guidance_scale * (prompt_velocity - negative_velocity)


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity over all elements, in float32. (Paper: the training objective.)"""
    return nn.functional.mse_loss(predicted.float(), target.float())


def mean_velocity(
    start: torch.Tensor, end: torch.Tensor, sigma_start: torch.Tensor | float, sigma_end: torch.Tensor | float
) -> torch.Tensor:
    """The velocity of the one Euler step that leads from x_s to x_r: (x_s - x_r) / (s - r), with s > r.

    It is the mean of d x_sigma / d sigma over the path between them. A student that predicts it at x_s crosses the
    interval in one evaluation. (Chosen: the regression of distillation, on states of the teacher's own trajectory.)
    """
    return (start - end) / (_per_example(sigma_start, start) - _per_example(sigma_end, start))


def folded_guidance_target(
    target: torch.Tensor, velocity: torch.Tensor, uncond_velocity: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """The target of a model that learns to be guided without a second evaluation: v + (1 - 1 / g) * (v_c - v_0).

    v is the target without guidance, v_c and v_0 are the model's own velocities with the prompt and with the empty
    one, without gradients. Where the model predicts the mean of its target, v_c = v_0 + g * (E[v] - v_0): the guided
    velocity of scale g. With the empty prompt v_c is v_0, and the target is v. (arXiv 2502.12154, its w being
    1 - 1 / g.)
    """
    return target + (1.0 - 1.0 / guidance_scale) * (velocity - uncond_velocity)


def sigmas_per_expert(boundaries: Sequence[float], steps_per_expert: Sequence[int]) -> torch.Tensor:
    """Evenly spaced sigmas in each interval: high - j * (high - low) / n for j = 0, ..., n - 1; an expert with no
    steps has none.

    Returns:
        `torch.Tensor` of shape (sum of n,), float32, falling, without the 0 at the end.
    """
    sigmas = [
        np.linspace(high, low, n, endpoint=False) for high, low, n in zip(boundaries, boundaries[1:], steps_per_expert)
    ]
    return torch.from_numpy(np.concatenate(sigmas)).to(torch.float32)


def uniform_boundaries(num_experts: int) -> list[float]:
    """K + 1 evenly spaced sigmas from 1 to 0. (Chosen: the sources do not give the intervals.)"""
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
            f"expert(s), got {list(boundaries)}; for example {uniform_boundaries(num_experts)}."
        )
    return found


def expert_of_sigma(sigma: float, boundaries: Sequence[float], ends_step: bool = False) -> int:
    """The expert k with boundaries[k] >= sigma > boundaries[k + 1]; the last one owns 0 too.

    A solver step that starts on a boundary runs below it, so it belongs to the expert below. An evaluation at the end
    of a step (`ends_step`, the corrector of a second-order solver) belongs to the expert above.

    Raises:
        `ValueError`: if sigma is not in [0, 1].
    """
    sigma = float(sigma)
    if not -BOUNDARY_TOLERANCE <= sigma <= 1.0 + BOUNDARY_TOLERANCE:
        raise ValueError(f"sigma must be from 0 to 1 (a timestep from 0 to 1000), got {sigma} ({1000 * sigma}).")
    tolerance = -BOUNDARY_TOLERANCE if ends_step else BOUNDARY_TOLERANCE
    return sum(sigma <= boundary + tolerance for boundary in boundaries[1:-1])


def draw_expert_sigmas(
    num_sigmas: int,
    interval: tuple[float, float],
    generator: torch.Generator | None = None,
    sampling: str = "uniform",
) -> torch.Tensor:
    """Stratified sigmas of one expert: the j-th of n lies in the j-th of n parts of equal probability.

    uniform: sigma_j = high - (high - low) * (j + u_j) / n with u_j uniform in [0, 1), so high >= sigma > low.

    logit_normal: sigma_j = F^-1(F(high) - (F(high) - F(low)) * (j + u_j) / n), F being the distribution function of a
    sigma whose logit is standard normal. (Chosen: the density of Stable Diffusion 3, restricted to the interval, so
    that each expert sees what one network for all timesteps would see there.)

    Args:
        num_sigmas (`int`): n.
        interval (`tuple[float, float]`): the expert's boundaries, (high, low).
        generator (`torch.Generator`, *optional*): source of the randomness.
        sampling (`str`, defaults to `"uniform"`): `"uniform"` or `"logit_normal"`.

    Returns:
        `torch.Tensor` of shape (n,), float32, falling, on the generator's device (the CPU without one).
    """
    high, low = interval
    device = None if generator is None else generator.device
    uniform = torch.rand(num_sigmas, generator=generator, device=device)
    part = torch.arange(num_sigmas, device=device) + uniform
    if sampling == "logit_normal":
        top, bottom = torch.special.ndtr(torch.tensor(interval, dtype=torch.float64).logit()).tolist()
        sigma = torch.special.ndtri(top - (top - bottom) * part.double() / num_sigmas).sigmoid().float()
    else:
        sigma = high - (high - low) * part / num_sigmas
    # In float32 the last part can round to `low` itself, which belongs to the next expert.
    return sigma.clamp(min=low + BOUNDARY_TOLERANCE, max=high)


@dataclass(frozen=True)
class ExpertExamples:
    """The examples of a batch that one expert learns from.

    Args:
        expert (`int`): the expert.
        indices (`torch.Tensor`): (n,), int64, rows of this process's batch.
        sigma (`torch.Tensor`): (n,), float32, the sigma of each, in the expert's interval.
        weight (`float`): factor of their mean loss, so that the mean over processes is the mean over all examples.
    """

    expert: int
    indices: torch.Tensor
    sigma: torch.Tensor
    weight: float


def assign_examples_to_experts(
    batch_size: int,
    experts: Sequence[int],
    boundaries: Sequence[float],
    interval_overlap: float = 0.0,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[ExpertExamples]:
    """Split the batch of all processes over the experts, and draw the sigma of each example.

    Example i of the global batch goes to expert number i mod len(experts). (Chosen: a step then costs what one expert
    costs.) A global batch smaller than the number of experts is repeated from its start, so that every expert gets an
    example. Each process draws all sigmas from the same random state and keeps those of its own rows.

    Args:
        batch_size (`int`): rows of this process's batch; the same in every process.
        experts (`list[int]`): the experts that learn.
        boundaries (`list[float]`): K + 1 falling sigmas from 1 to 0.
        interval_overlap (`float`, defaults to 0): widens each interval to (1 - overlap) times its lower end.
        sampling (`str`, defaults to `"uniform"`): see `draw_expert_sigmas`.
        generator (`torch.Generator`, *optional*): source of the randomness, in the same state in every process.
        rank, world_size (`int`): this process, and the number of processes.

    Returns:
        `list[ExpertExamples]`: one entry for each expert. An expert without an example in this process gets row 0 with
        weight 0, so that every process has gradients for the same weights.
    """
    num_examples = world_size * batch_size
    rows = torch.arange(max(num_examples, len(experts))) % num_examples
    assigned = []
    for position, expert in enumerate(experts):
        expert_rows = rows[position :: len(experts)]
        interval = (boundaries[expert], boundaries[expert + 1] * (1.0 - interval_overlap))
        sigma = draw_expert_sigmas(len(expert_rows), interval, generator, sampling)
        local = (expert_rows // batch_size == rank).nonzero().squeeze(1)
        weight = world_size * len(local) / len(expert_rows)
        if len(local) == 0:
            local = torch.zeros(1, dtype=torch.int64)
        indices = expert_rows[local] % batch_size
        assigned.append(ExpertExamples(expert, indices, sigma[local.to(sigma.device)], weight))
    return assigned


def _per_example(sigma: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """(batch,) -> (batch, 1, ..., 1), so that it multiplies `like`."""
    if isinstance(sigma, torch.Tensor) and sigma.ndim == 1:
        return sigma.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
    return sigma
