# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Heun's solver against diffusers' one and a closed form, the order of errors, and new noise."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from latte_flow_hf import LatteFlowScheduler


def run(scheduler, velocity, sample):
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, timestep / 1000), timestep, sample, return_dict=False)[0]
    return sample


def curved(sample, sigma):
    """dx/dsigma = -2 sigma x, hence x(0) = x(1) * e."""
    return -2.0 * sigma * sample


@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_equals_diffusers(num_inference_steps, shift):
    ours, stock = LatteFlowScheduler(solver="heun"), FlowMatchHeunDiscreteScheduler(shift=shift)
    stock.set_timesteps(num_inference_steps)
    # It takes no sigmas; its own, shifted and without the repeated ones, are given to ours.
    ours.set_timesteps(sigmas=[stock.sigmas[0].item(), *stock.sigmas[1:-1:2].tolist()])
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.sigmas, stock.sigmas)
    assert len(ours.timesteps) == 2 * num_inference_steps - 1 and ours.num_inference_steps == num_inference_steps
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def velocity(sample, sigma):
        return torch.sin(3 * sample) + sigma

    # diffusers takes the velocity from (x - (x - sigma v)) / sigma, which costs digits near sigma 0.
    torch.testing.assert_close(run(ours, velocity, start), run(stock, velocity, start), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_solver_s_order(solver, order):
    start, errors = torch.ones(1, dtype=torch.float64), []
    for steps in (20, 40):
        scheduler = LatteFlowScheduler(solver=solver)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        # The scheduler's own arithmetic is float32, far below these errors.
        errors.append(abs(run(scheduler, curved, start).item() - np.e))
    assert 2 ** (order - 0.3) < errors[0] / errors[1] < 2 ** (order + 0.6)


def test_a_run_starts_anew_after_set_timesteps():
    scheduler = LatteFlowScheduler(solver="heun")
    start, found = torch.ones(1), []
    for _ in range(2):
        scheduler.set_timesteps(6)
        scheduler.step(start, scheduler.timesteps[0], start)
        scheduler.set_timesteps(6)
        found.append(run(scheduler, curved, start))
    assert torch.equal(*found)


def test_a_corrector_belongs_to_the_interval_of_its_own_step():
    scheduler = LatteFlowScheduler(solver="heun", expert_boundaries=[1.0, 0.5, 0.25, 0.0])
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.3, 0.2])
    # Evaluations at 1 | 0.8 0.8 | 0.5 0.5 | 0.3 0.3 | 0.2 0.2: the corrector at 0.5 ends a step of expert 0, the one
    # at 0.2 a step that crossed into expert 2.
    assert scheduler.experts == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    euler = LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.25, 0.0])
    euler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.3, 0.2])
    assert euler.experts == [0, 0, 1, 1, 2]


def test_heun_can_start_at_a_later_step():
    scheduler = LatteFlowScheduler(solver="heun")
    scheduler.set_timesteps(4)
    scheduler.step(torch.ones(1), scheduler.timesteps[3], torch.ones(1))
    assert scheduler.step_index == 5  # 4 starts the step, 3 would have been the corrector of the one before


