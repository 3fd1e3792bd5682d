"""A comparison gives what its metrics give alone, and is refused before features are computed."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf.evaluation.comparison import (
    check_comparison,
    compare_images,
    describe_comparison,
    open_reference,
    read_prompts_of,
)
from latte_flow_hf.evaluation.features import extract_features, load_extractor
from latte_flow_hf.evaluation.image_quality import (
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
    prompt_diversity,
)
from latte_flow_hf.evaluation.image_sets import open_images, write_npz
from latte_flow_hf.pipelines.batch_generation import generate_images
from latte_flow_hf.tinyworld.datasets import TinyWorldImages
from latte_flow_hf.tinyworld.shapes import COLOURS, SHAPES


NUMBER = 140


def draw(seed, **arguments):
    items = TinyWorldImages(seed, NUMBER, **arguments)
    return np.stack([np.asarray(items[index]["image"]) for index in range(NUMBER)])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Generated and real images and those of the training, as files; the first 20 generated are of the training."""
    folder = tmp_path_factory.mktemp("sets")
    training, real, generated = draw(1), draw(2), draw(3)
    generated[:20] = training[100:120]
    for name, images in (("real", real), ("generated", generated)):
        write_npz(folder / f"{name}.npz", [images], NUMBER)
    (folder / "training").mkdir()
    for index, image in enumerate(training):
        Image.fromarray(image).save(folder / "training" / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def extractor():
    return load_extractor()


@pytest.fixture(scope="module")
def generated(sets, extractor):
    return extract_features(extractor, sets / "generated.npz")


@pytest.fixture(scope="module")
def real(sets, extractor):
    return extract_features(extractor, sets / "real.npz")


def test_all_metrics_at_once_are_those_alone(sets, extractor, generated, real):
    reference = open_reference(sets / "real.npz")
    scenes = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    prompts = [scenes[index % len(scenes)] for index in range(NUMBER)]
    results = compare_images(
        sets / "generated.npz", reference, extractor, prompts=prompts, training=sets / "training", nearest_k=3
    )
    assert results["frechet_distance"] == frechet_distance(generated, real)
    assert results["kernel_distance"] == kernel_distance(generated, real)
    assert results["precision_recall"] == precision_recall(generated, real, 3)
    assert results["prompt_diversity"] == prompt_diversity(generated, prompts)
    assert (results["num_generated"], results["num_reference"]) == (NUMBER, NUMBER)
    copies = results["nearest_training"]["closest"][:16]
    assert all(item["distance"] < 1e-3 and item["generated"] < 20 for item in copies)
    assert {f"{item['generated'] + 100:03d}.png" for item in copies} == {
        item["training"].rsplit("/", 1)[-1] for item in copies
    }
    assert "inception_score" not in results
    lines = "\n".join(describe_comparison(results))
    assert f"{results['frechet_distance']:.4f}" in lines and "nearest training" in lines


def test_a_reference_of_statistics_alone_has_the_frechet_distance_alone(sets, extractor, generated, real, tmp_path):
    statistics = Statistics.of(real)
    np.savez(tmp_path / "reference.npz", mu=statistics.mu, sigma=statistics.sigma)
    reference = open_reference(tmp_path / "reference.npz")
    results = compare_images(sets / "generated.npz", reference, extractor)
    assert results["frechet_distance"] == pytest.approx(frechet_distance(generated, real))
    assert results.keys() == {
        "extractor",
        "num_generated",
        "num_reference",
        "nearest_k",
        "frechet_distance",
    }
    with pytest.raises(ValueError, match=r"kernel_distance needs images in .*reference.npz"):
        compare_images(sets / "generated.npz", reference, extractor, ["kernel_distance"])


def test_statistics_of_another_extractor_are_refused(extractor, tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"128 features in generated .* and 64 in .*reference.npz"):
        check_comparison(50_000, 64, 64, open_reference(path), extractor, ["frechet_distance"])
    np.savez(path, mu=np.zeros(128), sigma=np.eye(128), extractor="tinyworld-of-another-version")
    with pytest.raises(ValueError, match="tinyworld-of-another-version"):
        check_comparison(50_000, 64, 64, open_reference(path), extractor, ["frechet_distance"])


@pytest.mark.parametrize(
    ("number", "size", "metrics", "message"),
    [
        (
            128,
            64,
            ["frechet_distance"],
            "frechet_distance needs at least 129 images with 128 features, got 128 in gen",
        ),
        (99, 64, ["kernel_distance"], "kernel_distance needs at least 100 images with 128 features, got 99 in gen"),
        (99, 64, ["precision_recall"], "precision_recall needs at least 100"),
        (200, 32, ["kernel_distance"], r"generated has 32x32 pixels, .*real.npz has 64x64"),
        (200, 64, ["inception_score"], "needs an extractor with classes, which tinyworld-.* is not"),
        (200, 64, ["nearest_training"], "nearest_training needs training images"),
        (200, 64, ["fid"], "metric must be one of frechet_distance, .*, got 'fid'"),
    ],
)
def test_what_cannot_be_computed_is_refused(sets, extractor, number, size, metrics, message):
    with pytest.raises(ValueError, match=message):
        check_comparison(number, size, size, open_reference(sets / "real.npz"), extractor, metrics)


def test_images_are_not_compared_with_themselves_or_another_world(sets, extractor):
    for arguments in ({"generated": sets / "real.npz"}, {"generated": sets / "generated.npz", "training": "real"}):
        if "training" in arguments:
            arguments["training"] = sets / "real.npz"
        with pytest.raises(ValueError, match=r"images must be others than the .*real.npz"):
            compare_images(reference=open_reference(sets / "real.npz"), extractor=extractor, **arguments)
    reference = open_reference(sets / "real.npz")
    with pytest.raises(ValueError, match="only knows its images, and prompts have words of another one"):
        compare_images(sets / "generated.npz", reference, extractor, prompts=["a dog"] * NUMBER)
    with pytest.raises(ValueError, match="prompt_diversity needs the prompt of each image"):
        compare_images(sets / "generated.npz", reference, extractor, ["prompt_diversity"])


def test_the_command_prints_and_writes_the_comparison(sets, generated, real, tmp_path):
    arguments = ["evaluate", "images", str(sets / "generated.npz"), str(sets / "real.npz")]
    output = ["--metric", "frechet_distance", "--metric", "precision_recall", "--nearest-k", "3"]
    result = CliRunner().invoke(app, [*arguments, *output, "-o", str(tmp_path / "out.json"), "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert results["frechet_distance"] == frechet_distance(generated, real)
    assert results["precision_recall"] == precision_recall(generated, real, 3) and "kernel_distance" not in results
    for given, message in (
        (["--extractor", "inception"], "Nothing is downloaded: get inception-2015-12-05.pt from"),
        (["--metric", "inception_score"], "inception_score needs an extractor with classes"),
        (["-o", "out.txt"], "output must be a .json file"),
    ):
        result = CliRunner().invoke(app, [*arguments, *given])
        assert result.exit_code and message in result.stderr


def test_an_unusable_reference_is_refused(tmp_path):
    np.savez(tmp_path / "empty.npz", labels=np.zeros(3))
    with pytest.raises(ValueError, match="must have the arrays mu and sigma, or the images arr_0, got labels"):
        open_reference(tmp_path / "empty.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3), arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="sigma is missing"):
        open_reference(tmp_path / "half.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(OSError, match=r"truncated, or no .npz"):
        open_reference(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz do not exist"):
        open_reference(tmp_path / "nowhere.npz")


def test_prompts_are_read_from_generated_files(pipe, tmp_path):
    generate_images(pipe, ["a red circle", "a blue square"], tmp_path, num_images_per_prompt=2, num_inference_steps=1)
    assert read_prompts_of(open_images(tmp_path)) == ["a red circle"] * 2 + ["a blue square"] * 2
    size = open_images(tmp_path).width
    Image.new("RGB", (size, size)).save(tmp_path / "other.png")
    assert read_prompts_of(open_images(tmp_path)) is None
    assert read_prompts_of(open_images(np.zeros((2, 8, 8, 3), np.uint8))) is None


def test_the_same_files_are_noticed_under_any_path(sets, extractor, tmp_path):
    (tmp_path / "link").symlink_to(sets / "training")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "first.png").symlink_to(sets / "training" / "000.png")
    for first, second, number in (
        (tmp_path / "link", sets / "training" / ".." / "training", NUMBER),
        (sets / "training", tmp_path / "part", 1),
        (sets / "real.npz", sets / "training" / ".." / "real.npz", 1),
    ):
        with pytest.raises(ValueError, match=f"reference images must be others than the generated .* {number} files"):
            compare_images(first, open_reference(second), extractor)
    with pytest.raises(ValueError, match="training images must be others than the generated ones"):
        compare_images(sets / "training", open_reference(sets / "real.npz"), extractor, training=tmp_path / "link")
    # Arrays have no files.
    arrays = [draw(4), draw(5)]
    found = compare_images(arrays[0], open_reference(sets / "real.npz"), extractor, None, training=arrays[1])
    assert "nearest_training" in found


def test_images_of_different_prompts_have_no_diversity_within_one(sets, extractor, monkeypatch):
    reference = open_reference(sets / "real.npz")
    prompts = [f"a {a} {b} left of a {c} {d}" for a in COLOURS for b in SHAPES for c in COLOURS for d in SHAPES]
    results = compare_images(sets / "generated.npz", reference, extractor, prompts=prompts[:NUMBER])
    assert "prompt_diversity" not in results and "kernel_distance" in results
    monkeypatch.setattr(type(extractor), "features", None)
    with pytest.raises(ValueError, match="prompt_diversity needs two images of a prompt"):
        compare_images(sets / "generated.npz", reference, extractor, ["prompt_diversity"], prompts[:NUMBER])
