# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Metrics of image quality, from features: distances of distributions, precision and recall, diversity, memory.

The Fréchet distance, the kernel distance and the Inception Score are torchmetrics', with features in place of images.
What is unusual here: a statistic of too few images is refused, not computed.
"""

import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import mannwhitneyu
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from .features import Features
from .image_sets import open_npz


# Chosen: a share of 100 images has a standard error of up to 5 points.
MIN_IMAGES = 100
NUM_SPLITS = 10


def min_images(metric: str, num_features: int, nearest_k: int = 5) -> int:
    """The least number of images of each set that a metric takes.

    Args:
        metric (`str`): such as `"frechet_distance"`: d + 1, since fewer give a singular covariance;
            `"inception_score"`: 100 in each of 10 splits; `"prompt_diversity"`: 2; all others 100.
        num_features (`int`): d.
        nearest_k (`int`, defaults to 5): for `"precision_recall"`, which needs more images than neighbours.
    """
    special = {
        "frechet_distance": num_features + 1,
        "inception_score": MIN_IMAGES * NUM_SPLITS,
        "precision_recall": max(MIN_IMAGES, nearest_k + 1),
        "prompt_diversity": 2,
    }
    return special.get(metric, MIN_IMAGES)


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of a set of images, for the Fréchet distance.

    Args:
        mu (`np.ndarray`): (d,), the mean of the features.
        sigma (`np.ndarray`): (d, d), their covariance, divided by n - 1.
        extractor (`str`, *optional*): the name of the extractor, if it is known.
        name (`str`, defaults to `"images"`): what errors call the set.

    Raises:
        `ValueError`: if the shapes do not fit each other, a value is not finite, or `sigma` is no covariance.
    """

    mu: np.ndarray
    sigma: np.ndarray
    extractor: str | None = None
    name: str = "images"

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.sigma.shape != (len(self.mu), len(self.mu)):
            raise ValueError(
                f"statistics of {self.name} must have mu (d,) and sigma (d, d), got {self.mu.shape} and "
                f"{self.sigma.shape}."
            )
        if not len(self.mu):
            raise ValueError(f"statistics of {self.name} have no features.")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError(f"statistics of {self.name} contain NaN or infinite values.")
        is_symmetric = np.allclose(self.sigma, self.sigma.T, rtol=1e-5, atol=1e-8 * np.abs(self.sigma).max())
        if not is_symmetric or (self.sigma.diagonal() < 0).any():
            raise ValueError(f"statistics of {self.name}: sigma must be a covariance, symmetric with variances >= 0.")
        # Of a covariance that was rounded to float32, the smallest may be negative by 1e-7 of the largest.
        eigenvalues = np.linalg.eigvalsh(self.sigma)
        if eigenvalues[0] < -1e-5 * abs(eigenvalues).max():
            raise ValueError(
                f"statistics of {self.name}: sigma must be a covariance, without negative eigenvalues, got "
                f"{eigenvalues[0]:.3g} beside {eigenvalues[-1]:.3g}."
            )

    @classmethod
    def of(cls, features: Features) -> "Statistics":
        """The mean and covariance of features.

        Raises:
            `ValueError`: if there are too few images: fewer than d + 1 give a singular covariance.
        """
        num_features = features.values.shape[1]
        minimum = min_images("frechet_distance", num_features)
        if len(features) < minimum:
            raise ValueError(
                f"the Fréchet distance with {num_features} features needs at least {minimum} images, got "
                f"{len(features)} in {features.name}: their covariance would be singular. Use more images, or the "
                "kernel distance, which needs fewer."
            )
        sigma = np.cov(features.values, rowvar=False).reshape(num_features, num_features)
        return cls(features.values.mean(axis=0), sigma, features.extractor, features.name)


