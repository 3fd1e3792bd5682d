# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What diffusers asks of every scheduler (`SchedulerCommonTest`), and tests/schedulers does not."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.modeling.flow_matching import interpolate


CONFIGS = [
    {},
    {"shift": 3.0},
    {"num_train_timesteps": 250},
    {"shift": 0.5, "num_train_timesteps": 2000, "expert_boundaries": [1.0, 0.9, 0.0]},
]


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def public(config) -> dict:
    """A configuration without the words that tell where it is from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def run(scheduler) -> torch.Tensor:
    """What is left of noise after all steps; the velocity depends on the sample, so that errors would add up."""
    sample = noise(1, 4, 3, 3)
    for timestep in scheduler.timesteps:
        velocity = torch.sin(3 * sample) + timestep / 1000
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
    return sample


# Configuration.


@pytest.mark.parametrize("config", CONFIGS)
def test_every_way_of_copying_gives_the_same_run(tmp_path, config):
    scheduler = LatteFlowScheduler(**config)
    scheduler.save_config(tmp_path)
    copies = [
        LatteFlowScheduler.from_config(scheduler.config),
        LatteFlowScheduler.from_pretrained(tmp_path),
        LatteFlowScheduler.from_config(LatteFlowScheduler.load_config(tmp_path)),
        pickle.loads(pickle.dumps(scheduler)),
        copy.deepcopy(scheduler),
    ]
    scheduler.set_timesteps(7)
    expected = run(scheduler)
    for again in copies:
        assert public(again.config) == public(scheduler.config)
        again.set_timesteps(7)
        assert torch.equal(run(again), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_running_scheduler_is_copied_where_it_stands(clone):
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    sample = scheduler.step(noise(1, 2), first, noise(1, 2, seed=1)).prev_sample
    again = clone(scheduler)
    assert again.step_index == 1
    found = again.step(sample, second, sample).prev_sample
    assert again.step_index == 2 and scheduler.step_index == 1
    assert torch.equal(found, scheduler.step(sample, second, sample).prev_sample)


def test_arguments_go_over_the_saved_configuration(tmp_path):
    LatteFlowScheduler(shift=3.0).save_pretrained(tmp_path)
    assert LatteFlowScheduler.from_pretrained(tmp_path, shift=2.0).config.shift == 2.0
    assert LatteFlowScheduler.from_config(LatteFlowScheduler(shift=3.0).config, shift=2.0).config.shift == 2.0


@pytest.mark.parametrize("config", CONFIGS)
def test_compatible_schedulers_take_each_other_s_configuration(config):
    ours = LatteFlowScheduler(**config)
    assert FlowMatchEulerDiscreteScheduler in ours.compatibles
    for stock_class in ours.compatibles:
        stock = stock_class.from_config(ours.config)
        for scheduler in (ours, stock):
            scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
        assert torch.equal(run(ours), run(stock))
        # There and back, nothing is lost: not even what the other does not know.
        again = public(LatteFlowScheduler.from_config(stock.config).config)
        assert {name: again[name] for name in public(ours.config)} == public(ours.config)
    stock = FlowMatchEulerDiscreteScheduler(shift=1.7, use_dynamic_shifting=True)
    ours = LatteFlowScheduler.from_config(stock.config)
    assert ours.config.shift == 1.7
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.use_dynamic_shifting


# Steps.


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_any_number_of_steps(shift):
    scheduler = LatteFlowScheduler(shift=shift)
    assert len(scheduler) == 1000
    for number in (*range(1, 65), 99, 100, 128, 250, 333, 500, 999, 1000):
        scheduler.set_timesteps(number)
        assert scheduler.num_inference_steps == len(scheduler.timesteps) == len(scheduler.experts) == number
        assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
        assert len(scheduler.sigmas) == number + 1 and scheduler.sigmas[-1] == 0
        assert (scheduler.sigmas.diff() < 0).all() and scheduler.timesteps[0] == 1000
        assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
        # The experts come in their order, the noisiest first.
        assert scheduler.experts == sorted(scheduler.experts) and scheduler.experts[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 32, 2, 5), (2, 7)])
def test_step_keeps_shape_and_dtype(shape, dtype):
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(3)
    sample, velocity = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype)
    before = sample.clone()
    for timestep in scheduler.timesteps:
        record = copy.deepcopy(scheduler).step(velocity, timestep, sample)
        (found,) = scheduler.step(velocity, timestep, sample, return_dict=False)
        assert found.shape == shape and found.dtype == dtype and torch.isfinite(found).all()
        assert torch.equal(found, record.prev_sample) and torch.equal(found, record[0])
        assert torch.equal(sample, before) and not torch.equal(found, sample)
        sample, before = found, found.clone()


def test_timestep_may_be_a_number_or_a_tensor():
    found = []
    for kind in (float, lambda t: t, lambda t: t.to(torch.float64), lambda t: t[None]):
        scheduler = LatteFlowScheduler()
        scheduler.set_timesteps(7)
        timestep = scheduler.timesteps[3]
        found.append(scheduler.step(noise(1, 2), kind(timestep), noise(1, 2, seed=1)).prev_sample)
        assert scheduler.step_index == 4
    assert all(torch.equal(one, found[0]) for one in found)


def test_index_for_timestep_is_where_it_stands():
    scheduler = LatteFlowScheduler(shift=2.0)
    for number in (1, 7, 1000):
        scheduler.set_timesteps(number)
        assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == list(range(number))
    with pytest.raises(ValueError, match=r"timestep must be one of `scheduler.timesteps`, got 3\.3"):
        scheduler.index_for_timestep(3.3)


def test_begin_index_is_the_first_step_s():
    scheduler = LatteFlowScheduler()
    scheduler.set_timesteps(8)
    assert scheduler.begin_index is None and scheduler.step_index is None
    scheduler.set_begin_index(5)
    assert scheduler.begin_index == 5
    sample = noise(1, 2)
    for timestep in scheduler.timesteps[5:]:
        sample = scheduler.step(torch.ones(1, 2), timestep, sample).prev_sample
    assert scheduler.step_index == 8
    torch.testing.assert_close(sample, noise(1, 2) - scheduler.sigmas[5])


def test_device_is_that_of_the_timesteps():
    scheduler = LatteFlowScheduler()
    for device in (None, "cpu", torch.device("cpu")):
        scheduler.set_timesteps(4, device=device)
        assert scheduler.timesteps.device == scheduler.sigmas.device == torch.device("cpu")
    assert {"device", "sigmas"} <= set(inspect.signature(scheduler.set_timesteps).parameters)


# Noise.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_is_added_for_each_example(dtype):
    scheduler = LatteFlowScheduler(shift=2.0)
    scheduler.set_timesteps(9)
    data, start = noise(3, 4, 2, 2, dtype=dtype), noise(3, 4, 2, 2, seed=1, dtype=dtype)
    timesteps = scheduler.timesteps[[0, 4, 8]]
    found = scheduler.add_noise(data, start, timesteps)
    assert found.shape == data.shape and found.dtype == dtype
    for row, step in enumerate((0, 4, 8)):
        alone = interpolate(data[row], start[row], float(scheduler.sigmas[step]))
        torch.testing.assert_close(found[row].float(), alone.float(), rtol=1e-2, atol=1e-2)
        # One timestep for one example, as diffusers' training scripts and its own tests have it.
        assert torch.equal(
            scheduler.add_noise(data[row : row + 1], start[row : row + 1], timesteps[row][None])[0], found[row]
        )
    assert torch.equal(scheduler.scale_noise(data, timesteps, start), found)
    assert torch.equal(found[0], start[0])


def test_noise_may_be_added_before_any_steps_are_chosen():
    scheduler, data, start = LatteFlowScheduler(), noise(2, 3), noise(2, 3, seed=1)
    found = scheduler.add_noise(data, start, torch.tensor([1000.0, 0.0]))
    assert torch.equal(found[0], start[0]) and torch.equal(found[1], data[1])
