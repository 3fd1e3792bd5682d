"""The smallest comparison: a random pipeline of four layers, two networks, a handful of steps."""

import copy

import pytest

from latte_flow_hf.reproduction import Reproduction


CONTENT = {
    "recipe": {
        "model": {"experts": {"latent_channels": 4, "timestep_frequency_dim": 16}},
        "data": {
            "source": {"path": "tinyworld", "num_images": 24, "digit_share": 0.2, "single_share": 0.8},
            "encode_batch_size": 24,
        },
        "training": {
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        },
        "ema": {"decay": 0.9},
    },
    "variants": [{"num_experts": 1}, {"num_experts": 4}],
    "seeds": [5],
    "budget": 8e8,
    "num_points": 3,
    "evaluation": {
        # The fewest that have a covariance in the features.
        "one": 100,
        "two": 10,
        "digits": 20,
        "num_reference_images": 130,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "batch_size": 130,
    },
    "grid": {"num_experts": [4], "num_inference_steps": [2, 4], "guidance_scale": [1.0]},
    "timing": {"num_rounds": 2, "batch_sizes": [1], "num_inference_steps": 4, "guidance_scale": 2.0},
}


@pytest.fixture(scope="session")
def make_content(pipeline):
    """The content of a YAML file of the smallest comparison; arguments replace its fields."""

    def make(**changes) -> dict:
        return {**copy.deepcopy(CONTENT), "pipeline": pipeline, **changes}

    return make


@pytest.fixture(scope="session")
def make_settings(make_content):
    """The same as [`Reproduction`]."""
    return lambda **changes: Reproduction.from_dict(make_content(**changes))
