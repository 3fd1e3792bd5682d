"""Metrics against closed forms, against the authors' own package, and against loops over all pairs."""

import numpy as np
import pytest
from prdc import compute_prdc
from scipy.linalg import sqrtm

from latte_flow_hf.evaluation.features import Features
from latte_flow_hf.evaluation.image_quality import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_training_images,
    precision_recall,
    prompt_diversity,
    read_statistics,
)


def normal(number, num_features=4, seed=0, shift=0.0, scale=1.0, name="images", extractor="normal"):
    values = shift + scale * np.random.default_rng(seed).normal(size=(number, num_features))
    return Features(values, extractor, name)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """The sum over the axes of (mu - mu')^2 + (s - s')^2."""
    rng = np.random.default_rng(0)
    mu, other_mu = rng.normal(size=(2, 64)) + 3
    std, other_std = rng.uniform(0.01, 2, size=(2, 64))
    expected = ((mu - other_mu) ** 2).sum() + ((std - other_std) ** 2).sum()
    distance = frechet_distance(Statistics(mu, np.diag(std**2)), Statistics(other_mu, np.diag(other_std**2)))
    assert distance == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_any_gaussians_is_that_of_scipys_root():
    """The reference code of TTUR, with covariances that do not commute."""
    one, other = normal(200, 12, seed=1), normal(300, 12, seed=2, shift=0.3)
    mixed = Features(other.values @ np.random.default_rng(3).normal(size=(12, 12)), "normal")
    first, second = Statistics.of(one), Statistics.of(mixed)
    root = sqrtm(first.sigma @ second.sigma).real
    expected = ((first.mu - second.mu) ** 2).sum() + np.trace(first.sigma + second.sigma - 2 * root)
    assert frechet_distance(one, mixed) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(mixed, first) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_too_few_images_for_a_covariance():
    with pytest.raises(ValueError, match="64 features needs at least 65 images, got 64 in photos"):
        frechet_distance(normal(64, 64, name="photos"), normal(100, 64))
    assert frechet_distance(normal(65, 64), normal(100, 64, seed=1)) > 0


def kernel(x, y):
    return (x @ y / len(x) + 1) ** 3


def test_kernel_distance_is_the_unbiased_estimate():
    """Over all images at once, in loops; the mean over subsets has the same expectation."""
    generated, reference = normal(100, seed=1, shift=0.4), normal(100, seed=2)
    n = 100
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = [
        sum(kernel(values[i], values[j]) for i, j in pairs if i != j) / (n * (n - 1))
        for values in (generated.values, reference.values)
    ]
    across = sum(kernel(generated.values[i], reference.values[j]) for i, j in pairs) / n**2
    expected = sum(within) - 2 * across
    result = kernel_distance(generated, reference, num_subsets=400)
    assert result["mean"] == pytest.approx(expected, abs=4 * result["std"] / 400**0.5)
    assert result["mean"] > 4 * result["std"] / 400**0.5
    assert result == kernel_distance(generated, reference, num_subsets=400), "the same seed, the same subsets"
    assert result != kernel_distance(generated, reference, num_subsets=400, seed=1)
    same = kernel_distance(normal(400, seed=3), normal(400, seed=4))
    assert abs(same["mean"]) < 2 * same["std"]


@pytest.mark.parametrize("nearest_k", [3, 5])
@pytest.mark.parametrize(("numbers", "shift", "scale"), [((150, 120), 0.0, 1.0), ((110, 300), 1.0, 0.5)])
def test_precision_recall_density_and_coverage_are_the_authors(nearest_k, numbers, shift, scale, capsys):
    generated = normal(numbers[0], seed=1, shift=shift, scale=scale)
    reference = normal(numbers[1], seed=2)
    expected = compute_prdc(reference.values, generated.values, nearest_k)
    assert precision_recall(generated, reference, nearest_k) == pytest.approx(expected)


