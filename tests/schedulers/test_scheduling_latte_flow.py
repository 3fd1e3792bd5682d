# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""diffusers' `FlowMatchEulerDiscreteScheduler` is the oracle: for equal sigmas all numbers are equal, bit for bit."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from latte_flow_hf import LatteFlowConfig, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.modeling.flow_matching import data_from_velocity, interpolate
from latte_flow_hf.schedulers.scheduling_latte_flow import LatteFlowSchedulerOutput


CUSTOM = [[1.0], [1.0, 0.5], [0.93, 0.71, 0.4, 0.05], np.linspace(1.0, 1 / 40, 40).tolist()]


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def even_sigmas(num_inference_steps: int) -> list[float]:
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()


def both(shift: float = 1.0, num_train_timesteps: int = 1000):
    arguments = {"shift": shift, "num_train_timesteps": num_train_timesteps}
    return LatteFlowScheduler(**arguments), FlowMatchEulerDiscreteScheduler(**arguments)


def assert_same_steps(ours, stock):
    for name in ("sigmas", "timesteps"):
        found, expected = getattr(ours, name), getattr(stock, name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert ours.num_inference_steps == len(ours.timesteps)


def trajectory(scheduler, dtype) -> list[torch.Tensor]:
    """All samples of one run; the velocity depends on the sample, so that errors would add up."""
    sample, samples = noise(2, 4, 3, 3, dtype=dtype), []
    for timestep in scheduler.timesteps:
        velocity = torch.sin(sample * 3) + timestep.to(dtype) / 1000
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        samples.append(sample)
    return samples


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("num_train_timesteps", [1000, 250])
def test_a_new_scheduler_equals_diffusers(shift, num_train_timesteps):
    ours, stock = both(shift, num_train_timesteps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    # Ours ends at zero before `set_timesteps`, too.
    assert torch.equal(ours.sigmas[:-1], stock.sigmas) and ours.sigmas[-1] == 0
    assert len(ours) == len(stock) == num_train_timesteps


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 40, 1000])
def test_steps_by_number_are_evenly_spaced_from_1_to_1_over_n(num_inference_steps, shift):
    """The sigmas that diffusers' flow-matching pipelines give to its scheduler."""
    ours, stock = both(shift)
    ours.set_timesteps(num_inference_steps)
    stock.set_timesteps(sigmas=even_sigmas(num_inference_steps))
    assert_same_steps(ours, stock)


def test_ten_steps_of_the_embedded_checkpoint():
    config = LatteFlowConfig.from_pretrained(tiny_checkpoint(), subfolder="model")
    scheduler = LatteFlowScheduler.from_pretrained(tiny_checkpoint(), subfolder="scheduler")
    scheduler.set_timesteps(10)
    assert [scheduler.experts.count(k) for k in range(config.num_experts)] == [2, 1, 2, 5]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("sigmas", CUSTOM, ids=len)
