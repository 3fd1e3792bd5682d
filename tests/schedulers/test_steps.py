# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Every scheduler of diffusers is right on a field in closed form, or is refused by name.

The oracle: data of N(MEAN, STD^2). Its velocity is known, and the flow takes noise z to MEAN + STD * z.
"""

import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.schedulers.steps import (
    experts_of_steps,
    finish_step,
    first_evaluation,
    generator_kwargs,
    model_timesteps,
    set_timesteps,
)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {**FLOW, "algorithm_type": "sde-dpmsolver++"}
MEAN, STD = 2.0, 0.5

# Deterministic schedulers, and the error that they may have with 20 steps.
DETERMINISTIC = [
    (LatteFlowScheduler, {}, 0.035),
    (LatteFlowScheduler, {"solver": "heun"}, 0.002),
    (FlowMatchEulerDiscreteScheduler, {}, 0.035),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 0.06),
    (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}, 0.15),
    (FlowMapEulerDiscreteScheduler, {}, 0.035),
    (FlowMatchHeunDiscreteScheduler, {}, 0.002),
    (UniPCMultistepScheduler, FLOW, 0.005),
    (UniPCMultistepScheduler, {**FLOW, "solver_order": 3}, 0.005),
    (UniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}, 0.02),
    (UniPCMultistepScheduler, {**FLOW, "use_karras_sigmas": True}, 0.03),
    (UniPCMultistepScheduler, {**FLOW, "final_sigmas_type": "sigma_min"}, 0.005),
    (DPMSolverMultistepScheduler, FLOW, 0.007),
    (DPMSolverMultistepScheduler, {**FLOW, "solver_order": 3}, 0.005),
    (DPMSolverMultistepScheduler, {**FLOW, "solver_order": 1}, 0.035),
    (DPMSolverMultistepScheduler, {**FLOW, "final_sigmas_type": "sigma_min"}, 0.02),
    (DPMSolverSinglestepScheduler, FLOW, 0.015),
    (DEISMultistepScheduler, FLOW, 0.007),
    (DEISMultistepScheduler, {**FLOW, "solver_order": 3}, 0.007),
]
# Schedulers with new noise: only the distribution at the end is known. The error of its mean and standard deviation.
STOCHASTIC = [
    (LatteFlowScheduler, {"new_noise": 0.5}, 0.09),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, 0.25),
    (FlowMatchLCMScheduler, {}, 0.25),
    (DPMSolverMultistepScheduler, SDE, 0.06),
    (DPMSolverSinglestepScheduler, SDE, 0.12),
    (SASolverScheduler, FLOW, 0.06),
]
ADMITTED = {kind.__name__ for kind, _, _ in [*DETERMINISTIC, *STOCHASTIC]}


def velocity(sample: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - data | x] of x = (1 - sigma) * data + sigma * noise."""
    centred = sample - (1 - sigma) * MEAN
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return sigma / variance * centred - (MEAN + (1 - sigma) * STD**2 / variance * centred)


def run(scheduler, num_inference_steps: int, strength: float = 1.0, **steps) -> tuple[torch.Tensor, torch.Tensor]:
    """What the scheduler makes of noise, or of data with noise, and what is right; the model's time is the only time
    that the field sees."""
    generator = torch.Generator().manual_seed(0)
    noise = sample = torch.randn(1, 1, 50, 40, generator=generator)
    set_timesteps(scheduler, num_inference_steps, **steps)
    first = first_evaluation(scheduler, strength)
    scheduler.set_begin_index(first)
    if first > 0:
        sigma = float(scheduler.sigmas[first])
        sample = (1 - sigma) * MEAN + ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5 * noise
    evaluations = list(zip(model_timesteps(scheduler), scheduler.timesteps, strict=True))
    for index, (time, timestep) in list(enumerate(evaluations))[first:]:
        predicted = velocity(sample, float(time) / 1000)
        kwargs = generator_kwargs(scheduler, generator)
        sample = scheduler.step(predicted, timestep, sample, **kwargs, return_dict=False)[0]
        sample = finish_step(scheduler, index, predicted, sample)
    return sample, MEAN + STD * noise


def name(entry) -> str:
    return f"{entry[0].__name__}-{'-'.join(f'{k}={v}' for k, v in entry[1].items() if k not in FLOW)}"


@pytest.mark.parametrize(("kind", "config", "error"), DETERMINISTIC, ids=map(name, DETERMINISTIC))
def test_a_deterministic_scheduler_follows_the_flow(kind, config, error):
    found, expected = run(kind(**config), 20)
    assert (found - expected).abs().mean() < error
    finer, expected = run(kind(**config), 80)
    assert (finer - expected).abs().mean() < max(error / 2, 0.003)


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 0.05])
@pytest.mark.parametrize(("kind", "config", "error"), DETERMINISTIC, ids=map(name, DETERMINISTIC))
def test_a_deterministic_scheduler_follows_the_flow_from_a_later_step(kind, config, error, strength):
    found, expected = run(kind(**config), 20, strength)
    # Multistep solvers start with a step of first order, whose error a whole run makes where the flow is straight.
    assert (found - expected).abs().mean() < max(error, 0.007)


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 0.0125])
@pytest.mark.parametrize(("kind", "config", "error"), STOCHASTIC, ids=map(name, STOCHASTIC))
def test_a_stochastic_scheduler_ends_with_the_data_s_distribution_from_a_later_step(kind, config, error, strength):
    found, _ = run(kind(**config), 80, strength)
    assert abs(found.mean() - MEAN) + abs(found.std() - STD) < error


