# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The steps of a call with any scheduler: [`LatteFlowScheduler`] or a flow-matching one of diffusers.

The model is asked at `1000 * sigma`, and the expert is found from sigma. A scheduler's own `timesteps` may be rounded
to whole numbers (UniPC, DPM++) or count otherwise (`num_train_timesteps`). Schedulers of other processes are refused:
they would run without an error and lead to wrong images.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.flow_matching import data_from_velocity, expert_of_sigma
from ..modeling.sampling import STRENGTH_TOLERANCE
from ..modeling.signatures import takes_argument
from .scheduling_latte_flow import LatteFlowScheduler


# Latents start as pure noise, which belongs to sigma 1. DPM++ starts at 0.999.
MIN_FIRST_SIGMA = 0.99


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device | str | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    steps_per_expert: Sequence[int] | None = None,
    starts_from_noise: bool = True,
) -> None:
    """Call `scheduler.set_timesteps` after a check that it can lead to right images.

    By number, the sigmas are evenly spaced from 1 to 1 / n, same as in diffusers' flow-matching pipelines; schedulers
    that take no sigmas or have `use_flow_sigmas` space their steps themselves.

    Args:
        scheduler: the scheduler, which is changed.
        num_inference_steps (`int`): the number of steps, if none of the following is given.
        device (`torch.device` or `str`, *optional*): the device of `scheduler.timesteps`.
        sigmas (`list[float]`, *optional*): falling sigmas in (0, 1], which the scheduler shifts.
        timesteps (`list[float]`, *optional*): falling timesteps, used as they are.
        steps_per_expert (`list[int]`, *optional*): the number of steps of each expert.
        starts_from_noise (`bool`, defaults to `True`): whether the first sigma must be (almost) 1.

    Raises:
        `ValueError`: if more than one of the three is given, the scheduler does not take it, is none of flow matching,
            or starts at another sigma than pure noise.
    """
    choices: dict[str, Any] = {"sigmas": sigmas, "timesteps": timesteps, "steps_per_expert": steps_per_expert}
    arguments = {name: value for name, value in choices.items() if value is not None}
    if len(arguments) > 1:
        raise ValueError(f"give only one of sigmas, timesteps and steps_per_expert, got {list(arguments)}.")
    name = type(scheduler).__name__
    scheduler_class: Any = type(scheduler)
    taken = [
        argument
        for argument in choices
        if hasattr(scheduler_class, "set_timesteps") and takes_argument(scheduler_class.set_timesteps, argument)
    ]
    for argument in arguments:
        if argument not in taken:
            raise ValueError(f"scheduler {name} takes no {argument}; use a LatteFlowScheduler.")
    has_own_spacing = "sigmas" not in taken or bool(scheduler.config.get("use_flow_sigmas"))
    if not arguments and has_own_spacing:
        arguments = {"num_inference_steps": num_inference_steps}
    elif not arguments:
        arguments = {"sigmas": np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()}
    elif "sigmas" in arguments and has_own_spacing:
        arguments["sigmas"] = np.array(sigmas, dtype=np.float64)  # UniPC multiplies them.

    if not isinstance(scheduler, LatteFlowScheduler):
        _check_flow_matching(scheduler, arguments)
    scheduler.set_timesteps(**arguments, device=device)
    # Truncated timesteps can be equal: a scheduler that looks up the first one would start at the second.
    scheduler.set_begin_index(0)
    first_sigma = float(scheduler.sigmas[0])
    if starts_from_noise and first_sigma < MIN_FIRST_SIGMA:
        raise ValueError(
            f"the steps of scheduler {name} start at sigma {first_sigma:g}, but latents that are drawn are pure "
            "noise, of sigma 1; give `latents` with that much noise, or steps from sigma 1."
        )


def distilled_scheduler(scheduler: Any, sampling: Mapping[str, Any], config: Any) -> Any:
    """The scheduler for a model that was distilled to few steps: Euler, with the new noise that the distilled experts
    were trained with, which is none if `sampling` does not tell. Without distilled experts it is the scheduler itself.

    Args:
        scheduler: the scheduler of the model before distillation.
        sampling (`dict`): `distilled_experts` and more, see [`modeling.sampling.check_sampling`].
        config ([`LatteFlowConfig`]): the configuration of the model.
    """
    distilled = sampling.get("distilled_experts") or ()
    if not distilled:
        return scheduler
    shares = getattr(scheduler, "noise_shares", [0.0] * config.num_experts)
    trained = sampling.get("new_noise") or [0.0] * config.num_experts
    new_noise = [trained[expert] if expert in distilled else share for expert, share in enumerate(shares)]
    own = scheduler.config if isinstance(scheduler, LatteFlowScheduler) else {}
    changes = {"expert_boundaries": config.expert_boundaries, "stochastic_sampling": None, "solver": "euler"}
    return LatteFlowScheduler.from_config(own, **changes, new_noise=new_noise if any(new_noise) else 0.0)