def test_precision_and_recall_tell_poor_images_from_few_kinds():
    reference = normal(300, seed=1)
    few_kinds = precision_recall(normal(300, seed=2, scale=0.2), reference)
    assert few_kinds["precision"] > 0.95 and few_kinds["recall"] < 0.2
    poor = precision_recall(normal(300, seed=2, scale=3), reference)
    assert poor["precision"] < 0.4 and poor["recall"] > 0.8


def test_precision_in_chunks(monkeypatch):
    import sklearn

    generated, reference = normal(250, seed=1, shift=0.3), normal(300, seed=2)
    whole = precision_recall(generated, reference)
    # Megabytes: 300 distances of 8 bytes are a row.
    with sklearn.config_context(working_memory=0.03):
        assert precision_recall(generated, reference) == whole


def test_inception_score_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(7, 0.3), size=1000)
    features = Features(np.zeros((1000, 1)), "any", log_probabilities=np.log(probabilities))
    marginal = probabilities.mean(axis=0)
    expected = np.exp((probabilities * np.log(probabilities / marginal)).sum(axis=1).mean())
    assert inception_score(features, num_splits=1)["mean"] == pytest.approx(expected, rel=1e-9)
    ten = inception_score(features)
    assert ten["mean"] == pytest.approx(expected, rel=0.1) and ten["std"] > 0
    assert ten == inception_score(features)


def test_inception_score_of_certain_balanced_classes_is_their_number():
    probabilities = np.where(np.eye(5, dtype=bool)[np.arange(1000) % 5], 1 - 4e-12, 1e-12)
    features = Features(np.zeros((1000, 1)), "any", log_probabilities=np.log(probabilities))
    assert inception_score(features, num_splits=1)["mean"] == pytest.approx(5, rel=1e-6)


def test_diversity_is_the_mean_over_prompts():
    values = np.array([[0.0, 0], [3, 4], [0, 0], [9, 9], [0, 6], [100, 100]])
    features = Features(values, "any")
    # a: one pair, 5 apart. b: three images at 9 * 2 ** 0.5, 6, and (81 + 9) ** 0.5.
    of_b = (162**0.5 + 6 + 90**0.5) / 3
    result = prompt_diversity(features, ["a", "a", "b", "b", "b", "c"])
    assert result == pytest.approx({"mean": (5 + of_b) / 2, "min": 5, "num_prompts": 2})
    with pytest.raises(ValueError, match="two images of a prompt, and images has none"):
        prompt_diversity(features, list("abcdef"))
    with pytest.raises(ValueError, match="one for each of 6 images, got 2"):
        prompt_diversity(features, ["a", "a"])


def test_copies_are_told_from_new_images():
    training, held_out = normal(200, seed=1), normal(150, seed=2)
    new = nearest_training_images(normal(150, seed=3), training, held_out)
    assert 0.4 < new.share_closer < 0.6 and new.p_value > 0.01
    # The first 50 are training images with a little noise.
    values = normal(150, seed=3).values
    order = np.random.default_rng(4).permutation(200)[:50]
    values[:50] = training.values[order] + 1e-3
    mixed = nearest_training_images(Features(values, "normal"), training, held_out)
    assert mixed.share_closer > new.share_closer + 0.1 and mixed.p_value < 1e-3
    closest = mixed.closest(50)
    assert {(i, j) for i, j, _ in closest} == set(enumerate(order))
    assert all(distance == pytest.approx(2e-3) for _, _, distance in closest)
    all_copies = nearest_training_images(Features(training.values[:100], "normal"), training, held_out)
    assert all_copies.share_closer == 1 and all_copies.median_generated == pytest.approx(0, abs=1e-6)
    distances = np.linalg.norm(held_out.values[:, None] - training.values, axis=-1).min(axis=1)
    assert new.median_held_out == pytest.approx(np.median(distances))


