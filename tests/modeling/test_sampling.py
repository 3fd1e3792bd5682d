"""How checkpoints want to be sampled: what may be stored, and the steps of distilled experts."""

import pytest

from latte_flow_hf.modeling.sampling import (
    check_distilled_steps,
    check_distilled_strength,
    check_sampling,
    default_strength,
    describe_sampling,
    guidance_of_steps,
)


BOUNDARIES = [1.0, 0.82, 0.7, 0.56, 0.0]
DISTILLED = {"steps_per_expert": [1, 2, 1, 1], "distilled_experts": [0, 1, 2, 3]}


def test_valid_sampling_is_kept_without_empty_fields():
    sampling = {"steps_per_expert": (1, 2, 1, 0), "guidance_scale": [1, 1, 4.0, 4.0], "distilled_experts": [0, 1]}
    assert check_sampling({**sampling, "num_inference_steps": None}, 4) == {
        **sampling,
        "steps_per_expert": [1, 2, 1, 0],
    }
    assert check_sampling({"num_inference_steps": 20}, 4) == {"num_inference_steps": 20}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([1, 1, 1, 1], "must be a dict"),
        ({"steps": 4}, "must be a dict"),
        ({"num_inference_steps": 4, "steps_per_expert": [1, 1, 1, 1]}, "give either"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"num_inference_steps": True}, "num_inference_steps must be"),
        ({"steps_per_expert": [1, 1, 1]}, "steps_per_expert must be 4 whole numbers"),
        ({"steps_per_expert": [0, 1, 1, 1]}, "the first at least 1"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale must be"),
        ({"guidance_scale": "4"}, "guidance_scale must be"),
        ({"distilled_experts": [4], "steps_per_expert": [1, 1, 1, 1]}, "distilled_experts must be some"),
        ({"distilled_experts": [0]}, "must come with their steps_per_expert"),
        ({"folded_guidance_scale": [1.0, 4.0]}, "folded_guidance_scale must be a number, or one for each"),
        ({"new_noise": [0.5, 0.5, 0.5, 0.0]}, "new_noise is for distilled_experts"),
        ({**DISTILLED, "new_noise": 0.5}, "new_noise must be 4 numbers from 0 to 1"),
        ({**DISTILLED, "new_noise": [0.5, 0.5, 0.5, 1.5]}, "new_noise must be 4 numbers from 0 to 1"),
    ],
)
def test_invalid_sampling_is_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(sampling, 4)


@pytest.mark.parametrize(
    "sigmas",
    [
        [1.0, 0.82, 0.76, 0.7, 0.56, 0.0],
        [1.0, 0.8200002, 0.76, 0.7, 0.56, 0.0],
        # From an image with some noise, at any step.
        [0.76, 0.7, 0.56, 0.0],
        [0.56, 0.0],
    ],
)
def test_distilled_steps_are_accepted(sigmas):
    check_distilled_steps(sigmas, DISTILLED, BOUNDARIES)


@pytest.mark.parametrize(
    ("sigmas", "expert"),
    [
        ([1.0, 0.75, 0.5, 0.25, 0.0], 1),
        ([1.0, 0.82, 0.7, 0.56, 0.0], 1),
        ([1.0, 0.82, 0.76, 0.7, 0.56, 0.28, 0.0], 3),
        ([1.0, 0.82, 0.82, 0.76, 0.76, 0.7, 0.7, 0.56, 0.56, 0.0], 1),
        ([0.8, 0.76, 0.7, 0.56, 0.0], 1),
        ([0.3, 0.0], 3),
    ],
)
def test_other_steps_are_refused(sigmas, expert):
    with pytest.raises(ValueError, match=rf"expert {expert} was distilled to steps_per_expert=\[1, 2, 1, 1\]"):
        check_distilled_steps(sigmas, DISTILLED, BOUNDARIES)


def test_experts_that_are_not_distilled_take_any_steps():
    sampling = {"steps_per_expert": [1, 9, 9, 9], "distilled_experts": [0]}
    check_distilled_steps([1.0, 0.82, 0.5, 0.0], sampling, BOUNDARIES)
    check_distilled_steps([1.0, 0.5, 0.0], {"num_inference_steps": 2}, BOUNDARIES)


def test_distilled_experts_start_where_a_step_does():
    for strength in (0.2, 0.4, 0.6, 0.8, 1, 0.4005):
        check_distilled_strength(strength, 5, 1, DISTILLED)
    for strength in (0.001, 0.1, 0.5, 0.99):
        with pytest.raises(ValueError, match=r"strength must be one of 0\.2, 0\.4, 0\.6, 0\.8, 1: expert 1 was dis"):
            check_distilled_strength(strength, 5, 1, DISTILLED)
    check_distilled_strength(0.5, 5, 3, {**DISTILLED, "distilled_experts": [0]})
    check_distilled_strength(0.5, 40, 3, {})


def test_default_strengths():
    assert default_strength(40, {}) == 0.8 and default_strength(4, {"steps_per_expert": [1, 1, 1, 1]}) == 0.8
    expected = {1: 1.0, 2: 0.5, 4: 0.75, 5: 0.8, 8: 0.75}
    assert {n: default_strength(n, DISTILLED) for n in expected} == expected


def test_descriptions():
    assert describe_sampling(None) == "40 steps; guidance 4"
    assert describe_sampling({"num_inference_steps": 20, "guidance_scale": [1, 2.5]}, "heun") == (
        "20 steps (heun); guidance 1, 2.5"
    )
    assert describe_sampling({**DISTILLED, "guidance_scale": 1.0}, "euler") == (
        "steps per expert 1, 2, 1, 1 (euler); guidance 1; experts 0, 1, 2, 3 distilled to these steps"
    )
    assert describe_sampling({**DISTILLED, "guidance_scale": 1.0, "new_noise": [0.5, 0, 0, 0]}).endswith(
        "distilled to these steps; new noise 0.5, 0, 0, 0"
    )
    assert describe_sampling({"guidance_scale": 1.0, "folded_guidance_scale": 4.0}) == (
        "40 steps; guidance 1, and 4 in the weights"
    )


def test_each_evaluation_has_its_guidance_scale():
    experts, timesteps = [0, 0, 1, 1], [1000.0, 750.0, 500.0, 250.0]
    assert guidance_of_steps(3.0, None, experts, timesteps) == [3.0] * 4
    assert guidance_of_steps([4.0, 0.5], None, experts, timesteps) == [4.0, 4.0, 1.0, 1.0]
    assert guidance_of_steps(3.0, (0.3, 0.75), experts, timesteps) == [1.0, 3.0, 3.0, 1.0]