def model_timesteps(scheduler: Any) -> torch.Tensor:
    """The time that the model takes: `1000 * sigma` of each evaluation, (n,), float32, beside `timesteps`."""
    return (scheduler.sigmas[:-1] * 1000).to(scheduler.timesteps.device)


def experts_of_steps(scheduler: Any, boundaries: Sequence[float]) -> list[int]:
    """The expert of each evaluation. A Heun solver's second one belongs to the expert of the step that it ends."""
    is_heun = scheduler.order == 2
    return [
        expert_of_sigma(sigma, boundaries, ends_step=is_heun and index % 2 == 1)
        for index, sigma in enumerate(scheduler.sigmas[:-1].tolist())
    ]


def num_steps(scheduler: Any) -> int:
    """The number of steps. Each is one evaluation of the model; with Heun's solver, all but the last one are two."""
    return (len(scheduler.timesteps) + scheduler.order - 1) // scheduler.order


def first_evaluation(scheduler: Any, strength: float) -> int:
    """The index of the evaluation at which image-to-image starts: the last `strength * n` of n steps are taken,
    rounded up to a whole number. Same as `get_timesteps` of diffusers' pipelines, apart from rounding errors.

    Args:
        scheduler: the scheduler, after `set_timesteps`.
        strength (`float`): in (0, 1].
    """
    n = num_steps(scheduler)
    num_taken = max(1, math.ceil(n * strength - STRENGTH_TOLERANCE))
    return (n - num_taken) * scheduler.order


def finish_step(scheduler: Any, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Take the sample to sigma 0 after the last step of a scheduler that stops above it.

    DEIS and SA-Solver repeat their last sigma, and `final_sigmas_type="sigma_min"` ends at a small one: the rest of
    the noise is removed by a step of Euler with the last velocity.
    """
    last_sigma = float(scheduler.sigmas[-1])
    if index + 1 < len(scheduler.timesteps) or last_sigma == 0.0:
        return sample
    return data_from_velocity(sample.float(), velocity.float(), last_sigma).to(sample.dtype)


def _check_flow_matching(scheduler: Any, arguments: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: if the scheduler's sigmas are not those of flow matching, or its steps do not lead to an image
            at which the velocity always points.
    """
    name = type(scheduler).__name__
    advice = (
        "Use a LatteFlowScheduler, or a flow-matching scheduler of diffusers: FlowMatchEulerDiscreteScheduler, or for "
        "example UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')."
    )
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(**arguments)
        scheduler.set_begin_index(0)
        sigmas, timesteps = scheduler.sigmas[:-1].double(), scheduler.timesteps.double()
        num_train_timesteps = scheduler.config.num_train_timesteps
        are_flow_sigmas = bool(
            len(sigmas) == len(timesteps) > 0
            and (sigmas.diff() <= 0).all()
            and 0 <= scheduler.sigmas[-1] <= sigmas[-1]
            and 0 < sigmas[-1] <= sigmas[0] <= 1
        )
        # Up to one (and rounding): some schedulers truncate their timesteps to whole numbers.
        are_timesteps = are_flow_sigmas and bool(((num_train_timesteps * sigmas - timesteps).abs() < 1.01).all())
        end = _end_of_straight_path(scheduler) if are_timesteps else None
    except Exception as error:
        raise ValueError(f"scheduler {name} cannot be used: {str(error) or type(error).__name__} {advice}") from error
    if not are_flow_sigmas:
        raise ValueError(f"scheduler {name} has no flow-matching sigmas, which fall from 1 to 0. {advice}")
    if end is None:
        raise ValueError(
            f"timesteps of scheduler {name} do not belong to its sigmas: {timesteps[:3].tolist()} to "
            f"{sigmas[:3].tolist()}. If timesteps are given, it must not shift sigmas. {advice}"
        )
    if end.shape != _SHAPE or not ((end - _TARGET).abs() < 1e-2).all():
        raise ValueError(
            f"scheduler {name} does not lead to the image at which the velocity points, with prediction_type "
            f"{scheduler.config.get('prediction_type')!r} and the rest of its configuration. {advice}"
        )


_SHAPE, _TARGET = (1, 1, 2, 2), 2.0


def _end_of_straight_path(scheduler: Any) -> torch.Tensor:
    """Where the steps end if all data are `_TARGET`, so that the velocity at x is (x - target) / sigma.

    Every solver of flow matching, with or without new noise, ends at the target up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    step_kwargs = generator_kwargs(scheduler, generator)
    sample = torch.randn(_SHAPE, generator=generator)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (sample - _TARGET) / scheduler.sigmas[index]
        sample = scheduler.step(velocity, timestep, sample, **step_kwargs, return_dict=False)[0]
        sample = finish_step(scheduler, index, velocity, sample)
    return sample


def generator_kwargs(scheduler: Any, generator: Any) -> dict[str, Any]:
    """The argument `generator` for `scheduler.step`, if it takes one: schedulers with new noise draw from it."""
    scheduler_class: Any = type(scheduler)
    return {"generator": generator} if takes_argument(scheduler_class.step, "generator") else {}