def test_few_images_are_refused():
    few, many = normal(99, name="few"), normal(1000)
    for call in (
        lambda: kernel_distance(few, many),
        lambda: kernel_distance(many, few),
        lambda: precision_recall(few, many),
        lambda: nearest_training_images(many, few, many),
        lambda: nearest_training_images(many, many, few),
    ):
        with pytest.raises(ValueError, match="needs at least 100 images, got 99 in few"):
            call()
    with pytest.raises(ValueError, match="needs at least 201 images"):
        precision_recall(normal(200), many, nearest_k=200)
    with pytest.raises(ValueError, match="nearest_k must be at least 1"):
        precision_recall(many, many, nearest_k=0)
    classes = Features(np.zeros((999, 1)), "any", log_probabilities=np.zeros((999, 2)))
    with pytest.raises(ValueError, match="10 splits needs at least 1000 images, got 999"):
        inception_score(classes)
    with pytest.raises(ValueError, match="needs probabilities of classes, which normal has not computed"):
        inception_score(many)


def test_features_of_two_extractors_are_not_compared():
    one, other = normal(200, extractor="one", name="a"), normal(200, extractor="other", name="b")
    calls = (frechet_distance, kernel_distance, precision_recall)
    for call in (*calls, lambda first, second: nearest_training_images(first, first, second)):
        with pytest.raises(ValueError, match=r"one extractor, got a \(one\) and b \(other\)"):
            call(one, other)
        with pytest.raises(ValueError, match=r"4 features in a .* and 5 in b"):
            call(one, normal(200, 5, name="b"))
    # A reference that does not name its extractor.
    mu = np.zeros(4)
    assert frechet_distance(one, Statistics(mu, np.eye(4))) > 0
    with pytest.raises(ValueError, match=r"4 features in a .* and 64 in reference .extractor not named"):
        frechet_distance(one, Statistics(np.zeros(64), np.eye(64), name="reference"))


def test_reference_statistics_are_read(tmp_path):
    path = tmp_path / "reference.npz"
    expected = Statistics.of(normal(200))
    np.savez(path, mu=expected.mu.astype(np.float32), sigma=expected.sigma, mu_s=np.zeros(3), arr_0=np.zeros(2))
    statistics = read_statistics(path)
    assert statistics.extractor is None and statistics.mu.dtype == np.float64
    np.testing.assert_allclose(statistics.sigma, expected.sigma)
    np.savez(path, mu=expected.mu, sigma=expected.sigma, extractor="inception-1")
    assert read_statistics(path).extractor == "inception-1"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, "sigma is missing, it has mu"),
        ({"arr_0": np.zeros(4)}, "mu and sigma is missing, it has arr_0"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"got \(4,\) and \(5, 5\)"),
        ({"mu": np.zeros((1, 4)), "sigma": np.eye(4)}, r"got \(1, 4\)"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "NaN"),
        ({"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))}, "must be a covariance"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "must be a covariance"),
        ({"mu": np.array(list("abcd")), "sigma": np.eye(4)}, "must be floats, got <U1"),
        # Three variables cannot have a correlation of -0.9 with each other.
        ({"mu": np.zeros(3), "sigma": np.eye(3) * 1.9 - 0.9}, "without negative eigenvalues, got -0.8 beside 1.9"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "have no features"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "extractor": ["a", "b"]}, r"one extractor, got <U1 of shape \(2,\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "extractor": b"a"}, "extractor must be text"),
    ],
)
def test_wrong_statistics_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / "reference.npz")


def test_missing_and_damaged_statistics_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(FileNotFoundError, match=r"reference.npz do not exist"):
        read_statistics(path)
    path.write_bytes(b"PK, but no archive")
    with pytest.raises(OSError, match=r"truncated, or no .npz"):
        read_statistics(path)
    # Of a file with one wrong bit, the archive alone knows it.
    np.savez(path, mu=np.arange(4.0), sigma=np.eye(4))
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(4.0).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"reference.npz is truncated or damaged \(Bad CRC"):
        read_statistics(path)


def test_a_covariance_in_float32_and_a_singular_one_are_taken(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 40)) @ rng.normal(size=(40, 60)) * 10.0 ** rng.uniform(-3, 1, 60)
    sigma = np.cov(values, rowvar=False)
    np.savez(tmp_path / "reference.npz", mu=values.mean(axis=0), sigma=sigma.astype(np.float32))
    assert np.linalg.matrix_rank(sigma) == 40 and len(read_statistics(tmp_path / "reference.npz").mu) == 60
