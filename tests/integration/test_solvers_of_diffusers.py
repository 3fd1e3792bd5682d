# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Solvers of diffusers in the pipeline: right images, the right expert at each sigma, and clear refusals."""

import re

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.tinyworld.oracle import shows


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROMPTS = ["a red circle", "a blue square left of a green cross", "a yellow triangle above a white circle"]


@pytest.fixture(scope="module")
def tiny() -> LatteFlowPipeline:
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 6, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe("a red circle", output_type="latent", **arguments).images


@pytest.mark.parametrize(
    ("scheduler", "num_inference_steps"),
    [
        (UniPCMultistepScheduler(**FLOW), 10),
        (DPMSolverMultistepScheduler(**FLOW), 10),
        (DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"), 20),
        (DEISMultistepScheduler(**FLOW), 10),
        (FlowMatchHeunDiscreteScheduler(), 5),
        (FlowMatchLCMScheduler(), 10),
    ],
    ids=lambda value: type(value).__name__,
)
def test_images_are_right(tiny, scheduler, num_inference_steps):
    tiny.scheduler = scheduler
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    images = tiny(PROMPTS, num_inference_steps=num_inference_steps, generator=generator).images
    assert sum(shows(*pair) for pair in zip(images, PROMPTS, strict=True)) >= 2


def test_solvers_agree_with_a_fine_trajectory(tiny):
    def latents(scheduler, num_inference_steps):
        tiny.scheduler = scheduler
        return generate(tiny, num_inference_steps=num_inference_steps)

    boundaries = tiny.model.config.expert_boundaries
    fine = latents(LatteFlowScheduler(solver="heun", expert_boundaries=boundaries), 40)
    euler = (latents(LatteFlowScheduler(expert_boundaries=boundaries), 20) - fine).abs().mean()
    for scheduler in (UniPCMultistepScheduler(**FLOW), DPMSolverMultistepScheduler(**FLOW)):
        assert (latents(scheduler, 20) - fine).abs().mean() < euler


@pytest.mark.parametrize("kind", [LatteFlowScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_model_s_time_does_not_depend_on_the_scheduler_s(pipe, model, kind):
    expected, times = generate(pipe), []
    boundaries = {"expert_boundaries": model.config.expert_boundaries} if kind is LatteFlowScheduler else {}
    pipe.scheduler = kind(num_train_timesteps=500, **boundaries)
    found = generate(pipe, callback_on_step_end=lambda pipe, step, timestep, _: times.append(float(timestep)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Callbacks get the scheduler's timesteps.
    assert times[:2] == pytest.approx([500.0, 500 * 5 / 6])


def test_the_expert_and_the_time_are_those_of_sigma(pipe, model, monkeypatch):
    calls = []
    predict = model.predict_velocity

    def recorded(latents, timestep, context, expert, **arguments):
        calls.append((round(float(timestep), 2), expert))
        return predict(latents, timestep, context, expert=expert, **arguments)

    monkeypatch.setattr(model, "predict_velocity", recorded, raising=False)
    pipe.scheduler = UniPCMultistepScheduler(**FLOW)
    generate(pipe, sigmas=[1.0, 0.5004, 0.4996, 0.25])
    assert calls == [(1000, 0), (500.4, 0), (499.6, 1), (250, 1)]
    calls.clear()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    generate(pipe, num_inference_steps=3)
    assert calls == [(1000, 0), (500.5, 0), (500.5, 0), (1.0, 1), (1.0, 1)]


def test_sigmas_and_timesteps_in_the_call(pipe):
    expected = generate(pipe, num_inference_steps=4)
    for steps in ({"sigmas": [1.0, 0.75, 0.5, 0.25]}, {"timesteps": [1000, 750, 500, 250]}):
        assert torch.equal(generate(pipe, **steps), expected)
        assert pipe.num_timesteps == 4
    other = generate(pipe, sigmas=[1.0, 0.9, 0.5, 0.25])
    assert not torch.equal(other, expected)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(generate(pipe, sigmas=[1.0, 0.9, 0.5, 0.25]), other)
    # The rest of a run, from its latents.
    seen = []
    generate(pipe, num_inference_steps=4, callback_on_step_end=lambda *a: seen.append(a[3]["latents"]))
    torch.testing.assert_close(generate(pipe, sigmas=[0.5, 0.25], latents=seen[1]), seen[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (EulerDiscreteScheduler(), {}, "timesteps of scheduler EulerDiscreteScheduler do not belong to its sigmas"),
        (UniPCMultistepScheduler(), {}, "scheduler UniPCMultistepScheduler cannot be used"),
        (None, {"sigmas": [0.5]}, "start at sigma 0.5, but latents that are drawn are pure noise"),
        (None, {"sigmas": [1.0], "timesteps": [1000]}, "give only one of sigmas, timesteps and steps_per_expert"),
        (None, {"sigmas": [0.5, 1.0]}, "sigmas must fall strictly inside (0, 1], got [0.5, 1.0]."),
        (UniPCMultistepScheduler(**FLOW), {"steps_per_expert": [1, 1]}, "takes no steps_per_expert; use a LatteFlow"),
    ],
)
def test_what_cannot_be_right_is_refused_before_any_heavy_work(
    pipe, model, scheduler, arguments, message, monkeypatch
):
    monkeypatch.setattr(model, "encode_context", None, raising=False)
    pipe.scheduler = pipe.scheduler if scheduler is None else scheduler
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(pipe, **arguments)
