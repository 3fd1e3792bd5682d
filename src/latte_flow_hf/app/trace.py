# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What each evaluation of the model did in a call of the pipeline, and what follows from it for each expert.

The velocity of an evaluation is seen by a forward hook on the tower. It cannot be found from the latents before and
after a step, because schedulers may add noise.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.flow_matching import data_from_velocity


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model.

    Args:
        expert (`int`): the expert that ran.
        sigma (`float`): from 1 (noise) to 0 (data).
        latents (`torch.Tensor`): (batch, channels, height, width), what the expert was given.
        clean (`torch.Tensor`): same shape; the clean latents as this evaluation, guided, estimates them.
        is_guided (`bool`): whether the negative prompt was evaluated too.
        seconds (`float`): from its start to the end of the solver step.
    """

    expert: int
    sigma: float
    latents: torch.Tensor
    clean: torch.Tensor
    is_guided: bool
    seconds: float


@dataclass
class Trace:
    """A call of the pipeline; give `trace.step` as its `callback_on_step_end`, inside `with trace.record(pipe)`.

    Args:
        evaluations (`list[Evaluation]`): of the model, in order.
        final (`torch.Tensor`): the latents after the last step.
        encode_seconds, decode_seconds (`float`): the time before the first evaluation and after the last one.
    """

    evaluations: list[Evaluation] = field(default_factory=list)
    final: torch.Tensor | None = None
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0

    def record(self, pipe: Any) -> "_Recording":
        """A context that watches the calls of this thread."""
        return _Recording(self, pipe)

    def experts(self) -> list[int]:
        """The experts that ran, in order."""
        return list(dict.fromkeys(evaluation.expert for evaluation in self.evaluations))

    def of_expert(self, expert: int) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.expert == expert]


class _Recording:
    def __init__(self, trace: Trace, pipe: Any):
        self.trace, self.pipe = trace, pipe
        self.thread = threading.get_ident()
        self._started: float | None = None
        self._inputs: tuple[torch.Tensor, float, int] | None = None
        self._velocity: torch.Tensor | None = None

    def __enter__(self) -> "_Recording":
        tower = self.pipe.model.tower
        self._handles = [
            tower.register_forward_pre_hook(self._before),
            tower.register_forward_hook(self._after),
        ]
        self._time = self._opened = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self.trace.decode_seconds = time.perf_counter() - self._time

    def _before(self, tower: Any, arguments: tuple) -> None:
        if threading.get_ident() != self.thread:
            return
        latents, timestep, expert = arguments[:3]
        self._time = _now(latents)
        if not self.trace.evaluations:
            self.trace.encode_seconds = self._time - self._opened
        self._inputs = latents, float(timestep[0]) / 1000.0, expert

    def _after(self, tower: Any, arguments: tuple, velocity: torch.Tensor) -> None:
        if threading.get_ident() == self.thread:
            self._velocity = velocity

    def step(self, pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        """The `callback_on_step_end` of the call."""
        assert self._inputs is not None and self._velocity is not None
        latents, sigma, expert = self._inputs
        velocity = self._velocity
        is_guided = len(latents) == 2 * len(tensors["latents"])
        if is_guided:
            latents = latents.chunk(2)[1]
            negative, positive = velocity.chunk(2)
            velocity = negative + pipe.guidance_scale * (positive - negative)
        now = _now(latents)
        self.trace.evaluations.append(
            Evaluation(
                expert, sigma, latents, data_from_velocity(latents, velocity, sigma), is_guided, now - self._time
            )
        )
        self.trace.final = tensors["latents"]
        self._time = now
        return {}


def _now(latents: torch.Tensor) -> float:
    """The time in seconds, when an accelerator has done what was asked of it."""
    if latents.device.type != "cpu":
        torch.accelerator.synchronize(latents.device)
    return time.perf_counter()


@dataclass(frozen=True)
class ExpertReport:
    """What one expert did.

    Args:
        expert (`int`): which.
        high, low (`float`): its interval of sigma.
        layers (`range`): its layers.
        sigmas (`list[float]`): of its evaluations.
        seconds (`float`): the time of its steps.
        is_guided (`bool`): whether one of its evaluations was guided.
        estimate (`torch.Tensor`): (1, channels, height, width), the clean latents as its last evaluation estimates
            them.
        moved (`float`): root mean square of the change of the latents over its interval.
        changed (`float`): root mean square of the change of the estimate, from the last one of the expert before to
            its own last one; of the first expert, from its own first one.
        gates (`torch.Tensor` or `None`): (steps, layers, heads) in (-1, 1), the gates of the residual attention at its
            evaluations; layers without a gate (the first of an expert) are left out. `None` if there are none.
        gate_layers (`list[int]`): the indices of those layers in the tower.
    """

    expert: int
    high: float
    low: float
    layers: range
    sigmas: list[float]
    seconds: float
    is_guided: bool
    estimate: torch.Tensor
    moved: float
    changed: float
    gates: torch.Tensor | None
    gate_layers: list[int]


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.float().square().mean().sqrt())


@torch.no_grad()
def expert_reports(model: Any, trace: Trace) -> list[ExpertReport]:
    """The report of each expert that ran, in order.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model, with the adapters of the call.
        trace ([`Trace`]): a finished call.

    Raises:
        `ValueError`: if nothing was recorded.
    """
    if trace.final is None:
        raise ValueError("The trace is empty: no step of a call was recorded.")
    boundaries = model.config.expert_boundaries
    reports: list[ExpertReport] = []
    experts = trace.experts()
    for position, expert in enumerate(experts):
        evaluations = trace.of_expert(expert)
        after = trace.final
        if position + 1 < len(experts):
            after = trace.of_expert(experts[position + 1])[0].latents
        before = reports[-1].estimate if reports else evaluations[0].clean
        gates, gate_layers = _gates(model, [evaluation.sigma for evaluation in evaluations], expert)
        reports.append(
            ExpertReport(
                expert=expert,
                high=boundaries[expert],
                low=boundaries[expert + 1],
                layers=model.expert_layers(expert),
                sigmas=[evaluation.sigma for evaluation in evaluations],
                seconds=sum(evaluation.seconds for evaluation in evaluations),
                is_guided=any(evaluation.is_guided for evaluation in evaluations),
                estimate=evaluations[-1].clean,
                moved=root_mean_square(after - evaluations[0].latents),
                changed=root_mean_square(evaluations[-1].clean - before),
                gates=gates,
                gate_layers=gate_layers,
            )
        )
    return reports


def _gates(model: Any, sigmas: list[float], expert: int) -> tuple[torch.Tensor | None, list[int]]:
    """The gates of an expert at these sigmas, see [`ExpertReport`]. They depend on the timestep alone."""
    timesteps = 1000.0 * torch.tensor(sigmas, dtype=torch.float32, device=model.tower.head.norm.weight.device)
    modulation = model.modulate(timesteps, expert)
    found = {
        index: layer.gate
        for index, layer in zip(model.expert_layers(expert), modulation.layers)
        if layer.gate is not None
    }
    return (torch.stack(list(found.values()), dim=1).float().cpu() if found else None), list(found)
