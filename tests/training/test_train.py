"""Recipes end to end on a small random pipeline: what they refuse, what they leave, and going on after a stop."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.cli import app
from latte_flow_hf.training import last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.train import Recipe, is_recipe, read_sections, train


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def pipeline(model, processor, vae, tmp_path_factory) -> str:
    """A random pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipeline") / "random"
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve captioned pictures of several sizes; number 5 is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        shape = (40 + 4 * number, 70, 3)
        path = folder / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        lines.append(json.dumps({"file_name": path.name, "text": f"a red circle number {number % 5}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:900])
    return folder


@pytest.fixture
def sections(pipeline, pictures, tmp_path):
    """A recipe of three steps over the pictures; `merge` changes it."""

    def make(**merge) -> dict:
        made = {
            "model": {"pipeline": pipeline},
            "data": {
                "source": {"path": "imagefolder", "data_dir": str(pictures), "cache_dir": str(tmp_path / "datasets")},
                "caption": "text",
                "size": 32,
                "flip": True,
            },
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "logging_steps": 2,
                "save_steps": 2,
                "disable_tqdm": True,
            },
            "ema": {"decay": 0.9},
        }
        for name, value in merge.items():
            made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
        return made

    return make


def run(sections: dict, work_dir: Path, name: str = "out") -> LatteFlowPipeline:
    return LatteFlowPipeline.from_pretrained(train(Recipe.from_dict(sections), work_dir / "work", work_dir / name))


def tower(pipe: LatteFlowPipeline) -> str:
    return hash_module(pipe.model.tower)


def log(work_dir: Path) -> list[dict]:
    folder = last_checkpoint(work_dir / "work" / "checkpoints")
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_from_the_cache_equals_without_it(sections, tmp_path, caplog):
    plain = run(sections(), tmp_path / "plain")
    cached = sections(data={"cache": str(tmp_path / "cache")}, training={"dataloader_num_workers": 0})
    first = run(cached, tmp_path / "first")
    assert tower(first) == tower(plain)
    assert "05.png cannot be read" in caplog.text
    losses = [entry for entry in log(tmp_path / "plain") if "expert_0_loss" in entry]
    assert losses == [entry for entry in log(tmp_path / "first") if "expert_0_loss" in entry]
    total = [entry["loss"] for entry in log(tmp_path / "plain") if "loss" in entry]
    assert total == pytest.approx([entry["expert_0_loss"] + entry["expert_1_loss"] for entry in losses], rel=1e-4)

    # A second run computes nothing anew; a shard that went missing is made again, the others stay.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert tower(run(cached, tmp_path / "second")) == tower(plain)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_the_backbone_keeps_its_bytes_and_the_experts_learn(sections, pipeline, tmp_path):
    pipe, before = run(sections(), tmp_path), LatteFlowPipeline.from_pretrained(pipeline)
    assert hash_module(pipe.model.vlm) == hash_module(before.model.vlm)
    assert tower(pipe) != tower(before)


def test_a_killed_run_ends_in_the_bytes_of_one_never_stopped(sections, tmp_path):
    """Killed from outside, with a cache and averages, in the second epoch or wherever the signal meets it."""
    recipe = sections(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 60, "save_steps": 4})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    whole = run(recipe, tmp_path / "whole")
    command = [sys.executable, "-m", "latte_flow_hf.cli", "train", str(file), "-o", str(tmp_path / "parts" / "out")]
    process = subprocess.Popen([*command, "--work-dir", str(tmp_path / "parts" / "work")])
    checkpoints = tmp_path / "parts" / "work" / "checkpoints"
    while process.poll() is None and last_checkpoint(checkpoints) is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = int(last_checkpoint(checkpoints).name.removeprefix("checkpoint-"))
    assert 0 < killed_at < 60 and not (tmp_path / "parts" / "out").exists()
    # As if it had met the next checkpoint half written.
    torn = checkpoints / f"checkpoint-{killed_at + 1}"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert tower(run(recipe, tmp_path / "parts")) == tower(whole)
    assert log(tmp_path / "parts")[-1]["step"] == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_run_goes_on_without_a_cache(sections, tmp_path, streaming):
    change = {"data": {"source": {**sections()["data"]["source"], "streaming": streaming}, "shuffle_buffer": 4}}
    whole = run(sections(**change), tmp_path / "whole")
    # What a kill right after step 4 leaves.
    checkpoints = tmp_path / "parts" / "work" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    (tmp_path / "whole" / "work" / "checkpoints").rename(checkpoints)
    shutil.rmtree(checkpoints / "checkpoint-6")
    assert tower(run(sections(**change), tmp_path / "parts")) == tower(whole)


def test_a_loss_that_is_no_number_stops_with_step_expert_and_batch(sections, tmp_path):
    recipe = sections(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 1, "max_steps": 20})
    with pytest.raises(FloatingPointError, match=r"step \d+: .*expert \d is (nan|inf).*\d\d\.png|not finite"):
        run(recipe, tmp_path)
    kept = last_checkpoint(tmp_path / "work" / "checkpoints")
    if kept is not None:
        from safetensors.torch import load_file

        assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_saving_keeps_what_was_saved(sections, tmp_path):
    """The limit on a file's size fails a write as a full disk does; libraries report both in the same way."""
    constant = {"lr_scheduler_type": "constant"}
    run(sections(training={**constant, "max_steps": 2}), tmp_path)
    recipe = Recipe.from_dict(sections(training=constant))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"saving the checkpoint of step 4 failed.*checkpoint-2"):
            train(recipe, tmp_path / "work", tmp_path / "more")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert last_checkpoint(tmp_path / "work" / "checkpoints").name == "checkpoint-2"
    whole = run(sections(training=constant), tmp_path / "whole")
    assert tower(run(sections(training=constant), tmp_path, "more")) == tower(whole)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_other_sources_give_the_same_pictures(sections, pictures, tmp_path, layout):
    import tarfile

    import datasets

    from latte_flow_hf.training.data import CaptionedPictures, DataSettings, Unreadable, open_rows

    source = {"cache_dir": str(tmp_path / "datasets")}
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    if layout == "parquet":
        rows = [(pictures / f"{n:02d}.png").read_bytes() for n in range(12)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(set(captions)))})
        made = {"image": [{"bytes": row, "path": None} for row in rows], "label": captions}
        datasets.Dataset.from_dict(made, features=features).to_parquet(tmp_path / "rows.parquet")
        settings = DataSettings({**source, "path": "parquet", "data_files": str(tmp_path / "rows.parquet")}, label="label", size=32)
    else:
        with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
            for number, caption in enumerate(captions):
                tar.add(pictures / f"{number:02d}.png", f"{number:02d}.png")
                (tmp_path / "caption.txt").write_text(caption)
                tar.add(tmp_path / "caption.txt", f"{number:02d}.txt")
        source = {**source, "path": "webdataset", "data_files": str(tmp_path / "shard-0.tar")}
        settings = DataSettings(source, image="png", caption="txt", size=32)
    folder = DataSettings(sections()["data"]["source"], caption="text", size=32)
    expected, found = (CaptionedPictures(open_rows(s, 0), 0, Unreadable(1)) for s in (folder, settings))
    assert len(found) == 12
    for one, other in zip(expected, found):
        assert one["image"].tobytes() == other["image"].tobytes() and one["prompt"] == other["prompt"]
