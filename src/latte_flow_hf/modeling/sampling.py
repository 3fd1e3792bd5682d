# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How a checkpoint wants to be sampled: steps and guidance that the pipeline uses if the call does not give them.

They belong to the weights, as the boundaries of the experts do, so they are stored in the model's configuration, and
in an adapter that changes them. The solver is the scheduler's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .flow_matching import BOUNDARY_TOLERANCE, sigmas_per_expert


# Of a step: 0.333 means a third of three steps.
STRENGTH_TOLERANCE = 1e-2

SAMPLING_FIELDS = (
    "num_inference_steps",
    "steps_per_expert",
    "guidance_scale",
    "folded_guidance_scale",
    "distilled_experts",
    "new_noise",
)


def check_sampling(sampling: Any, num_experts: int) -> dict[str, Any]:
    """
    Args:
        sampling (`dict`): with any of

            - `num_inference_steps` (`int`), or `steps_per_expert` (`list[int]`);
            - `guidance_scale` (`float`, or a list of one for each expert);
            - `folded_guidance_scale` (`float`, or a list of one for each expert): the guidance that the weights
              contain, so that `guidance_scale` is 1; an expert with 1 has none in its weights;
            - `distilled_experts` (`list[int]`): experts that were trained to take exactly these `steps_per_expert`,
              without guidance;
            - `new_noise` (`list[float]`): the share of the noise, 0 to 1, that distilled experts replace after each of
              their steps, one for each expert. The scheduler does it; none by default.
        num_experts (`int`): K.

    Returns:
        `dict`: a copy, without fields that are `None`.

    Raises:
        `ValueError`: if a field is unknown or has an invalid value.
    """
    if not isinstance(sampling, Mapping) or not set(sampling) <= set(SAMPLING_FIELDS):
        raise ValueError(f"sampling must be a dict with some of the fields {list(SAMPLING_FIELDS)}, got {sampling!r}.")
    number, steps = sampling.get("num_inference_steps"), sampling.get("steps_per_expert")
    if number is not None and steps is not None:
        raise ValueError(f"sampling: give either num_inference_steps or steps_per_expert, got {dict(sampling)}.")
    if number is not None and (not _is_count(number) or number < 1):
        raise ValueError(f"sampling: num_inference_steps must be a positive whole number, got {number!r}.")
    if steps is not None:
        check_steps_per_expert(steps, num_experts, "sampling: steps_per_expert")
    for name in ("guidance_scale", "folded_guidance_scale"):
        scale = sampling.get(name)
        scales = scale if isinstance(scale, (list, tuple)) else [scale] * num_experts
        are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in scales)
        if scale is not None and (len(scales) != num_experts or not are_numbers):
            raise ValueError(
                f"sampling: {name} must be a number, or one for each of {num_experts} experts, got {scale!r}."
            )
    experts = sampling.get("distilled_experts")
    if experts is not None:
        if not isinstance(experts, (list, tuple)) or not set(experts) <= set(range(num_experts)):
            raise ValueError(
                f"sampling: distilled_experts must be some of {list(range(num_experts))}, got {experts!r}."
            )
        if experts and steps is None:
            raise ValueError("sampling: distilled_experts must come with their steps_per_expert.")
    shares = sampling.get("new_noise")
    if shares is not None:
        is_list = isinstance(shares, (list, tuple)) and len(shares) == num_experts
        if not is_list or not all(_is_share(share) for share in shares):
            raise ValueError(
                f"sampling: new_noise must be {num_experts} numbers from 0 to 1, one for each expert, got {shares!r}."
            )
        if not experts:
            raise ValueError("sampling: new_noise is for distilled_experts; a scheduler has its own new_noise.")
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in sampling.items() if value is not None
    }


def check_steps_per_expert(steps_per_expert: Any, num_experts: int, name: str = "steps_per_expert") -> list[int]:
    """
    Raises:
        `ValueError`: if it is not a list of K whole numbers, the first one at least 1.
    """
    steps = list(steps_per_expert) if isinstance(steps_per_expert, (list, tuple)) else []
    if len(steps) != num_experts or not all(_is_count(n) and n >= 0 for n in steps) or not steps[0]:
        raise ValueError(
            f"{name} must be {num_experts} whole numbers, one for each expert, the first at least 1, got "
            f"{steps_per_expert}."
        )
    return [int(n) for n in steps]


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def check_distilled_steps(sigmas: Sequence[float], sampling: Mapping[str, Any], boundaries: Sequence[float]) -> None:
    """Check that distilled experts take the steps that they were trained for.

    Args:
        sigmas (`list[float]`): the n + 1 sigmas of a call. They may start below 1, as in image-to-image.
        sampling (`dict`): of the model or an adapter, see `check_sampling`.
        boundaries (`list[float]`): the experts' K + 1 boundaries.

    Raises:
        `ValueError`: if a distilled expert would take other steps.
    """
    steps, experts = sampling.get("steps_per_expert") or [], sampling.get("distilled_experts") or []
    trained = sigmas_per_expert(boundaries, steps).tolist() if experts else []
    for expert in experts:
        high, low = boundaries[expert] + BOUNDARY_TOLERANCE, boundaries[expert + 1] + BOUNDARY_TOLERANCE
        expected = [sigma for sigma in trained if low < sigma <= min(high, sigmas[0] + BOUNDARY_TOLERANCE)]
        used = [sigma for sigma in sigmas if low < sigma <= high]
        differ = any(abs(a - b) > BOUNDARY_TOLERANCE for a, b in zip(used, expected))
        if len(used) != len(expected) or differ:
            raise ValueError(
                f"expert {expert} was distilled to steps_per_expert={list(steps)} with the solver 'euler' (here sigma "
                f"{_listed(expected)}), but this call would evaluate it at sigma {_listed(used)}. Leave out the steps "
                "of the call, or give those."
            )


