# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The quality of a model: the same prompts, the same noise and the same drawn images each time."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.features import FeatureExtractor, TinyWorldExtractor, extract_features
from ..evaluation.image_quality import Statistics, frechet_distance, read_statistics
from ..evaluation.tinyworld import generation_prompts
from ..files import atomic_write
from ..tinyworld.datasets import TinyWorldImages
from ..tinyworld.oracle import shows
from .plan import REFERENCE_FILE
from .settings import EvaluationSettings, Reproduction


# The seeds of noise are far apart, and the drawn images have a seed that no run has.
_NOISE_SEEDS = 1_000_000
_REFERENCE_SEED = 2_000_003
_DRAWN_SEED = 3_000_017


def evaluation_prompts(settings: EvaluationSettings) -> list[tuple[str, str]]:
    """The prompts of all evaluations, each with its kind: `("one object", "a red circle")`."""
    prompts = generation_prompts(settings.seed, settings.one, settings.two, 0, settings.digits)
    return [(kind, prompt) for kind, items in prompts.items() for prompt in items]


def generate(pipe: Any, prompts: list[str], seed: int, batch_size: int, **call: Any) -> list[Image.Image]:
    """One image for each prompt; image i has the noise of `seed` + i, whatever the batch size."""
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipe(batch, generator=generators, **call).images
    return images


def draw_images(settings: Reproduction, num_images: int, seed: int) -> list[Image.Image]:
    """Images with the shares of objects and digits of the training data."""
    source = {name: value for name, value in settings.recipe["data"]["source"].items() if name != "path"}
    dataset = TinyWorldImages(seed, **{**source, "num_images": num_images})
    return [dataset[index]["image"] for index in range(num_images)]


def write_reference(settings: Reproduction, folder: Path) -> None:
    """Draw the images that the Fréchet distance compares with, and store their statistics."""
    evaluation = settings.evaluation
    images = draw_images(settings, evaluation.num_reference_images, _REFERENCE_SEED + evaluation.seed)
    found = Statistics.of(extract_features(TinyWorldExtractor(), images, name="the drawn images"))
    with atomic_write(folder / REFERENCE_FILE) as partial:
        np.savez(partial, mu=found.mu, sigma=found.sigma, extractor=np.array(found.extractor))


def distance_of_drawn_images(settings: Reproduction, folder: Path, num_sets: int = 4) -> float:
    """The Fréchet distance that perfect images have, because there are no more of them than prompts.

    Args:
        settings ([`Reproduction`]): the recipe.
        folder (`Path`): the output folder, with the statistics of the drawn images.
        num_sets (`int`, defaults to 4): of other drawn images, as many in each as there are prompts; the mean counts.
    """
    reference, extractor = read_statistics(folder / REFERENCE_FILE), TinyWorldExtractor()
    size, seed = settings.evaluation.num_prompts, _DRAWN_SEED + settings.evaluation.seed
    images = draw_images(settings, num_sets * size, seed)
    sets = [images[start : start + size] for start in range(0, len(images), size)]
    return statistics.fmean(
        frechet_distance(extract_features(extractor, items, name="drawn images"), reference) for items in sets
    )


class QualityMeter:
    """Measures pipelines.

    Args:
        settings ([`EvaluationSettings`]): the prompts and how images are generated.
        folder (`Path`): the output folder, with the statistics of the drawn images.
        device (`str`): where features are computed.
    """

    def __init__(self, settings: EvaluationSettings, folder: Path, device: str):
        self.settings = settings
        self.prompts = evaluation_prompts(settings)
        self.reference = read_statistics(folder / REFERENCE_FILE)
        self.extractor: FeatureExtractor = TinyWorldExtractor(device)

    def measure(self, pipe: Any, seed: int, **call: Any) -> dict[str, Any]:
        """Generate an image for each prompt and measure them.

        Args:
            pipe ([`LatteFlowPipeline`]): the pipeline.
            seed (`int`): of the run, which decides the noise.
            call: arguments of the pipeline that replace those of the settings.

        Returns:
            `dict`: `accuracy`, the share of images that show what their prompt describes, according to the oracle, of
            `all` and by kind (0 to 1); `count`; and `frechet`, the Fréchet distance to the drawn images.
        """
        settings = self.settings
        call = {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            **call,
        }
        prompts = [prompt for _, prompt in self.prompts]
        images = generate(pipe, prompts, _NOISE_SEEDS * (seed + 1), settings.batch_size, **call)
        by_kind: dict[str, list[bool]] = {}
        for (kind, prompt), image in zip(self.prompts, images):
            by_kind.setdefault(kind, []).append(shows(image, prompt))
        correct = [value for values in by_kind.values() for value in values]
        features = extract_features(self.extractor, images, name="the generated images")
        return {
            "accuracy": {
                "all": float(np.mean(correct)),
                **{kind: float(np.mean(values)) for kind, values in by_kind.items()},
            },
            "count": {"all": len(correct), **{kind: len(values) for kind, values in by_kind.items()}},
            "frechet": frechet_distance(features, self.reference),
        }