def test_steps_by_sigmas_equal_diffusers(sigmas, shift):
    ours, stock = both(shift)
    ours.set_timesteps(sigmas=sigmas)
    stock.set_timesteps(sigmas=sigmas)
    assert_same_steps(ours, stock)
    ours.set_timesteps(len(sigmas), sigmas=sigmas)
    assert_same_steps(ours, stock)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_by_timesteps_are_not_shifted(shift):
    scheduler, timesteps = LatteFlowScheduler(shift=shift), [1000, 640.5, 250, 3]
    for arguments in ({"timesteps": timesteps}, {"num_inference_steps": 4, "timesteps": np.array(timesteps)}):
        scheduler.set_timesteps(**arguments)
        assert scheduler.timesteps.tolist() == timesteps and scheduler.experts == [0, 1, 3, 3]
        np.testing.assert_allclose(scheduler.sigmas.numpy(), [1.0, 0.6405, 0.25, 0.003, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_inference_steps", [1, 5, 40])
def test_a_whole_run_equals_diffusers_bit_for_bit(num_inference_steps, shift, dtype):
    ours, stock = both(shift)
    ours.set_timesteps(num_inference_steps)
    stock.set_timesteps(sigmas=even_sigmas(num_inference_steps))
    for found, expected in zip(trajectory(ours, dtype), trajectory(stock, dtype), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert ours.step_index == stock.step_index == num_inference_steps


@pytest.mark.parametrize("sigmas", CUSTOM, ids=len)
def test_a_run_over_given_sigmas_equals_diffusers_bit_for_bit(sigmas):
    ours, stock = both(1.7)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=sigmas)
    for found, expected in zip(trajectory(ours, torch.float32), trajectory(stock, torch.float32), strict=True):
        assert torch.equal(found, expected)


def test_a_later_start_equals_diffusers():
    ours, stock = both()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=even_sigmas(8))
        scheduler.set_begin_index(5)
    assert ours.begin_index == 5
    sample, velocity = noise(1, 4, 2, 2), noise(1, 4, 2, 2, seed=1)
    found = ours.step(velocity, ours.timesteps[5], sample).prev_sample
    assert torch.equal(found, stock.step(velocity, stock.timesteps[5], sample).prev_sample)
    # Without it, the first step finds its index by the timestep.
    other = LatteFlowScheduler()
    other.set_timesteps(8)
    assert torch.equal(other.step(velocity, other.timesteps[5], sample).prev_sample, found)
    assert other.step_index == 6


def test_steps_along_the_true_velocity_end_at_the_data():
    # On a straight path Euler is exact, whatever the steps.
    data, start = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    scheduler = LatteFlowScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.33, 0.02])
    sample = start
    for sigma, timestep in zip(scheduler.sigmas[1:], scheduler.timesteps):
        sample = scheduler.step(start - data, timestep, sample).prev_sample
        torch.testing.assert_close(sample, interpolate(data, start, float(sigma)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample, data, rtol=1e-5, atol=1e-5)


def test_step_gives_a_record_or_a_tuple():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(2)
    record = scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2))
    scheduler.set_timesteps(2)
    plain = scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2), return_dict=False)
    assert isinstance(record, LatteFlowSchedulerOutput) and isinstance(plain, tuple)
    assert torch.equal(record.prev_sample, plain[0])


def test_set_timesteps_starts_anew():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(2)
    assert scheduler.step_index is None
    trajectory(scheduler, torch.float32)
    assert scheduler.step_index == 2
    scheduler.set_timesteps(3)
    assert scheduler.step_index is None and len(trajectory(scheduler, torch.float32)) == 3


def test_timesteps_go_to_the_device_and_sigmas_stay():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta" and scheduler.sigmas.device.type == "cpu"
    assert scheduler.experts == [0, 1, 2, 3]


# Experts.


@pytest.mark.parametrize("boundaries", [[1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.9, 0.3, 0.0]])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_experts_own_the_sigma_at_which_a_step_starts(boundaries, shift):
    scheduler = LatteFlowScheduler(expert_boundaries=boundaries, shift=shift)
    scheduler.set_timesteps(23)
    expected = [max(k for k, high in enumerate(boundaries[:-1]) if s <= high) for s in scheduler.sigmas[:-1].tolist()]
    assert scheduler.experts == expected
    assert scheduler.num_experts == len(boundaries) - 1


def test_step_that_starts_on_a_boundary_belongs_to_the_expert_below():
    scheduler = LatteFlowScheduler(expert_boundaries=[1.0, 0.7, 0.3, 0.0])
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.5, 0.3, 0.1])
    assert scheduler.experts == [0, 1, 1, 2, 2]


def test_uniform_intervals_get_even_steps():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 40, 40).tolist())
    assert scheduler.experts == [k for k in range(4) for _ in range(10)]