def read_statistics(path: str | Path) -> Statistics:
    """Read `mu` and `sigma` from an `.npz` file, such as ADM's reference batches or the statistics of TTUR.

    The file may have the name of the extractor in `extractor`; most have not, and then only the number of features is
    checked.

    Raises:
        `ValueError`: if an array is missing or wrong.
        `OSError`: if there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"statistics {path} do not exist; give an .npz file with mu and sigma.")
    open_npz(path).close()
    with np.load(path, allow_pickle=False) as arrays:
        missing = [key for key in ("mu", "sigma") if key not in arrays]
        if missing:
            raise ValueError(
                f"statistics {path} must have the arrays mu and sigma; {' and '.join(missing)} is missing, it has "
                f"{', '.join(arrays.files) or 'nothing'}."
            )
        try:
            mu, sigma = arrays["mu"], arrays["sigma"]
            extractor = arrays.get("extractor")
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise OSError(f"{path} is truncated or damaged ({error}); make or download it again.") from error
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise ValueError(f"statistics {path}: mu and sigma must be floats, got {mu.dtype} and {sigma.dtype}.")
    if extractor is not None and (extractor.dtype.kind != "U" or extractor.ndim):
        raise ValueError(
            f"statistics {path}: extractor must be text, the name of one extractor, got {extractor.dtype} of shape "
            f"{extractor.shape}."
        )
    name = None if extractor is None else str(extractor)
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), name, str(path))


def check_comparable(first: Features | Statistics, second: Features | Statistics) -> None:
    """
    Raises:
        `ValueError`: if the features are of different numbers, or of extractors with different names.
    """
    sizes = [len(item.mu) if isinstance(item, Statistics) else item.values.shape[1] for item in (first, second)]
    names = [f"{item.name} ({item.extractor or 'extractor not named'})" for item in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"features must come from one extractor, got {sizes[0]} features in {names[0]} and {sizes[1]} in "
            f"{names[1]}."
        )
    if None not in (first.extractor, second.extractor) and first.extractor != second.extractor:
        raise ValueError(f"features must come from one extractor, got {names[0]} and {names[1]}.")


def _check_number(metric: str, *sets: Features, minimum: int = MIN_IMAGES) -> None:
    for features in sets:
        if len(features) < minimum:
            raise ValueError(f"{metric} needs at least {minimum} images, got {len(features)} in {features.name}.")


class _Features(torch.nn.Module):
    """Stands where torchmetrics has its network: what it is given are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _metric(metric_class: Any, num_features: int, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        # That the features are kept in memory: they are there already.
        warnings.filterwarnings("ignore", message=".*save all extracted features")
        return metric_class(feature=_Features(num_features), **arguments)


def frechet_distance(generated: Features | Statistics, reference: Features | Statistics) -> float:
    """The Fréchet distance of two Gaussians, |mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)).

    With the features of Inception it is FID (Heusel et al. 2017). It falls with the number of images, so only
    distances of equal numbers can be compared; FID of papers has 50,000.

    Args:
        generated, reference ([`Features`] or [`Statistics`]): the two sets; the order does not matter.

    Returns:
        `float`: 0 for equal Gaussians; of the size of squared features.

    Raises:
        `ValueError`: if there are too few images (see [`Statistics.of`]), or the features come from two extractors.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_comparable(generated, reference)
    fake, real = (item if isinstance(item, Statistics) else Statistics.of(item) for item in (generated, reference))
    metric = _metric(FrechetInceptionDistance, len(real.mu))
    # The sums from which torchmetrics computes the mean and covariance again. Of two images, which is the least that
    # it takes, since the number of images is not known and cancels out.
    number = 2
    for name, statistics in (("real", real), ("fake", fake)):
        mu, sigma = torch.from_numpy(statistics.mu), torch.from_numpy(statistics.sigma)
        setattr(metric, f"{name}_features_sum", mu * number)
        setattr(metric, f"{name}_features_cov_sum", sigma * (number - 1) + number * torch.outer(mu, mu))
        setattr(metric, f"{name}_features_num_samples", torch.tensor(number))
    metric.orig_dtype = torch.float64
    with warnings.catch_warnings():
        # That `update` was not called: the sums are in place already.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
        return float(metric.compute())


def kernel_distance(
    generated: Features, reference: Features, num_subsets: int = 100, seed: int = 0
) -> dict[str, float]:
    """The squared maximum mean discrepancy with the kernel (x y / d + 1)^3: KID (Binkowski et al. 2018).

    Its expectation does not depend on the number of images.

    Args:
        generated, reference ([`Features`]): the two sets.
        num_subsets (`int`, defaults to 100): over how many random subsets it is averaged. (Chosen: each has half of
            the images of the smaller set, 1,000 at most, so that subsets differ.)
        seed (`int`, defaults to 0): of the subsets.

    Returns:
        `dict[str, float]`: `mean`, around 0 for equal distributions and sometimes below, and `std` over the subsets.

    Raises:
        `ValueError`: if a set has fewer than 100 images, or the features come from two extractors.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_comparable(generated, reference)
    _check_number("the kernel distance", generated, reference)
    subset_size = min(1000, min(len(generated), len(reference)) // 2)
    metric = _metric(KernelInceptionDistance, generated.values.shape[1], subsets=num_subsets, subset_size=subset_size)
    metric.update(torch.from_numpy(reference.values), real=True)
    metric.update(torch.from_numpy(generated.values), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std)}


def inception_score(generated: Features, num_splits: int = NUM_SPLITS, seed: int = 0) -> dict[str, float]:
    """exp(E KL(p(y|x) || p(y))), averaged over random splits (Salimans et al. 2016).

    Args:
        generated ([`Features`]): with `log_probabilities`.
        num_splits (`int`, defaults to 10): 10 splits of 50,000 images are those of ADM's evaluator.
        seed (`int`, defaults to 0): of the splits.

    Returns:
        `dict[str, float]`: `mean`, from 1 to the number of classes, and `std` over the splits.

    Raises:
        `ValueError`: if there are no probabilities, or fewer than 100 images in a split.
    """
    from torchmetrics.image.inception import InceptionScore

    if generated.log_probabilities is None:
        raise ValueError(
            f"the Inception Score needs probabilities of classes, which {generated.extractor} has not computed."
        )
    _check_number(f"the Inception Score with {num_splits} splits", generated, minimum=MIN_IMAGES * num_splits)
    metric = _metric(InceptionScore, generated.log_probabilities.shape[1], splits=num_splits)
    # The softmax of log-probabilities are the probabilities.
    metric.update(torch.from_numpy(generated.log_probabilities))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std) if num_splits > 1 else 0.0}


