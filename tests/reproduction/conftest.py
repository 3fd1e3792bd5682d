"""The smallest comparison: a random pipeline of four layers, two networks, a handful of steps."""

import copy
import math

import pytest

from latte_flow_hf.reproduction import Reproduction
from latte_flow_hf.reproduction.claims import Evidence
from latte_flow_hf.reproduction.plan import Plan


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
    "variants": [{"num_experts": 2}, {"num_experts": 4}],
    "seeds": [5],
    "budget": 8e8,
    "num_points": 2,
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
    "grid": {"num_experts": [4], "num_inference_steps": [3], "guidance_scale": [1.0]},
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


VARIANTS = [{"num_experts": number} for number in (1, 2, 4, 8)]
VARIANTS += [{"num_experts": 4, "residual_attention": mode} for mode in ("probabilities", None)]
GRID = {"num_experts": [4], "num_inference_steps": [5, 20, 40], "guidance_scale": [1.0, 4.0, 6.0]}
# Accuracy after all steps; after half as many it is half of it, and so on.
ACCURACIES = {"k1": 0.15, "k2": 0.42, "k4": 0.8, "k8": 0.5, "k4-probabilities": 0.8, "k4-none": 0.6}


def made_up_run(final: float, steps: list[int], has_grid: bool) -> dict:
    """The result of a run whose accuracy is `final` at the end."""

    def quality(accuracy: float, frechet: float) -> dict:
        kinds = {"all": accuracy, "digit": accuracy / 2}
        return {"accuracy": kinds, "count": {"all": 100, "digit": 20}, "frechet": frechet}

    shares = [0.5**i for i in reversed(range(len(steps)))]
    seconds = {"training": {"cpu": 60.0, "wall": 70.0}, "evaluation": {"cpu": 6.0, "wall": 7.0}}
    points = [
        {"step": step, "seconds": seconds, **quality(share * final, 4 / (share * final))}
        for step, share in zip(steps, shares)
    ]
    cells = [
        {"num_inference_steps": n, "guidance_scale": g, **quality(0.4 if n == 5 else final, 3.0)}
        for n in GRID["num_inference_steps"]
        for g in GRID["guidance_scale"]
    ]
    return {
        "points": points,
        "grid": cells if has_grid else [],
        "grid_seconds": {"cpu": 1.0, "wall": 1.0},
        "understanding": {"num_questions": 9, "num_equal_answers": 9, "are_logits_equal": True},
        "versions": {"python": "3.12"},
    }


@pytest.fixture(scope="session")
def make_evidence(make_settings):
    """Made-up results of all variants, with a little noise; `accuracies` replace those at the end of the budget.
    `times` are the milliseconds per image of K = 1, of K = 4, and of K = 4 without residual attention."""

    def make(seeds=(1, 2, 3), times=(30.0, 10.0, 9.8), **accuracies: float) -> Evidence:
        settings = make_settings(variants=VARIANTS, seeds=list(seeds), grid=GRID, num_points=4, budget=6.4e6)
        step_flops = {variant.name: 8000 // variant.num_experts for variant in settings.variants}
        plan = Plan(settings, "cpu", step_flops, dict.fromkeys(step_flops, 1000))
        results = {}
        for index, (name, (variant, _)) in enumerate(settings.runs.items()):
            final = {**ACCURACIES, **accuracies}[variant.name] + 0.002 * math.sin(7 * index)
            results[name] = made_up_run(final, plan.points(variant), variant.name == "k4")
        vanilla, main, plain = times
        milliseconds = {**dict.fromkeys(step_flops, main), "k1": vanilla, "k4-none": plain}
        rounds = {
            name: [{"wall": value * (1 + 0.003 * i), "cpu": value} for i in range(5)]
            for name, value in milliseconds.items()
        }
        flops = {name: {"loop": count, "image": count + 9} for name, count in step_flops.items()}
        timing = {
            "rounds": {"1": rounds},
            "flops": flops,
            "num_threads": 1,
            "device": "a machine",
            "load_average": 1.2,
        }
        return Evidence(plan, results, {**timing, "versions": {"python": "3.12"}}, 0.9)

    return make
