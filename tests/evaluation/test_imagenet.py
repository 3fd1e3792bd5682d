"""Class-balanced samples are resumed, are the same from any number of processes, and are read by ADM's evaluator."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.evaluation import imagenet
from latte_flow_hf.evaluation.comparison import open_reference
from latte_flow_hf.evaluation.features import extract_features, load_extractor
from latte_flow_hf.evaluation.image_quality import Statistics, frechet_distance, precision_recall
from latte_flow_hf.evaluation.image_sets import write_npz
from latte_flow_hf.evaluation.imagenet import class_prompts, generate_class_samples, read_class_names
from latte_flow_hf.folder_lock import lock_folder
from latte_flow_hf.tinyworld.datasets import TinyWorldImages


PROMPTS = ["a red circle", "a blue square left of a green cross", "a handwritten three"]
CALL = {"num_inference_steps": 1, "guidance_scale": 2.0}
# Eight batches of 2 and one of 1, in shards of 4.
SIZES = {"num_samples": 15, "batch_size": 2, "shard_size": 4}


def arrays_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def counted(pipe, monkeypatch):
    """The pipeline, and the number of images of its calls. Its call fails once after `stop_after` images."""
    call = type(pipe).__call__
    pipe.made, pipe.stop_after = 0, None

    def counting(self, prompt, **kwargs):
        if self.stop_after is not None and self.made + len(prompt) > self.stop_after:
            raise KeyboardInterrupt
        self.made += len(prompt)
        return call(self, prompt, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counting)
    return pipe


def test_images_are_balanced_and_each_is_that_of_its_seed(pipe, tmp_path):
    path = generate_class_samples(pipe, PROMPTS, tmp_path, seed=7, **SIZES, **CALL)
    images, labels = arrays_of(path)
    size = pipe.default_size
    assert path.name == f"samples_15x{size}x{size}x3.npz" and images.shape == (15, size, size, 3)
    assert images.dtype == np.uint8 and labels.tolist() == [0, 1, 2] * 5
    for j in (0, 4, 14):
        alone = pipe(PROMPTS[j % 3], generator=torch.Generator().manual_seed(7 + j), **CALL).images[0]
        # In a batch up to rounding.
        assert np.abs(np.asarray(alone).astype(int) - images[j]).max() <= 1
    assert len(np.unique(images.reshape(15, -1), axis=0)) == 15


def test_the_size_of_shards_does_not_change_a_byte(pipe, tmp_path):
    one = generate_class_samples(pipe, PROMPTS, tmp_path / "one", **{**SIZES, "shard_size": 16}, **CALL)
    other = generate_class_samples(pipe, PROMPTS, tmp_path / "other", **{**SIZES, "shard_size": 2}, **CALL)
    assert one.read_bytes() == other.read_bytes()
    assert names_of(tmp_path / "one") == [one.name, "settings.json", "shards/00000.npy"]
    # Fewer samples are the first ones of more.
    fewer = generate_class_samples(pipe, PROMPTS, tmp_path / "fewer", **{**SIZES, "num_samples": 6}, **CALL)
    assert (arrays_of(fewer)[0] == arrays_of(one)[0][:6]).all()


def test_a_stopped_run_goes_on_where_it_was(counted, tmp_path):
    counted.stop_after = 11
    with pytest.raises(KeyboardInterrupt):
        generate_class_samples(counted, PROMPTS, tmp_path / "out", **SIZES, **CALL)
    assert counted.made == 10
    # The third shard is unfinished: it is made again.
    assert names_of(tmp_path / "out") == ["settings.json", "shards/00000.npy", "shards/00001.npy"]
    before = (tmp_path / "out" / "shards" / "00001.npy").stat().st_mtime_ns
    # What a killed process leaves of a shard that it was writing.
    (tmp_path / "out" / "shards" / ".00002.npy.0").mkdir()
    (tmp_path / "out" / "shards" / ".00002.npy.0" / "00002.npy").write_bytes(b"half")
    counted.made, counted.stop_after = 0, None
    path = generate_class_samples(counted, PROMPTS, tmp_path / "out", **SIZES, **CALL)
    assert counted.made == 7 and not list((tmp_path / "out" / "shards").glob(".*"))
    assert (tmp_path / "out" / "shards" / "00001.npy").stat().st_mtime_ns == before
    assert generate_class_samples(counted, PROMPTS, tmp_path / "out", **SIZES, **CALL) == path
    assert counted.made == 7, "all is there"
    whole = generate_class_samples(counted, PROMPTS, tmp_path / "whole", **SIZES, **CALL)
    assert path.read_bytes() == whole.read_bytes()


def test_a_damaged_shard_is_made_again(counted, tmp_path, caplog):
    path = generate_class_samples(counted, PROMPTS, tmp_path, **SIZES, **CALL)
    expected = path.read_bytes()
    path.unlink()
    shard = tmp_path / "shards" / "00002.npy"
    shard.write_bytes(shard.read_bytes()[:-5])
    np.save(tmp_path / "shards" / "00003.npy", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "shards" / "00001.npy").write_bytes(expected)
    counted.made = 0
    with caplog.at_level(logging.WARNING, logger=imagenet.__name__):
        assert generate_class_samples(counted, PROMPTS, tmp_path, **SIZES, **CALL).read_bytes() == expected
    assert counted.made == 4 + 4 + 3 and "00001.npy is an .npz file" in caplog.text
    assert "00002.npy is damaged" in caplog.text and "00003.npy is damaged" in caplog.text


def test_samples_of_other_settings_are_refused(own_pipe, tmp_path):
    generate_class_samples(own_pipe, PROMPTS, tmp_path, **SIZES, **CALL)
    expected = {path: path.read_bytes() for path in tmp_path.rglob("*.np?")}
    for arguments, message in (
        ({"seed": 1}, r"\(seed 0 -> 1\)"),
        ({"num_samples": 12}, "num_samples 15 -> 12"),
        ({"num_inference_steps": 2}, r"\(num_inference_steps\)"),
        ({"prompts": PROMPTS[::-1]}, r"\(the classes\)"),
        ({"batch_size": 4}, "batch_size 2 -> 4"),
    ):
        with pytest.raises(ValueError, match=f"samples of other settings .*{message}.* 4 finished shards are kept"):
            generate_class_samples(own_pipe, **{"prompts": PROMPTS, "folder": tmp_path, **SIZES, **CALL, **arguments})
    own_pipe.scheduler = LatteFlowScheduler.from_config(own_pipe.scheduler.config, stochastic_sampling=1.0)
    with pytest.raises(ValueError, match="the scheduler of the pipeline"):
        generate_class_samples(own_pipe, PROMPTS, tmp_path, **SIZES, **CALL)
    with torch.no_grad():
        next(own_pipe.model.tower.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="the model of the pipeline, the scheduler of the pipeline"):
        generate_class_samples(own_pipe, PROMPTS, tmp_path, **SIZES, **CALL)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.np?")} == expected
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has samples, but not their settings.json"):
        generate_class_samples(own_pipe, PROMPTS, tmp_path, **SIZES, **CALL)


def test_settings_that_the_pipeline_refused_do_not_bind_the_folder(pipe, tmp_path):
    for wrong, words in (({"height": 30}, "height"), ({"num_inference_steps": 0}, "num_inference_steps")):
        with pytest.raises(ValueError, match=words):
            generate_class_samples(pipe, PROMPTS, tmp_path, **SIZES, **{**CALL, **wrong})
    assert generate_class_samples(pipe, PROMPTS, tmp_path, **SIZES, **CALL).exists()


def test_one_run_at_a_time_writes_in_a_folder(counted, tmp_path):
    scratch = tmp_path / "out" / "shards" / ".00000.npy.0"
    with lock_folder(tmp_path / "out"):
        scratch.mkdir(parents=True)
        with pytest.raises(OSError, match=rf"out is in use by process {os.getpid()} on "):
            generate_class_samples(counted, PROMPTS, tmp_path / "out", **SIZES, **CALL)
        assert scratch.exists()
    generate_class_samples(counted, PROMPTS, tmp_path / "out", **SIZES, **CALL)
    assert not scratch.exists() and not (tmp_path / "out" / "lock").exists()


def test_finished_shards_are_kept_when_the_disk_is_full(counted, tmp_path, monkeypatch):
    save, size = np.save, counted.default_size
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(np, "save", lambda path, images: save(full if "00002" in str(path) else path, images))
        with pytest.raises(OSError, match=r"00002.npy cannot be written \(No space left"):
            generate_class_samples(counted, PROMPTS, tmp_path, **SIZES, **CALL)
    monkeypatch.undo()
    assert names_of(tmp_path) == ["settings.json", "shards/00000.npy", "shards/00001.npy"]
    path = generate_class_samples(counted, PROMPTS, tmp_path, **SIZES, **CALL)
    assert arrays_of(path)[0].shape == (15, size, size, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 16}, "multiple of the 3 classes, such as 15 or 18, got 16"),
        ({"num_samples": 2}, "such as 3 or 3, got 2"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"shard_size": 5}, "shard_size must be a multiple of batch_size, 2, got 5"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prompts": []}, "prompts must have one for each class"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(pipe, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_class_samples(pipe, **{"prompts": PROMPTS, "folder": tmp_path / "out", **SIZES, **arguments})
    assert not (tmp_path / "out").exists()


def test_class_names_are_those_of_the_training(tmp_path, caplog):
    path = tmp_path / "classes.txt"
    path.write_text("﻿tench, Tinca tinca\ncrane\n crane \n\n", encoding="utf-8")
    names = read_class_names(path)
    assert names == ["tench, Tinca tinca", "crane", "crane"]
    with caplog.at_level(logging.WARNING, logger=imagenet.__name__):
        assert class_prompts(names, prompt="a photo of {}")[1] == "a photo of crane"
    assert "same name, and so the same kind of images: crane" in caplog.text
    assert class_prompts(None, trained_names=["a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="label 1 is 'crane' there, and 'heron' here"):
        class_prompts(["tench", "heron"], trained_names=["tench", "crane"])
    with pytest.raises(ValueError, match="must be the 3 of the training, got 2"):
        class_prompts(["a", "b"], trained_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"2 words that the model never learned \(goldfish, volcano\)"):
        class_prompts(["a red circle", "goldfish", "volcano"], trained_words=["a", "red", "circle"])
    assert class_prompts(["a {b}"], prompt="{{}} of {}") == ["{} of a {b}"]
    for prompt in ("a photo", "{name}", "{", "{} {}", "{{}}", "{.real}", "{0} {}", "{[0]}"):
        with pytest.raises(ValueError, match=r"prompt must have one {} for the name"):
            class_prompts(names, prompt=prompt)
    with pytest.raises(ValueError, match="at least one name"):
        class_prompts(None)


def test_unusable_files_of_classes_are_refused(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="line 2 is empty; line n has the name of label n - 1"):
        read_class_names(path)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty; write the name"):
        read_class_names(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text file in UTF-8"):
        read_class_names(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """ADM's reference batch of the tiny world: statistics of 150 images, and 120 of them."""
    items = TinyWorldImages(5, 150)
    images = np.stack([np.asarray(items[index]["image"]) for index in range(150)])
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    statistics = Statistics.of(extract_features(load_extractor(), images))
    write_npz(path, [images[:120]], 120, mu=statistics.mu, sigma=statistics.sigma)
    return path