def precision_recall(generated: Features, reference: Features, nearest_k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Each image has a ball that reaches to its `nearest_k`-th nearest neighbour in its own set.

    - precision: the share of generated images inside the ball of a real one;
    - recall: the share of real images inside the ball of a generated one;
    - density: how many balls of real images a generated one is in, divided by `nearest_k`; it may exceed 1;
    - coverage: the share of real images with a generated one inside their ball.

    Args:
        generated, reference ([`Features`]): the two sets.
        nearest_k (`int`, defaults to 5): as in Naeem et al.; ADM's evaluator has 3.

    Raises:
        `ValueError`: if a set has fewer than 100 images, or no more than `nearest_k`, or the features come from two
            extractors.
    """
    check_comparable(generated, reference)
    if nearest_k < 1:
        raise ValueError(f"nearest_k must be at least 1, got {nearest_k}.")
    _check_number("precision and recall", generated, reference, minimum=min_images("precision_recall", 0, nearest_k))
    fake_radii, real_radii = _radii(generated.values, nearest_k), _radii(reference.values, nearest_k)
    num_balls = []
    is_recalled = np.zeros(len(reference), bool)
    is_covered = np.zeros(len(reference), bool)
    start = 0
    for distances in pairwise_distances_chunked(generated.values, reference.values):
        in_real_ball = distances <= real_radii
        num_balls.append(in_real_ball.sum(axis=1))
        is_covered |= in_real_ball.any(axis=0)
        is_recalled |= (distances <= fake_radii[start : start + len(distances), None]).any(axis=0)
        start += len(distances)
    counts = np.concatenate(num_balls)
    return {
        "precision": float((counts > 0).mean()),
        "recall": float(is_recalled.mean()),
        "density": float(counts.mean() / nearest_k),
        "coverage": float(is_covered.mean()),
    }


def _radii(values: np.ndarray, nearest_k: int) -> np.ndarray:
    """The distance of each row to its `nearest_k`-th nearest other row."""
    neighbours = NearestNeighbors(n_neighbors=nearest_k, algorithm="brute").fit(values)
    return neighbours.kneighbors()[0][:, -1]


def prompt_diversity(features: Features, prompts: Sequence[str]) -> dict[str, float]:
    """How much images of the same prompt differ: the mean distance of their features, averaged over the prompts.

    It has no scale of its own: compare it with that of real images of the same prompts, or of another model.

    Args:
        features ([`Features`]): of the images.
        prompts (`Sequence[str]`): the prompt of each.

    Returns:
        `dict[str, float]`: `mean` and `min` over the prompts with at least two images, and `num_prompts`.

    Raises:
        `ValueError`: if the numbers of images and prompts differ, or no prompt has two images.
    """
    if len(prompts) != len(features):
        raise ValueError(f"prompts must be one for each of {len(features)} images, got {len(prompts)}.")
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    distances = [pdist(features.values[indices]).mean() for indices in rows.values() if len(indices) > 1]
    if not distances:
        raise ValueError(f"diversity within a prompt needs two images of a prompt, and {features.name} has none.")
    return {"mean": float(np.mean(distances)), "min": float(np.min(distances)), "num_prompts": len(distances)}


@dataclass(frozen=True)
class NearestTraining:
    """How close generated images are to training images, against real images that were not trained on.

    Args:
        share_closer (`float`): the probability that a generated image is closer to its nearest training image than a
            held-out one is to its own: 0.5 if both are alike, 1 if all images are copies.
        p_value (`float`): of the one-sided test that they are not closer (Mann-Whitney; Meehan et al. 2020, "A
            Non-Parametric Test to Detect Data-Copying in Generative Models").
        median_generated, median_held_out (`float`): the medians of the distances.
        nearest (`np.ndarray`): (n,), for each generated image the index of its nearest training image.
        distances (`np.ndarray`): (n,), how far that is.
    """

    share_closer: float
    p_value: float
    median_generated: float
    median_held_out: float
    nearest: np.ndarray
    distances: np.ndarray

    def closest(self, number: int = 16) -> list[tuple[int, int, float]]:
        """The generated images that are closest to a training image: their index, that of the training image, the
        distance."""
        order = np.argsort(self.distances, kind="stable")[:number]
        return [(int(i), int(self.nearest[i]), float(self.distances[i])) for i in order]


def nearest_training_images(generated: Features, training: Features, held_out: Features) -> NearestTraining:
    """Are generated images copies of training images?

    A model that only produces typical images is closer to the training images too, so look at the closest pairs before
    calling it memory.

    Args:
        generated, training, held_out ([`Features`]): the generated images, those that the model was trained on, and
            real ones of the same kind that it was not trained on.

    Raises:
        `ValueError`: if a set has fewer than 100 images, or the features come from several extractors.
    """
    for features in (training, held_out):
        check_comparable(generated, features)
    _check_number("the comparison with training images", generated, training, held_out)
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(training.values)
    distances, nearest = (column[:, 0] for column in neighbours.kneighbors(generated.values))
    held_out_distances = neighbours.kneighbors(held_out.values)[0][:, 0]
    test = mannwhitneyu(held_out_distances, distances, alternative="greater")
    return NearestTraining(
        share_closer=float(test.statistic / (len(distances) * len(held_out_distances))),
        p_value=float(test.pvalue),
        median_generated=float(np.median(distances)),
        median_held_out=float(np.median(held_out_distances)),
        nearest=nearest,
        distances=distances,
    )
