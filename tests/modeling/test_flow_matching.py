# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The formulas in float64: inverse pairs, derivatives by autograd, the owner of a sigma by its written definition."""

import itertools
import re

import numpy as np
import pytest
import torch

from latte_flow_hf.modeling.flow_matching import (
    check_boundaries,
    data_from_velocity,
    draw_expert_sigmas,
    expert_of_sigma,
    folded_guidance_target,
    guided_velocity,
    interpolate,
    mean_velocity,
    sigmas_per_expert,
    uniform_boundaries,
    velocity_loss,
    velocity_target,
)


UNEVEN = [1.0, 0.85, 0.3, 0.1, 0.0]


def pair(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, batch, 4, 3, 2, generator=generator, dtype=torch.float64)
    return data, noise


def test_path_runs_from_data_to_noise():
    data, noise = pair()
    assert torch.equal(interpolate(data, noise, 0.0), data)
    assert torch.equal(interpolate(data, noise, 1.0), noise)
    assert torch.equal(interpolate(data, noise, torch.zeros(5, dtype=torch.float64)), data)


def test_interpolate_takes_a_sigma_for_each_example():
    data, noise = pair()
    sigma = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    found = interpolate(data, noise, sigma)
    for row, s in enumerate(sigma.tolist()):
        expected = (1 - s) * data[row].numpy() + s * noise[row].numpy()
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=0, atol=1e-15)


def test_interpolate_keeps_the_dtype_of_the_data():
    data, noise = pair()
    half = interpolate(data.bfloat16(), noise.bfloat16(), torch.full((5,), 0.5))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("sigma", [0.0, 0.25, 0.999, 1.0])
def test_velocity_is_the_derivative_of_the_path(sigma):
    data, noise = pair()
    at = torch.tensor(sigma, dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(
        lambda s: interpolate(data, noise, s), at, torch.ones((), dtype=torch.float64)
    )
    torch.testing.assert_close(velocity_target(data, noise), derivative, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, torch.linspace(0, 1, 5, dtype=torch.float64)])
def test_data_from_velocity_inverts_interpolate(sigma):
    data, noise = pair()
    noisy, velocity = interpolate(data, noise, sigma), velocity_target(data, noise)
    torch.testing.assert_close(data_from_velocity(noisy, velocity, sigma), data, rtol=0, atol=1e-14)


def test_one_euler_step_to_any_sigma_stays_on_the_path():
    data, noise = pair()
    noisy = interpolate(data, noise, 0.8)
    stepped = noisy + (0.3 - 0.8) * velocity_target(data, noise)
    torch.testing.assert_close(stepped, interpolate(data, noise, 0.3), rtol=0, atol=1e-14)


def test_velocity_loss_is_the_mean_square_over_all_elements_in_float32():
    data, noise = pair()
    expected = np.mean((data.numpy() - noise.numpy()) ** 2)
    loss = velocity_loss(data.float(), noise.float())
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-6)
    # Half precision would have three digits only.
    low = velocity_loss(data.bfloat16(), noise.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx((data.bfloat16().float() - noise.bfloat16().float()).square().mean().item())


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 7])
def test_uniform_boundaries_pass_their_own_check_and_are_even(num_experts):
    boundaries = uniform_boundaries(num_experts)
    assert check_boundaries(boundaries, num_experts) == boundaries
    np.testing.assert_allclose(-np.diff(boundaries), 1 / num_experts, rtol=0, atol=1e-15)


def owner_by_definition(sigma: float, boundaries: list[float]) -> int:
    """boundaries[k] >= sigma > boundaries[k + 1]; the last expert owns 0 too."""
    for expert, (high, low) in enumerate(itertools.pairwise(boundaries)):
        if high >= sigma > low:
            return expert
    assert sigma == 0
    return len(boundaries) - 2


@pytest.mark.parametrize("boundaries", [uniform_boundaries(1), uniform_boundaries(3), uniform_boundaries(4), UNEVEN])
def test_expert_of_sigma_by_its_definition(boundaries):
    # The grid keeps off the boundaries by more than the tolerance, the boundaries themselves are added exactly.
    grid = [s for s in np.linspace(0, 1, 1201) if min(abs(s - b) for b in boundaries) > 1e-4]
    for sigma in [*grid, *boundaries]:
        assert expert_of_sigma(sigma, boundaries) == owner_by_definition(sigma, boundaries), sigma