@pytest.mark.parametrize(("kind", "config", "error"), STOCHASTIC, ids=map(name, STOCHASTIC))
def test_a_stochastic_scheduler_ends_with_the_data_s_distribution(kind, config, error):
    found, deterministic = run(kind(**config), 80)
    assert abs(found.mean() - MEAN) + abs(found.std() - STD) < error
    # New noise was drawn.
    assert np.corrcoef(found.flatten(), deterministic.flatten())[0, 1] < 0.98


@pytest.mark.parametrize(("kind", "config", "error"), [entry for entry in DETERMINISTIC if entry[1] in ({}, FLOW)])
def test_the_scale_of_timesteps_does_not_matter(kind, config, error):
    found, expected = run(kind(**config, num_train_timesteps=500), 20)
    assert (found - expected).abs().mean() < error + 0.005


def test_equal_sigmas_are_equal_steps():
    """diffusers' Euler spaces its steps as ours, down to sigma 1 / n."""
    found, expected = (run(kind(), 7)[0] for kind in (FlowMatchEulerDiscreteScheduler, LatteFlowScheduler))
    assert torch.equal(found, expected)
    for kind, config in (
        (LatteFlowScheduler, {}),
        (FlowMatchEulerDiscreteScheduler, {}),
        (UniPCMultistepScheduler, FLOW),
    ):
        scheduler = kind(**config)
        set_timesteps(scheduler, 40, sigmas=[1.0, 0.7, 0.31])
        np.testing.assert_allclose(scheduler.sigmas.numpy(), [1.0, 0.7, 0.31, 0.0], atol=2e-6)


def test_the_model_gets_exact_times():
    scheduler = UniPCMultistepScheduler(**FLOW)
    set_timesteps(scheduler, 40, sigmas=[1.0, 0.7777, 0.3339])
    assert scheduler.timesteps.tolist() == [999, 777, 333]
    np.testing.assert_allclose(model_timesteps(scheduler).numpy(), [1000, 777.7, 333.9], atol=2e-3)
    euler = LatteFlowScheduler()
    euler.set_timesteps(7)
    assert torch.equal(model_timesteps(euler), euler.timesteps)


def test_timesteps_are_taken_as_they_are():
    for scheduler in (LatteFlowScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler()):
        set_timesteps(scheduler, 40, timesteps=[1000.0, 500.0, 20.0])
        np.testing.assert_allclose(model_timesteps(scheduler).numpy(), [1000, 500, 20], atol=1e-3)
    with pytest.raises(
        ValueError, match=r"timesteps of scheduler FlowMatchEuler\w+ do not belong to its sigmas.*shift"
    ):
        set_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), 40, timesteps=[1000.0, 500.0, 20.0])


def test_experts_by_sigma():
    boundaries = [1.0, 0.75, 0.5, 0.25, 0.0]
    for solver in ("euler", "heun"):
        scheduler = LatteFlowScheduler(solver=solver)
        scheduler.set_timesteps(8)
        assert experts_of_steps(scheduler, boundaries) == scheduler.experts
    # An evaluation that ends a step of diffusers' Heun on a boundary belongs to the expert above, as with ours.
    theirs, ours = FlowMatchHeunDiscreteScheduler(), LatteFlowScheduler(solver="heun")
    set_timesteps(theirs, 5)
    ours.set_timesteps(sigmas=[1.0, *theirs.sigmas[1:-1:2].tolist()])
    assert experts_of_steps(theirs, boundaries) == ours.experts
    unipc = UniPCMultistepScheduler(**FLOW)
    set_timesteps(unipc, 40, sigmas=[1.0, 0.75, 0.7499, 0.5001, 0.2])
    assert experts_of_steps(unipc, boundaries) == [0, 1, 1, 1, 3]


def test_a_configuration_of_ours_makes_a_scheduler_of_theirs():
    ours = LatteFlowScheduler(new_noise=[0.3, 0.6, 0.6, 0.0], expert_boundaries=[1.0, 0.8, 0.7, 0.5, 0.0])
    for kind, config, error in DETERMINISTIC[7:]:
        found, expected = run(kind.from_config(ours.config, **config), 20)
        assert (found - expected).abs().mean() < error


# What is refused.


def schedulers_of_diffusers() -> list:
    found = []
    for attribute in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, attribute)
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin:
            found.append(kind)
    return found