def test_samples_are_evaluated_against_a_reference_batch(real, tmp_path):
    """The command, from classes to the metrics, on the embedded checkpoint."""
    (tmp_path / "classes.txt").write_text("a red circle\na white cross\na handwritten seven\n")
    arguments = ["evaluate", "imagenet", "--classes", str(tmp_path / "classes.txt"), "-o", str(tmp_path / "out")]
    arguments += ["--reference", str(real), "--extractor", "tinyworld", "--steps", "1", "--guidance", "1", "--json"]
    for number, message in (
        ("126", "frechet_distance needs at least 129 images"),
        ("130", "multiple of the 3 classes"),
    ):
        result = CliRunner().invoke(app, [*arguments, "--num-samples", number])
        assert result.exit_code == 1 and message in result.stderr and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*arguments, "--num-samples", "132"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    samples = extract_features(load_extractor(), results["samples"])
    whole, part = open_reference(real).statistics, extract_features(load_extractor(), real)
    assert results["frechet_distance"] == frechet_distance(samples, whole)
    assert results["precision_recall"] == precision_recall(samples, part, nearest_k=3)
    assert (results["num_generated"], results["num_reference"]) == (132, 120)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == {name: value for name, value in results.items() if name != "samples"}
    # Not the words of this world.
    (tmp_path / "classes.txt").write_text("goldfish\nvolcano\n")
    result = CliRunner().invoke(app, [*arguments, "--num-samples", "132"])
    assert result.exit_code == 1 and "never learned (goldfish, volcano)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the names of the classes by --classes, --recipe, or both"),
        (["--classes", "{tmp}/classes.txt", "--reference", "{tmp}/nowhere.npz"], "--reference and --extractor"),
        (
            ["--classes", "{tmp}/classes.txt", "--reference", "{tmp}/nowhere.npz", "--extractor", "inception"],
            "nowhere.npz do not exist",
        ),
        (["--classes", "{tmp}/nowhere.txt"], "nowhere.txt"),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(arguments, message, tmp_path):
    (tmp_path / "classes.txt").write_text("a red circle\n")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = CliRunner().invoke(app, ["evaluate", "imagenet", "-o", str(tmp_path / "out"), "-m", "none", *arguments])
    assert result.exit_code and message in result.stderr and not (tmp_path / "out").exists()


CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"


def start(pipeline, folder, *arguments) -> subprocess.Popen:
    """Two processes, as a user starts them."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "2"]
    command = ["--main_process_port", "0", "-m", "latte_flow_hf.cli", "evaluate", "imagenet", "-m", pipeline]
    sizes = ["--num-samples", "300", "--batch-size", "2", "--shard-size", "4", "--steps", "1", "--guidance", "2"]
    return subprocess.Popen(
        [sys.executable, *launch, *command, "-o", str(folder), *sizes, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_killed_and_started_again_have_the_bytes_of_one(pipeline, pipe, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(PROMPTS))
    classes = ["--classes", str(tmp_path / "classes.txt")]
    process = start(pipeline, tmp_path / "two", *classes)
    shards = tmp_path / "two" / "shards"
    deadline = time.monotonic() + 300
    while len(list(shards.glob("*.npy"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    output = process.communicate()[0]
    kept = {path.name: path.read_bytes() for path in shards.glob("*.npy")}
    assert 3 <= len(kept) < 75 and not list((tmp_path / "two").glob("samples*")), output
    process = start(pipeline, tmp_path / "two", *classes)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert {name: (shards / name).read_bytes() for name in kept} == kept
    (two,) = (tmp_path / "two").glob("samples*.npz")
    sizes = {"num_samples": 300, "batch_size": 2, "shard_size": 12}
    with torch.inference_mode():
        one = generate_class_samples(pipe, PROMPTS, tmp_path / "one", device="cpu", **sizes, **CALL)
    assert two.read_bytes() == one.read_bytes()
