# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the page says about the experts, against the same things computed directly."""

import functools
import time

import pytest
import torch

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.app.trace import Trace, expert_reports
from tests.helpers import CLOSE, noise


STEPS, SCALE = 7, 3.0


def record(pipe, **call):
    trace = Trace()
    with trace.record(pipe) as recording:
        images = pipe("a red circle", callback_on_step_end=recording.step, output_type="latent", **call).images
    return trace, images


@pytest.fixture
def latents(model):
    return noise(1, model.config.latent_channels, 8, 8, seed=3)


@torch.no_grad()
def velocities(pipe, trace):
    """The guided velocity at each of the recorded states, one evaluation for each prompt."""
    context, negative = pipe.encode_prompt("a red circle")
    for evaluation in trace.evaluations:
        t = 1000.0 * evaluation.sigma
        positive = pipe.model.predict_velocity(evaluation.latents, t, context)
        other = pipe.model.predict_velocity(evaluation.latents, t, negative)
        yield other + SCALE * (positive - other)


@pytest.mark.parametrize("new_noise", [0.0, 0.5])
def test_estimates_are_those_of_the_velocity(pipe, latents, new_noise):
    """With new noise too, where the estimate cannot be seen from the latents before and after a step."""
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries, new_noise=new_noise)
    generator = torch.Generator().manual_seed(1)
    trace, images = record(pipe, latents=latents, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator)
    assert torch.equal(trace.evaluations[0].latents, latents) and torch.equal(trace.final, images)
    assert [round(e.sigma, 5) for e in trace.evaluations] == [round(1 - i / STEPS, 5) for i in range(STEPS)]
    assert all(evaluation.is_guided for evaluation in trace.evaluations)
    for evaluation, velocity in zip(trace.evaluations, velocities(pipe, trace)):
        expected = evaluation.latents - evaluation.sigma * velocity
        torch.testing.assert_close(evaluation.clean, expected, **CLOSE)
    # The last step ends at the data that it estimates.
    torch.testing.assert_close(trace.evaluations[-1].clean, images, **CLOSE)


def test_recording_changes_nothing(pipe, latents):
    call = {"latents": latents, "num_inference_steps": 4, "guidance_scale": SCALE}
    plain = pipe("a red circle", output_type="latent", **call).images
    assert torch.equal(record(pipe, **call)[1], plain)
    assert not pipe.model.tower._forward_hooks and not pipe.model.tower._forward_pre_hooks


def test_reports_of_the_experts(pipe, latents):
    model = pipe.model
    trace, images = record(pipe, latents=latents, steps_per_expert=[3, 2], guidance_scale=[SCALE, 1.0])
    first, second = expert_reports(model, trace)
    assert (first.expert, second.expert) == (0, 1)
    assert (len(first.sigmas), len(second.sigmas)) == (3, 2)
    assert (first.high, first.low, second.low) == tuple(model.config.expert_boundaries)
    assert (first.is_guided, second.is_guided) == (True, False)
    assert [*first.layers, *second.layers] == list(range(len(model.tower.layers)))

    states = [evaluation.latents for evaluation in trace.evaluations]
    clean = [evaluation.clean for evaluation in trace.evaluations]

    def distance(a, b):
        return float(torch.sqrt(torch.mean((a - b) ** 2)))

    assert first.moved == pytest.approx(distance(states[3], states[0]))
    assert second.moved == pytest.approx(distance(images, states[3]))
    assert first.changed == pytest.approx(distance(clean[2], clean[0]))
    assert second.changed == pytest.approx(distance(clean[4], clean[2]))
    assert torch.equal(first.estimate, clean[2]) and torch.equal(second.estimate, clean[4])


@torch.no_grad()
def test_gates_are_those_that_the_layers_use(pipe, latents):
    """Read from what the attention adds while the pipeline runs."""
    model, used = pipe.model, {}

    def before(layer, arguments, named, index):
        previous = arguments[2] if len(arguments) > 2 else named.get("previous_scores")
        layer.self_attn.previous = previous

    def attention(module, arguments, named, index):
        residual, previous = named["residual"], module.previous
        if residual is None:
            return used.setdefault(index, []).append(None)
        gate = (residual * previous).sum((2, 3)) / previous.square().sum((2, 3))
        torch.testing.assert_close(residual, gate[:, :, None, None] * previous, **CLOSE)
        used.setdefault(index, []).append(gate)

    handles = []
    for index, layer in enumerate(model.tower.layers):
        for module, hook in ((layer, before), (layer.self_attn, attention)):
            hook = functools.partial(hook, index=index)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        trace, _ = record(pipe, latents=latents, num_inference_steps=6, guidance_scale=1.0)
    finally:
        for handle in handles:
            handle.remove()
    for report in expert_reports(model, trace):
        gated = [index for index in report.layers if used[index][0] is not None]
        assert report.gate_layers == gated == list(report.layers)[1:]
        expected = torch.stack([torch.cat(used[index]) for index in gated], dim=1)
        torch.testing.assert_close(report.gates, expected, **CLOSE)
        assert report.gates.abs().max() > 0.01


def test_without_residual_attention_there_are_no_gates(make_model, processor, vae, latents):
    model = make_model(residual_attention=None)
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    pipe = LatteFlowPipeline(model, processor, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    trace, _ = record(pipe, latents=latents, num_inference_steps=2, guidance_scale=1.0)
    assert all(report.gates is None and report.gate_layers == [] for report in expert_reports(model, trace))


def test_times_add_up(pipe, latents):
    start = time.perf_counter()
    trace, _ = record(pipe, latents=latents, num_inference_steps=5)
    total = time.perf_counter() - start
    parts = [trace.encode_seconds, trace.decode_seconds, *(e.seconds for e in trace.evaluations)]
    assert min(parts) > 0 and 0.5 * total < sum(parts) <= total


def test_an_empty_trace_is_refused(model):
    with pytest.raises(ValueError, match="no step"):
        expert_reports(model, Trace())