@pytest.mark.parametrize("kind", schedulers_of_diffusers(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("config", [{}, FLOW], ids=["default", "flow"])
def test_all_other_schedulers_are_refused(kind, config):
    try:
        scheduler = kind(**config)
    except Exception:
        pytest.skip("cannot be made in this way")
    is_flow = "FlowMa" in kind.__name__ or config
    if kind.__name__ in ADMITTED and is_flow:
        set_timesteps(scheduler, 10)
        assert 1 >= scheduler.sigmas[0] > 0.99
    else:
        with pytest.raises(ValueError, match=rf"scheduler {kind.__name__} .*Use a LatteFlowScheduler, or"):
            set_timesteps(scheduler, 10)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "timesteps of scheduler EulerDiscreteScheduler do not belong to its sigmas"),
        (UniPCMultistepScheduler(), "scheduler UniPCMultistepScheduler cannot be used: Passing `sigmas` is only"),
        (DPMSolverMultistepScheduler(), "scheduler DPMSolverMultistepScheduler has no flow-matching sigmas"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "does not lead to .* with prediction_type 'epsilon'"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="sample"), "with prediction_type 'sample'"),
        (UniPCMultistepScheduler(**FLOW, solver_type="bh1"), "does not lead to the image at which"),
        (UniPCMultistepScheduler(**FLOW, predict_x0=False), "cannot be used"),
        (UniPCMultistepScheduler(**FLOW, thresholding=True), "does not lead to the image"),
        (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "has no flow-matching sigmas"),
        (DPMSolverMultistepScheduler(**FLOW, thresholding=True), "does not lead to the image"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "cannot be used: `mu` must be passed"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has no flow-matching sigmas"),
        (FlowMatchLCMScheduler(scale_factors=[0.5] * 9, upscale_mode="nearest"), "cannot be used|does not lead"),
        (None, "scheduler NoneType cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message) as caught:
        set_timesteps(scheduler, 10)
    assert "Use a LatteFlowScheduler, or a flow-matching scheduler of diffusers" in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (LatteFlowScheduler(), {"sigmas": [1.0], "timesteps": [1000.0]}, "give only one of sigmas, timesteps and"),
        (LatteFlowScheduler(), {"sigmas": [1.0], "steps_per_expert": [1] * 4}, "got ['sigmas', 'steps_per_expert']."),
        (FlowMatchEulerDiscreteScheduler(), {"steps_per_expert": [1] * 4}, "scheduler FlowMatchEulerDiscreteScheduler"
            " takes no steps_per_expert; use a LatteFlowScheduler."),
        (DPMSolverMultistepScheduler(**FLOW), {"sigmas": [1.0]}, "DPMSolverMultistepScheduler takes no sigmas"),
        (FlowMatchHeunDiscreteScheduler(), {"sigmas": [1.0]}, "FlowMatchHeunDiscreteScheduler takes no sigmas"),
        (UniPCMultistepScheduler(**FLOW), {"timesteps": [1000.0]}, "UniPCMultistepScheduler takes no timesteps"),
        (DPMSolverMultistepScheduler(**FLOW), {"timesteps": [999, 5]}, "DPMSolverMultistepScheduler cannot be used"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [0.5, 1.0]}, "has no flow-matching sigmas"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": []}, "has no flow-matching sigmas"),
        (LatteFlowScheduler(), {"sigmas": [0.7, 0.3]}, "the steps of scheduler LatteFlowScheduler start at sigma 0.7"),
        (UniPCMultistepScheduler(**FLOW), {"sigmas": [0.7, 0.3]}, "start at sigma 0.7, but latents that are drawn"),
    ],
)  # fmt: skip
def test_steps_that_a_scheduler_cannot_take(scheduler, steps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        set_timesteps(scheduler, 40, **steps)


def test_steps_may_start_later_with_given_latents():
    scheduler = UniPCMultistepScheduler(**FLOW)
    set_timesteps(scheduler, 40, sigmas=[0.7, 0.3], starts_from_noise=False)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [0.7, 0.3, 0.0], atol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_the_first_evaluation_is_that_of_diffusers(order):
    """`get_timesteps` of diffusers' flow-matching image-to-image pipelines, without the errors of its rounding."""
    solver = "heun" if order == 2 else "euler"
    for num_steps in (1, 3, 4, 20, 40):
        pipe = FluxImg2ImgPipeline.__new__(FluxImg2ImgPipeline)
        pipe.scheduler = LatteFlowScheduler(solver=solver)
        pipe.scheduler.set_timesteps(num_steps)
        for strength in (1e-9, 0.05, 0.25, 0.31, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0):
            timesteps, _ = pipe.get_timesteps(num_steps, strength, "cpu")
            assert first_evaluation(pipe.scheduler, strength) == len(pipe.scheduler.timesteps) - len(timesteps)
        # diffusers takes 12 of 20 steps here: 20 * 0.55 is a little above 11.
        if num_steps == 20:
            assert first_evaluation(pipe.scheduler, 0.55) == 9 * order