@pytest.mark.parametrize(
    ("boundaries", "steps"),
    [
        ([1.0, 0.5, 0.0], [3, 5]),
        ([1.0, 0.9, 0.2, 0.0], [1, 7, 2]),
        ([1.0, 0.9, 0.2, 0.0], [2, 0, 4]),
        ([1.0, 0.9, 0.2, 0.0], [2, 0, 0]),
        ([1.0, 0.9, 0.2, 0.0], (np.int64(1), 1, 1)),
    ],
)
def test_steps_per_expert(boundaries, steps):
    # Not shifted: a shift would move steps out of the intervals of their experts.
    scheduler = LatteFlowScheduler(expert_boundaries=boundaries, shift=3.0)
    scheduler.set_timesteps(steps_per_expert=steps)
    assert [scheduler.experts.count(k) for k in range(len(steps))] == list(steps)
    expected = [
        high - j * (high - low) / n for high, low, n in zip(boundaries, boundaries[1:], steps) for j in range(n)
    ]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*expected, 0.0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * np.array(expected), rtol=0, atol=1e-3)
    assert scheduler.sigmas.dtype == torch.float32 and scheduler.num_inference_steps == sum(steps)
    assert len(trajectory(scheduler, torch.float32)) == sum(steps)


# The rest of diffusers' contract.


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_add_noise_is_the_path(shift):
    scheduler = LatteFlowScheduler(shift=shift)
    data, start = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    timesteps = torch.tensor([1000.0, 250.0, 0.0])
    noisy = scheduler.add_noise(data, start, timesteps)
    assert torch.equal(noisy[0], start[0]) and torch.equal(noisy[2], data[2])
    torch.testing.assert_close(noisy[1], 0.75 * data[1] + 0.25 * start[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(data_from_velocity(noisy, start - data, timesteps / 1000), data, rtol=1e-5, atol=1e-6)


def test_add_noise_equals_diffusers_scale_noise():
    ours, stock = both()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=even_sigmas(10))
    data, start, timesteps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), ours.timesteps[[0, 4, 9]]
    expected = stock.scale_noise(data, timesteps, start)
    torch.testing.assert_close(ours.add_noise(data, start, timesteps), expected, rtol=1e-6, atol=1e-6)


def test_input_is_not_scaled():
    scheduler, sample = LatteFlowScheduler(), noise(1, 2)
    assert scheduler.scale_model_input(sample, 3.0) is sample
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