def default_strength(num_steps: int, sampling: Mapping[str, Any]) -> float:
    """The share of `num_steps` that image-to-image takes by default: 0.8, or of a distilled model as many whole steps
    as fit into that, but at least one."""
    if not sampling.get("distilled_experts"):
        return DEFAULT_STRENGTH
    return max(1, int(DEFAULT_STRENGTH * num_steps)) / num_steps


def check_distilled_strength(strength: float, num_steps: int, first_expert: int, sampling: Mapping[str, Any]) -> None:
    """Check that image-to-image with a distilled expert starts where one of its steps does.

    Other models round the number of steps up, which changes little: they take many.

    Args:
        strength (`float`): the share of the steps to take.
        num_steps (`int`): n, the number of all steps.
        first_expert (`int`): the expert of the first step that is taken.
        sampling (`dict`): of the model or an adapter, see `check_sampling`.

    Raises:
        `ValueError`: naming the values that are allowed.
    """
    num_taken = strength * num_steps
    if first_expert in (sampling.get("distilled_experts") or []) and (
        abs(num_taken - round(num_taken)) > STRENGTH_TOLERANCE or not round(num_taken)
    ):
        allowed = [number / num_steps for number in range(1, num_steps + 1)]
        raise ValueError(
            f"strength must be one of {_listed(allowed)}: expert {first_expert} was distilled to steps_per_expert="
            f"{list(sampling['steps_per_expert'])}, and a call starts at one of these steps; got {strength:g}."
        )


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas) or "none"


def guides_any(guidance_scale: float | Sequence[float], experts: Sequence[int]) -> bool:
    """Whether one of `experts` is guided with `guidance_scale`, a number or one for each expert."""
    if isinstance(guidance_scale, Sequence):
        return any(guidance_scale[expert] > 1 for expert in experts)
    return bool(experts) and guidance_scale > 1


def experts_with_guidance(sampling: Mapping[str, Any], num_experts: int) -> list[int]:
    """The experts whose weights contain guidance: distilled ones, and those that were trained with it."""
    folded = sampling.get("folded_guidance_scale", 1.0)
    return [
        expert
        for expert in range(num_experts)
        if expert in (sampling.get("distilled_experts") or []) or guides_any(folded, [expert])
    ]


def guidance_of_steps(
    guidance_scale: float | Sequence[float],
    guidance_interval: tuple[float, float] | None,
    experts: Sequence[int],
    timesteps: Sequence[float],
) -> list[float]:
    """The guidance scale of each evaluation; 1.0 where it is not guided.

    Args:
        guidance_scale (`float` or `list[float]`): one, or one for each expert.
        guidance_interval (`tuple[float, float]`, *optional*): (low, high) sigmas between which guidance is used.
        experts (`list[int]`): the expert of each evaluation.
        timesteps (`list[float]`): `1000 * sigma` of each evaluation.
    """
    low, high = (0.0, 1.0) if guidance_interval is None else guidance_interval
    scales = [guidance_scale[expert] if isinstance(guidance_scale, Sequence) else guidance_scale for expert in experts]
    return [
        scale if scale > 1 and low <= timestep / 1000.0 <= high else 1.0 for scale, timestep in zip(scales, timesteps)
    ]


def describe_sampling(sampling: Mapping[str, Any] | None, solver: str | None = None) -> str:
    """How a checkpoint is sampled by default, in one line: `steps per expert 1, 1, 1, 1 (euler); guidance 1`."""
    sampling = sampling or {}
    steps, scale = sampling.get("steps_per_expert"), sampling.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
    text = f"{sampling.get('num_inference_steps', DEFAULT_NUM_STEPS)} steps"
    if steps is not None:
        text = f"steps per expert {', '.join(map(str, steps))}"
    scales = scale if isinstance(scale, (list, tuple)) else [scale]
    text += f"{'' if solver is None else f' ({solver})'}; guidance {', '.join(f'{value:g}' for value in scales)}"
    folded = sampling.get("folded_guidance_scale")
    if folded is not None:
        folded = folded if isinstance(folded, (list, tuple)) else [folded]
        text += f", and {', '.join(f'{value:g}' for value in folded)} in the weights"
    if sampling.get("distilled_experts"):
        text += f"; experts {', '.join(map(str, sampling['distilled_experts']))} distilled to these steps"
    if any(sampling.get("new_noise") or []):
        text += f"; new noise {', '.join(f'{share:g}' for share in sampling['new_noise'])}"
    return text


# Of checkpoints that do not say. (Paper: 40 steps; its FID is flat from a guidance of about 4 up.)
DEFAULT_NUM_STEPS = 40
DEFAULT_GUIDANCE_SCALE = 4.0
# (Chosen: at 0.8 most prompts win over the source, as measured in docs/guides/image_to_image.md.)
DEFAULT_STRENGTH = 0.8