@pytest.mark.parametrize("boundaries", [uniform_boundaries(3), uniform_boundaries(7), UNEVEN])
def test_boundary_survives_float32_and_the_way_through_timesteps(boundaries):
    for expert, boundary in enumerate(boundaries[:-1]):
        single = np.float32(boundary)
        noisy = [
            single,
            np.nextafter(single, np.float32(2)),
            np.nextafter(single, np.float32(-1)),
            np.float32(1000) * single / np.float32(1000),
            (torch.tensor(boundary) * 1000.0).item() / 1000.0,
        ]
        assert [expert_of_sigma(sigma, boundaries) for sigma in noisy] == [expert] * len(noisy)


def test_tolerance_is_far_below_a_timestep():
    # A thousandth of a timestep and more on the noisy side is the noisy expert's.
    assert expert_of_sigma(0.75 + 2e-5, uniform_boundaries(4)) == 0
    assert expert_of_sigma(0.75, uniform_boundaries(4)) == 1


@pytest.mark.parametrize("sigma", [-0.1, 1.1, 2.0, float("nan"), float("inf")])
def test_expert_of_sigma_refuses_what_is_outside(sigma):
    with pytest.raises(
        ValueError, match=re.escape(f"sigma must be from 0 to 1 (a timestep from 0 to 1000), got {sigma}")
    ):
        expert_of_sigma(sigma, UNEVEN)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("interval", [(1.0, 0.75), (0.75, 0.5), (0.25, 0.0), (1.0, 0.0), (0.3, 0.1)])
def test_drawn_sigmas_are_stratified_and_stay_in_the_interval(count, interval):
    high, low = interval
    for seed in range(5):
        sigmas = draw_expert_sigmas(count, interval, torch.Generator().manual_seed(seed))
        assert sigmas.shape == (count,) and sigmas.dtype == torch.float32
        assert (sigmas <= high).all() and (sigmas > low).all()
        # The j-th lies in the j-th part, up to float32.
        part = (high - sigmas.double()) / (high - low) * count
        index = torch.arange(count)
        assert (part >= index - 1e-3).all() and (part <= index + 1 + 1e-3).all()


@pytest.mark.parametrize("seed", [240, 412])
def test_draw_never_reaches_the_lower_end(seed):
    # Seeds whose last uniform number is so close to 1 that float32 rounds it up: high >= sigma > low must still hold.
    sigmas = draw_expert_sigmas(65536, (0.5, 0.25), torch.Generator().manual_seed(seed))
    assert sigmas.min() > 0.25


def test_draws_are_uniform_within_their_part():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_expert_sigmas(4, (1.0, 0.5), generator) for _ in range(2000)]).double()
    within = (1.0 - draws) / 0.5 * 4 - torch.arange(4)
    # Mean 1/2 and variance 1/12 of a uniform number, each at about five standard errors.
    torch.testing.assert_close(within.mean(0), torch.full((4,), 0.5, dtype=torch.float64), rtol=0, atol=0.033)
    torch.testing.assert_close(within.var(0), torch.full((4,), 1 / 12, dtype=torch.float64), rtol=0, atol=0.01)