@pytest.mark.parametrize("num_inference_steps", [1, 2, 20])
def test_stochastic_sampling_equals_diffusers_bit_for_bit(num_inference_steps):
    found = []
    for kind in (LatteFlowScheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = kind(stochastic_sampling=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
        torch.manual_seed(0)
        found.append(run(scheduler, lambda sample, sigma: torch.sin(3 * sample) + sigma, torch.ones(2, 3)))
    assert torch.equal(*found) and found[0].isfinite().all()


def test_stochastic_noise_comes_from_the_generator_of_each_sample():
    def step(*seeds):
        scheduler = LatteFlowScheduler(new_noise=1.0)
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = torch.zeros(len(seeds), 2, 3, 3)
        return scheduler.step(start, scheduler.timesteps[1], start, generators).prev_sample

    both = step(0, 1)
    assert torch.equal(both, torch.cat([step(0), step(1)])) and not torch.equal(both[0], both[1])


def test_solvers_are_kept_and_checked(tmp_path):
    LatteFlowScheduler(solver="heun").save_pretrained(tmp_path)
    assert LatteFlowScheduler.from_pretrained(tmp_path).config.solver == "heun"
    with pytest.raises(
        ValueError, match=r"solver must be one of \['euler', 'heun'\], got 'multistep'. For others, .*UniPC"
    ):
        LatteFlowScheduler(solver="multistep")


@pytest.mark.parametrize("shares", [-0.1, 1.5, [0.5], [0.5, 0.5], [0.5, 0.5, 0.5, 2.0], [], "0.5", [True, 0, 0, 0]])
@pytest.mark.parametrize("key", ["new_noise", "stochastic_sampling"])
def test_a_share_of_new_noise_that_cannot_be(key, shares):
    with pytest.raises(ValueError, match=r"new_noise must be from 0 to 1, or .* each of 4 experts, got"):
        LatteFlowScheduler(**{key: shares})


SHARES = [0.3, 0.6, 0.6, 0.0]


@pytest.mark.parametrize(
    ("arguments", "new_noise", "stochastic_sampling"),
    [
        ({}, 0.0, None),
        ({"new_noise": SHARES}, SHARES, None),
        ({"new_noise": 0.25}, 0.25, None),
        ({"new_noise": 1}, 1.0, True),
        ({"new_noise": [1.0] * 4}, [1.0] * 4, True),
        # diffusers' scheduler.
        ({"stochastic_sampling": True}, 1.0, True),
        ({"stochastic_sampling": False}, 0.0, None),
        ({"stochastic_sampling": True, "new_noise": 1.0}, 1.0, True),
        # Configurations of earlier versions.
        ({"stochastic_sampling": SHARES}, SHARES, None),
        ({"stochastic_sampling": 0.25}, 0.25, None),
    ],
)
def test_diffusers_scheduler_never_takes_a_share_for_true(tmp_path, arguments, new_noise, stochastic_sampling):
    LatteFlowScheduler(**arguments).save_pretrained(tmp_path)
    ours = LatteFlowScheduler.from_pretrained(tmp_path)
    assert (ours.config.new_noise, ours.config.stochastic_sampling) == (new_noise, stochastic_sampling)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert theirs.config.stochastic_sampling is stochastic_sampling
    back = LatteFlowScheduler.from_config(theirs.config)
    assert (back.config.new_noise, back.config.stochastic_sampling) == (new_noise, stochastic_sampling)
    # One evaluation: with the same new noise, and with none.
    other = LatteFlowScheduler(new_noise=1.0 if stochastic_sampling else 0.0)
    found = []
    for scheduler in (theirs, other):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        torch.manual_seed(0)
        found.append(run(scheduler, curved, torch.ones(2, 3)))
    assert torch.equal(*found)


@pytest.mark.parametrize("arguments", [{"stochastic_sampling": True}, {"stochastic_sampling": False}])
def test_new_noise_and_stochastic_sampling_must_agree(arguments):
    with pytest.raises(ValueError, match=r"stochastic_sampling=\w+ is new_noise=.*, but new_noise is \[0.3"):
        LatteFlowScheduler.from_config(LatteFlowScheduler(new_noise=SHARES).config, **arguments)
    assert (
        LatteFlowScheduler.from_config(LatteFlowScheduler(new_noise=SHARES).config, new_noise=0.0).config.new_noise
        == 0
    )


def test_shares_of_new_noise_go_by_expert_and_keep_the_noise_s_variance(tmp_path):
    shares = [0.5, 0.0, 0.1, 1.0]
    LatteFlowScheduler(new_noise=shares).save_pretrained(tmp_path)
    scheduler, plain = LatteFlowScheduler.from_pretrained(tmp_path), LatteFlowScheduler()
    # With the true velocity every step stays on the path, its noise standard normal.
    data, start = torch.full((1, 200, 200), 3.0), torch.randn(1, 200, 200, generator=torch.Generator().manual_seed(0))
    for kind in (scheduler, plain):
        kind.set_timesteps(8)
    drawn = torch.Generator().manual_seed(1)
    noise = start
    for index, timestep in enumerate(scheduler.timesteps[:-1]):
        sigma = scheduler.sigmas[index]
        sample = (1 - sigma) * data + sigma * noise
        stepped = scheduler.step(noise - data, timestep, sample, drawn).prev_sample
        share = shares[scheduler.experts[index]]
        if share == 0.0:
            assert torch.equal(stepped, plain.step(noise - data, timestep, sample).prev_sample)
        else:
            plain.step(noise - data, timestep, sample)
        following = scheduler.sigmas[index + 1]
        after = (stepped - (1 - following) * data) / following
        assert after.std().item() == pytest.approx(1.0, abs=0.02)
        assert (after * noise).mean().item() == pytest.approx((1 - share) ** 0.5, abs=0.02)
        noise = after


def test_heun_draws_nothing():
    found = []
    for share in (0.0, 0.5):
        scheduler = LatteFlowScheduler(solver="heun", new_noise=share)
        scheduler.set_timesteps(5)
        found.append(run(scheduler, curved, torch.ones(1)))
    assert torch.equal(*found)
