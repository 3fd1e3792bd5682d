# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Generated images against a reference in several metrics. All that could be refused is, before features are
computed: these take minutes to hours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..pipelines.image_metadata import read_metadata
from .features import FeatureExtractor, Features, extract_features
from .image_quality import (
    Statistics,
    check_comparable,
    frechet_distance,
    inception_score,
    kernel_distance,
    min_images,
    nearest_training_images,
    precision_recall,
    prompt_diversity,
    read_statistics,
)
from .image_sets import ImageSet, open_images, open_npz


METRICS = (
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "inception_score",
    "prompt_diversity",
    "nearest_training",
)


@dataclass(frozen=True)
class Reference:
    """Real images, or what is left of them.

    Args:
        name (`str`): what errors call it.
        statistics ([`Statistics`], *optional*): the mean and covariance that its file has.
        images ([`ImageSet`], *optional*): the images that it has. They may be fewer than those of the statistics:
            ADM's reference for ImageNet has the statistics of all and 10,000 images.
    """

    name: str
    statistics: Statistics | None
    images: ImageSet | None


def open_reference(source: str | Path) -> Reference:
    """Open a folder of real images, or an `.npz` file with `mu` and `sigma`, with the images `arr_0`, or with both.

    Raises:
        `ValueError`: if the file has neither, or one of them is wrong.
        `OSError`: if there is no such folder or file.
    """
    path = Path(source)
    if path.suffix.lower() != ".npz" or not path.is_file():
        images = open_images(path)
        return Reference(images.name, None, images)
    with open_npz(path) as archive:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
    if not keys & {"mu", "sigma", "arr_0"}:
        raise ValueError(
            f"reference {path} must have the arrays mu and sigma, or the images arr_0, got "
            f"{', '.join(sorted(keys)) or 'nothing'}."
        )
    return Reference(
        str(path),
        read_statistics(path) if keys & {"mu", "sigma"} else None,
        open_images(path) if "arr_0" in keys else None,
    )


def choose_metrics(
    reference: Reference, extractor: FeatureExtractor, has_prompts: bool = False, has_training: bool = False
) -> list[str]:
    """The metrics for which there is everything but, possibly, enough images."""
    needs_images = reference.images is not None
    needs = {
        "frechet_distance": True,
        "kernel_distance": needs_images,
        "precision_recall": needs_images,
        "inception_score": extractor.has_classes,
        "prompt_diversity": has_prompts,
        "nearest_training": has_training and needs_images,
    }
    return [metric for metric in METRICS if needs[metric]]