def test_draw_follows_its_generator():
    draws = [draw_expert_sigmas(8, (1.0, 0.5), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "boundaries",
    [
        [1.0, 0.5],
        [1.0, 0.7, 0.3, 0.0],
        [0.0, 0.5, 1.0],
        [1.0, 1.0, 0.0],
        [1.0, 0.0, 0.0],
        [0.9, 0.5, 0.0],
        [1.0, 0.5, 0.1],
        [1.0, float("nan"), 0.0],
        [],
    ],
)
def test_check_boundaries_names_the_value_and_an_example(boundaries):
    with pytest.raises(ValueError) as caught:
        check_boundaries(boundaries, 2)
    message = str(caught.value)
    assert "expert_boundaries must be 3 strictly falling sigmas from 1 to 0" in message
    assert f"got {boundaries}" in message
    assert "for example [1.0, 0.5, 0.0]." in message


def test_check_boundaries_gives_floats_back():
    found = check_boundaries((1, np.float64(0.25), 0), 2)
    assert found == [1.0, 0.25, 0.0]
    assert all(type(b) is float for b in found)


@pytest.mark.parametrize("interval", [(1.0, 0.75), (0.5, 0.25), (0.25, 0.0), (1.0, 0.0)])
def test_logit_normal_draws_are_stratified_by_probability_inside_the_interval(interval):
    """The oracle is scipy's normal distribution of the logit."""
    from scipy.special import logit
    from scipy.stats import norm

    high, low = interval
    with np.errstate(divide="ignore"):
        top, bottom = norm.cdf(logit(high)), norm.cdf(logit(low))
    for seed in range(5):
        sigmas = draw_expert_sigmas(64, interval, torch.Generator().manual_seed(seed), "logit_normal")
        assert sigmas.dtype == torch.float32 and (sigmas <= high).all() and (sigmas > low).all()
        part = (top - norm.cdf(logit(sigmas.double().numpy()))) / (top - bottom) * 64
        index = np.arange(64)
        # The ends are cut to the interval's inside.
        assert (part[1:-1] >= index[1:-1] - 1e-2).all() and (part[1:-1] <= index[1:-1] + 1 + 1e-2).all()


def test_the_model_draws_as_its_configuration_says(model, encode):
    """Beside each other in one seed: the same noise, other timesteps, hence another loss."""
    import copy

    other = copy.deepcopy(model)
    other.config.timestep_sampling = "logit_normal"
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = encode(*["a red circle"] * 4)
    losses = [m(**inputs, latents=latents, generator=torch.Generator().manual_seed(1)).loss for m in (model, other)]
    assert losses[0] != losses[1]


def test_mean_velocity_leads_from_one_state_to_the_other_in_one_step():
    """On a straight path it is the path's own velocity; on a curved one Euler's step with it hits the end."""
    data, noise = pair()
    high, low = torch.linspace(0.5, 1.0, 5, dtype=torch.float64), torch.linspace(0.0, 0.4, 5, dtype=torch.float64)
    start, end = interpolate(data, noise, high), interpolate(data, noise, low)
    torch.testing.assert_close(mean_velocity(start, end, high, low), velocity_target(data, noise))
    curved = end.sin() + 2.0
    step = (low - high).view(-1, 1, 1, 1) * mean_velocity(start, curved, high, low)
    torch.testing.assert_close(start + step, curved)
    torch.testing.assert_close(mean_velocity(start, curved, 0.75, 0.5), 4 * (start - curved))


def test_sigmas_by_expert_are_even_in_each_interval():
    found = sigmas_per_expert(UNEVEN, [1, 2, 0, 2])
    np.testing.assert_allclose(found.numpy(), [1.0, 0.85, 0.575, 0.1, 0.05], atol=1e-7)
    assert sigmas_per_expert(UNEVEN, [1, 1, 1, 1]).tolist() == pytest.approx(UNEVEN[:-1])
    assert found.dtype == torch.float32


def test_guidance_extrapolates_from_the_negative_prompt():
    negative, prompt = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.0])
    assert guided_velocity(negative, prompt, 1.0).tolist() == prompt.tolist()
    assert guided_velocity(negative, prompt, 0.0).tolist() == negative.tolist()
    assert guided_velocity(negative, prompt, 4.0).tolist() == [5.0, 6.0]


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_a_model_trained_with_folded_guidance_predicts_the_guided_velocity(scale):
    """The smallest model: one velocity for the prompt, one for the empty prompt, and targets with noise around 1 and
    0.25. Gradient descent ends at v_0 = 0.25 and v_c = v_0 + scale * (1 - v_0)."""
    generator = torch.Generator().manual_seed(0)
    velocities = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    means = torch.tensor([1.0, 0.25], dtype=torch.float64)
    for _ in range(400):
        noise = torch.randn(256, 2, generator=generator, dtype=torch.float64)
        targets = means + noise - noise.mean(dim=0)
        conditional, unconditional = velocities.detach()
        own = torch.stack([conditional, unconditional])
        targets = folded_guidance_target(targets, own, unconditional, scale)
        (gradient,) = torch.autograd.grad((velocities - targets).square().mean(dim=0).sum(), velocities)
        velocities = (velocities - 0.2 * gradient).detach().requires_grad_(True)
    assert velocities.tolist() == pytest.approx([0.25 + scale * 0.75, 0.25], abs=1e-6)