@pytest.mark.parametrize("boundaries", [None, [1.0, 0.9, 0.0]])
def test_config_round_trip(tmp_path, boundaries):
    scheduler = LatteFlowScheduler(num_train_timesteps=500, shift=1.5, expert_boundaries=boundaries)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == "LatteFlowScheduler"
    # None is written as what it stands for: the pipeline compares numbers.
    assert written["expert_boundaries"] == (boundaries or [1.0, 0.75, 0.5, 0.25, 0.0])
    for again in (LatteFlowScheduler.from_pretrained(tmp_path), LatteFlowScheduler.from_config(scheduler.config)):
        assert type(again) is LatteFlowScheduler
        # diffusers' own notes on the configuration (what was left at its default) begin with an underscore.
        found, expected = ({k: v for k, v in each.config.items() if k[0] != "_"} for each in (again, scheduler))
        assert found == expected
        for each in (again, scheduler):
            each.set_timesteps(9)
        assert_same_steps(again, scheduler)
        assert again.experts == scheduler.experts


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a positive whole number, got 0."),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps must be a positive whole number, got 1000.0."),
        ({"shift": 0.0}, "shift must be a positive number, got 0.0."),
        ({"shift": -1.5}, "shift must be a positive number, got -1.5."),
        ({"shift": float("nan")}, "shift must be a positive number, got nan."),
        ({"expert_boundaries": [1.0, 0.4, 0.6, 0.0]}, "got [1.0, 0.4, 0.6, 0.0]"),
        ({"expert_boundaries": [0.0, 0.5, 1.0]}, "got [0.0, 0.5, 1.0]; for example [1.0, 0.5, 0.0]"),
        ({"expert_boundaries": [1.0]}, "expert_boundaries must be"),
        ({"expert_boundaries": []}, "expert_boundaries must be"),
    ],
)
def test_a_scheduler_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LatteFlowScheduler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of num_inference_steps, sigmas, timesteps and steps_per_expert"),
        ({"num_inference_steps": 4, "steps_per_expert": [1, 1, 1, 1]}, "give one of num_inference_steps"),
        ({"sigmas": [1.0], "steps_per_expert": [1, 1, 1, 1]}, "give one of num_inference_steps"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, "give one of num_inference_steps"),
        ({"timesteps": [1000.0], "steps_per_expert": [1, 1, 1, 1]}, "give one of num_inference_steps"),
        ({"timesteps": [1001.0, 500.0]}, "timesteps must fall strictly inside (0, 1000], got [1001.0, 500.0]."),
        ({"timesteps": [500, 1000]}, "timesteps must fall strictly inside (0, 1000], got [500, 1000]."),
        ({"timesteps": []}, "timesteps must fall strictly inside (0, 1000], got []."),
        ({"num_inference_steps": 1, "timesteps": [900, 1]}, "timesteps must be 1 (num_inference_steps), got 2."),
        ({"sigmas": 0.5}, "sigmas must fall strictly inside (0, 1], got 0.5."),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive whole number, got 0."),
        ({"num_inference_steps": -3}, "num_inference_steps must be a positive whole number, got -3."),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a positive whole number, got 2.5."),
        ({"num_inference_steps": True}, "num_inference_steps must be a positive whole number, got True."),
        ({"num_inference_steps": "4"}, "num_inference_steps must be a positive whole number, got '4'."),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "sigmas must be 3 (num_inference_steps), got 2."),
        ({"sigmas": []}, "sigmas must fall strictly inside (0, 1], got []."),
        ({"sigmas": [1.1, 0.5]}, "sigmas must fall strictly inside (0, 1], got [1.1, 0.5]."),
        ({"sigmas": [1.0, 0.0]}, "sigmas must fall strictly inside (0, 1], got [1.0, 0.0]."),
        ({"sigmas": [0.5, 0.5]}, "sigmas must fall strictly inside (0, 1], got [0.5, 0.5]."),
        ({"sigmas": [1.0, float("nan")]}, "sigmas must fall strictly inside (0, 1], got [1.0, nan]."),
        ({"steps_per_expert": [1, 1]}, "steps_per_expert must be 4 whole numbers"),
        ({"steps_per_expert": [0, 1, 1, 1]}, "the first at least 1, got [0, 1, 1, 1]."),
        ({"steps_per_expert": [1, -1, 1, 1]}, "got [1, -1, 1, 1]."),
        ({"steps_per_expert": [1, 1.5, 1, 1]}, "got [1, 1.5, 1, 1]."),
        ({"steps_per_expert": []}, "steps_per_expert must be 4 whole numbers, one for each expert, the first at"),
    ],
)
def test_set_timesteps_refuses_and_changes_nothing(arguments, message):
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(5)
    before = scheduler.sigmas.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.sigmas, before) and scheduler.num_inference_steps == 5


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (0, "timestep must be one of `scheduler.timesteps`, not an index, got 0."),
        (torch.tensor(1), "timestep must be one of `scheduler.timesteps`, not an index, got 1."),
        (123.4, "timestep must be one of `scheduler.timesteps`, got 123.4"),
    ],
)
def test_step_refuses_other_timesteps(timestep, message):
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=re.escape(message)):
        scheduler.step(noise(1, 2), timestep, noise(1, 2))
    assert scheduler.step_index is None


def test_step_before_set_timesteps_is_refused():
    scheduler = LatteFlowScheduler()
    with pytest.raises(ValueError, match="call set_timesteps before the first step"):
        scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2))


def test_step_after_the_last_is_refused():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(2)
    trajectory(scheduler, torch.float32)
    with pytest.raises(ValueError, match="all 2 steps are done; call set_timesteps first"):
        scheduler.step(noise(1, 2), scheduler.timesteps[-1], noise(1, 2))