def check_comparison(
    num_images: int,
    height: int,
    width: int,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str],
    training: ImageSet | None = None,
    nearest_k: int = 5,
    name: str = "generated",
    prompts: Sequence[str] | None = None,
) -> None:
    """Check everything that can be known of a comparison before the images exist.

    Args:
        num_images, height, width (`int`): the number and size of the generated images.
        reference, extractor, metrics, training, nearest_k: see [`compare_images`].
        name (`str`, defaults to `"generated"`): what errors call the generated images.
        prompts (`Sequence[str]`, *optional*): those of the generated images, if they are known.

    Raises:
        `ValueError`: if there are too few images for a metric, sizes differ, or the reference lacks what a metric
            needs or belongs to another extractor, or the extractor is made for other images.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    if reference.statistics is not None:
        own = Features(np.zeros((1, extractor.num_features)), extractor.name, name)
        check_comparable(own, reference.statistics)
    available = choose_metrics(reference, extractor, True, training is not None)
    for metric in metrics:
        if metric in available:
            continue
        if metric == "inception_score":
            raise ValueError(f"inception_score needs an extractor with classes, which {extractor.name} is not.")
        what = (
            "training images" if metric == "nearest_training" and training is None else f"images in {reference.name}"
        )
        raise ValueError(f"{metric} needs {what}; give them, or choose other metrics.")
    sets = {name: (num_images, height, width)}
    for images in (reference.images, training):
        if images is not None:
            sets[images.name] = (images.num_images, images.height, images.width)
    for other, (_, other_height, other_width) in sets.items():
        if (other_height, other_width) != (height, width):
            raise ValueError(
                f"all images must be of one size: {name} has {height}x{width} pixels, {other} has "
                f"{other_height}x{other_width}; resize them in the same way."
            )
    extractor.check_size(name, height, width)
    extractor.check_prompts(prompts or [])
    for metric in metrics:
        minimum = min_images(metric, extractor.num_features, nearest_k)
        for other, (number, *_) in sets.items():
            is_used = (
                other == name
                or (metric in ("kernel_distance", "precision_recall", "nearest_training") and other == reference.name)
                or (metric == "frechet_distance" and other == reference.name and reference.statistics is None)
                or (metric == "nearest_training" and training is not None and other == training.name)
            )
            if is_used and number < minimum:
                raise ValueError(
                    f"{metric} needs at least {minimum} images with {extractor.num_features} features, got {number} "
                    f"in {other}; use more images, or choose other metrics."
                )


def read_prompts_of(images: ImageSet) -> list[str] | None:
    """The prompts that PNG files of `latte-flow generate` have in their metadata; `None` if one of them has none."""
    prompts = []
    for path in images.paths:
        try:
            prompts.append(read_metadata(path).prompt)
        except ValueError:
            return None
    return prompts or None


def has_repeated_prompts(prompts: Sequence[str] | None) -> bool:
    """Whether there are two images of a prompt, as `prompt_diversity` needs them."""
    return prompts is not None and len(set(prompts)) < len(prompts)


def _check_distinct(sets: dict[str, ImageSet | None]) -> None:
    files = {what: images.files() for what, images in sets.items() if images is not None}
    for (first, of_first), (second, of_second) in itertools.combinations(files.items(), 2):
        if shared := sorted(of_first & of_second):
            raise ValueError(
                f"{second} images must be others than the {first} ones, but {len(shared)} files are in both, such as "
                f"{shared[0]}."
            )


def compare_images(
    generated: Any,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    training: Any = None,
    nearest_k: int = 5,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Compute metrics of generated images.

    Args:
        generated: see [`open_images`].
        reference ([`Reference`]): real images that the model was not trained on, see [`open_reference`].
        extractor ([`FeatureExtractor`]): see [`load_extractor`].
        metrics (`Sequence[str]`, *optional*): of [`METRICS`]; all for which there is what they need, if left out.
        prompts (`Sequence[str]`, *optional*): the prompt of each generated image, for `prompt_diversity`.
        training (*optional*): images that the model was trained on, for `nearest_training`.
        nearest_k (`int`, defaults to 5): see [`precision_recall`].
        batch_size (`int`, defaults to 64): for the extractor.

    Returns:
        `dict`: `extractor`, `num_generated`, `num_reference` (`None` for statistics alone), `nearest_k`, and one entry
        for each metric. `nearest_training` has the closest pairs too, with the names of their files if they have some.

    Raises:
        `ValueError`: for the reasons of [`check_comparison`], or if an image or a feature cannot be used.
    """
    opened = open_images(generated)
    training_images = None if training is None else open_images(training)
    if metrics is None:
        metrics = choose_metrics(reference, extractor, has_repeated_prompts(prompts), training_images is not None)
    _check_distinct({"generated": opened, "reference": reference.images, "training": training_images})
    if "prompt_diversity" in metrics:
        if prompts is None:
            raise ValueError(f"prompt_diversity needs the prompt of each image, which {opened.name} does not have.")
        if not has_repeated_prompts(prompts):
            raise ValueError(f"prompt_diversity needs two images of a prompt, and {opened.name} has none.")
    check_comparison(
        opened.num_images,
        opened.height,
        opened.width,
        reference,
        extractor,
        metrics,
        training_images,
        nearest_k,
        opened.name,
        prompts,
    )
    features = extract_features(extractor, opened, batch_size, with_classes="inception_score" in metrics)
    real = None
    with_images = {"kernel_distance", "precision_recall", "nearest_training"}
    if reference.images is not None and (with_images & set(metrics) or reference.statistics is None):
        real = extract_features(extractor, reference.images, batch_size)
    results: dict[str, Any] = {
        "extractor": extractor.name,
        "num_generated": len(features),
        "num_reference": None if reference.images is None else reference.images.num_images,
        "nearest_k": nearest_k,
    }
    if "frechet_distance" in metrics:
        against = reference.statistics or real
        assert against is not None
        results["frechet_distance"] = frechet_distance(features, against)
    if "kernel_distance" in metrics:
        assert real is not None
        results["kernel_distance"] = kernel_distance(features, real)
    if "precision_recall" in metrics:
        assert real is not None
        results["precision_recall"] = precision_recall(features, real, nearest_k)
    if "inception_score" in metrics:
        results["inception_score"] = inception_score(features)
    if "prompt_diversity" in metrics:
        assert prompts is not None
        results["prompt_diversity"] = prompt_diversity(features, prompts)
    if "nearest_training" in metrics:
        assert real is not None and training_images is not None
        found = nearest_training_images(features, extract_features(extractor, training_images, batch_size), real)
        results["nearest_training"] = {
            "share_closer": found.share_closer,
            "p_value": found.p_value,
            "median_generated": found.median_generated,
            "median_held_out": found.median_held_out,
            "closest": [
                {"generated": _file(opened, i), "training": _file(training_images, j), "distance": distance}
                for i, j, distance in found.closest()
            ],
        }
    return results


def _file(images: ImageSet, index: int) -> str | int:
    """The file of an image, or its index in an array."""
    return str(images.paths[index]) if images.paths else index


def describe_comparison(results: dict[str, Any]) -> list[str]:
    """The results of [`compare_images`], in lines."""
    lines = [
        f"{results['num_generated']:,} generated images"
        + (f", {results['num_reference']:,} of the reference" if results["num_reference"] is not None else "")
        + f"; features of {results['extractor']}"
    ]
    if "frechet_distance" in results:
        lines.append(f"{'Fréchet distance':20}{results['frechet_distance']:.4f}")
    if "kernel_distance" in results:
        kernel = results["kernel_distance"]
        lines.append(f"{'kernel distance':20}{kernel['mean']:.6f} (spread of the subsets {kernel['std']:.6f})")
    for name, value in results.get("precision_recall", {}).items():
        lines.append(f"{name:20}{value:.4f}")
    if "inception_score" in results:
        score = results["inception_score"]
        lines.append(f"{'Inception Score':20}{score['mean']:.3f} (spread of the splits {score['std']:.3f})")
    if "prompt_diversity" in results:
        diversity = results["prompt_diversity"]
        lines.append(
            f"{'diversity':20}{diversity['mean']:.4f} within a prompt, the least {diversity['min']:.4f}, of "
            f"{diversity['num_prompts']} prompts"
        )
    if "nearest_training" in results:
        nearest = results["nearest_training"]
        lines += [
            f"{'nearest training':20}{nearest['median_generated']:.4f} from generated images, "
            f"{nearest['median_held_out']:.4f} from held-out ones (medians)",
            f"{'':20}probability {nearest['share_closer']:.3f} that a generated image is closer than a held-out one "
            f"(one-sided p = {nearest['p_value']:.2g})",
        ]
        closest = nearest["closest"][0]
        lines.append(f"{'':20}closest: {closest['generated']} to {closest['training']} ({closest['distance']:.4f})")
    return lines
