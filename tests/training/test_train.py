"""Recipes end to end on a small random pipeline: what they refuse, what they leave, and going on after a stop."""

import json
import re
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

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.cli import app
from latte_flow_hf.training import last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.train import Recipe, is_recipe, read_sections, train


RECIPES = Path(__file__).parents[2] / "recipes"


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
    return json.loads((work_dir / "work" / "log.json").read_text())


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

    from latte_flow_hf.training.data import CaptionedImageDataset, DataSettings, UnreadableImages, open_rows

    source = {"cache_dir": str(tmp_path / "datasets")}
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    if layout == "parquet":
        rows = [(pictures / f"{n:02d}.png").read_bytes() for n in range(12)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(set(captions)))}
        )
        made = {"image": [{"bytes": row, "path": None} for row in rows], "label": captions}
        datasets.Dataset.from_dict(made, features=features).to_parquet(tmp_path / "rows.parquet")
        settings = DataSettings(
            {**source, "path": "parquet", "data_files": str(tmp_path / "rows.parquet")}, label="label", size=32
        )
    else:
        with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
            for number, caption in enumerate(captions):
                tar.add(pictures / f"{number:02d}.png", f"{number:02d}.png")
                (tmp_path / "caption.txt").write_text(caption)
                tar.add(tmp_path / "caption.txt", f"{number:02d}.txt")
        source = {**source, "path": "webdataset", "data_files": str(tmp_path / "shard-0.tar")}
        settings = DataSettings(source, image="png", caption="txt", size=32)
    folder = DataSettings(sections()["data"]["source"], caption="text", size=32)
    expected, found = (CaptionedImageDataset(open_rows(s, 0), 0, UnreadableImages(1)) for s in (folder, settings))
    assert len(found) == 12
    for one, other in zip(expected, found):
        assert one["image"].tobytes() == other["image"].tobytes() and one["prompt"] == other["prompt"]


def test_sample_grids_are_whole_and_leave_the_run_as_it_was(sections, tmp_path):
    plain = run(sections(), tmp_path / "plain")
    samples = {
        "prompts": ["a red circle"] * 5,
        "every_steps": 3,
        "call": {"num_inference_steps": 2, "height": 32, "width": 32},
    }
    painted = run(sections(samples=samples), tmp_path / "painted")
    assert tower(painted) == tower(plain)
    folder = tmp_path / "painted" / "work" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(folder / "step-6.png").size == (4 * 32, 2 * 32)
    # The averages paint: the last grid is what the finished pipeline gives.
    painted.set_progress_bar_config(disable=True)
    first = painted("a red circle", generator=torch.Generator().manual_seed(0), **samples["call"]).images[0]
    assert first.tobytes() == Image.open(folder / "step-6.png").crop((0, 0, 32, 32)).tobytes()


def test_conversations_teach_the_backbone_only_where_it_learns(sections, pipeline, tmp_path):
    before = hash_module(LatteFlowPipeline.from_pretrained(pipeline).model.vlm)
    understanding = {"source": {"path": "tinyworld", "num_conversations": 20}, "share": 0.5}
    short = {"max_steps": 2, "gradient_accumulation_steps": 2}
    frozen = run(sections(understanding=understanding, training=short), tmp_path / "frozen")
    taught = run(sections(understanding=understanding, training=short, trainable="vlm"), tmp_path / "taught")
    assert hash_module(frozen.model.vlm) == before != hash_module(taught.model.vlm)
    for folder in ("frozen", "taught"):
        (entry,) = [entry for entry in log(tmp_path / folder) if "lm_loss" in entry]
        (total,) = [entry["loss"] for entry in log(tmp_path / folder) if "loss" in entry]
        parts = entry["lm_loss"] + entry["expert_0_loss"] + entry["expert_1_loss"]
        assert total == pytest.approx(parts, rel=1e-4)
    with pytest.raises(ValueError, match="contexts cannot be cached while the backbone learns"):
        Recipe.from_dict(sections(trainable="vlm", data={"cache": "cache"}))


def test_accumulation_and_checkpointing_give_the_gradients_of_the_plain_step(model, processor):
    """Half batches through the Trainer's own step, divided by their number, against one pass."""
    import copy

    from transformers import Trainer, TrainingArguments

    from latte_flow_hf.training import TextToImageCollator, encode_prompts

    contexts = encode_prompts(model, processor, ["a red circle", ""])
    batch = TextToImageCollator(contexts, 0.0)([{"latents": torch.randn(4, 4, 4), "prompt": 0}] * 4)
    gradients = []
    for checkpointing in (False, True):
        learner = copy.deepcopy(model).train()
        arguments = TrainingArguments(
            gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, report_to=[]
        )
        trainer = Trainer(learner, arguments)
        if checkpointing:
            learner.gradient_checkpointing_enable()
        trainer.current_gradient_accumulation_steps = 2
        torch.manual_seed(0)
        loss = trainer.training_step(learner, dict(batch), num_items_in_batch=None)
        torch.manual_seed(0)
        assert loss == pytest.approx(model(**batch).loss.item() / 2, rel=1e-5)
        gradients.append([parameter.grad for parameter in learner.tower.parameters()])
    for plain, checkpointed in zip(*gradients):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, "unknown field 'modle'; did you mean 'model'"),
        ({"data": {"cach": "x"}}, "data: unknown field 'cach'; did you mean 'cache'"),
        ({"training": {"learnin_rate": 1}}, "training: unknown field 'learnin_rate'; did you mean 'learning_rate'"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate must be a number, got 'fast'"),
        (
            {"model": {"pipeline": None, "backbone": "a", "autoencoder": "b", "experts": {"num_expert": 2}}},
            "num_experts",
        ),
        ({"model": {"backbone": "a"}}, "give either `pipeline`, or `backbone` and `autoencoder`"),
        ({"data": {"flip": "yes"}}, "data: flip must be bool, got 'yes'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"prompt_dropout": 2}, "prompt_dropout must be from 0 to 1"),
        ({"interval_warmup_steps": -1}, "interval_warmup_steps must be at least 0 (without), got -1"),
        ({"trainable": "all"}, "trainable must be experts, vlm, or a list"),
        ({"data": {"source": {}}}, "data: give `source`"),
        ({"model": {"dtype": "float"}, "ema": {"decy": 1}}, "did you mean 'decay'"),
    ],
)
def test_a_recipe_is_checked_before_anything_is_loaded(sections, change, words):
    made = sections()
    for name, value in change.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe.from_dict(made)


def test_a_missing_section_is_named(sections):
    made = sections()
    del made["data"]
    with pytest.raises(ValueError, match="the section 'data' is missing"):
        Recipe.from_dict(made)


def test_unusable_data_is_refused_in_plain_words(sections, pictures, pipeline, tmp_path):
    def fails(words: str, **change) -> None:
        with pytest.raises((ValueError, OSError), match=words):
            run(sections(**change), tmp_path / "refused")
        assert not list((tmp_path / "refused").rglob("model.safetensors"))

    fails("caption names the column 'words'; there are", data={"caption": "words"})
    fails("either `caption` or `label`", data={"label": "text"})
    fails("which is .* knows no names", data={"caption": None, "label": "text"})
    fails("1 pictures cannot be read, max_unreadable is 0: .*05.png", data={"max_unreadable": 0})
    fails("size must be a positive multiple of 8, got 30", data={"size": 30})
    fails("needs a cache", training={"dataloader_num_workers": 2})
    fails("must be one of .*uniform", model={"timestep_sampling": "normal"})
    source = sections()["data"]["source"]
    fails("give `max_steps`", data={"source": {**source, "streaming": True}}, training={"max_steps": -1})

    # Captions that are not there, folders that are empty.
    uncaptioned = tmp_path / "uncaptioned"
    shutil.copytree(pictures, uncaptioned)
    lines = [json.loads(line) for line in (uncaptioned / "metadata.jsonl").read_text().splitlines()]
    lines[3]["text"] = None
    (uncaptioned / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    fails("03.png has no caption", data={"source": {**source, "data_dir": str(uncaptioned)}})
    (tmp_path / "empty").mkdir()
    fails("", data={"source": {**source, "data_dir": str(tmp_path / "empty")}})
    fails("nowhere", model={"pipeline": str(tmp_path / "nowhere")})


def test_a_cache_of_something_else_is_refused(sections, make_vae, model, processor, tmp_path):
    cached = sections(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 1})
    first = run(cached, tmp_path / "first")
    other = tmp_path / "other"
    vae = make_vae()
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    LatteFlowPipeline(model, processor, vae, first.scheduler).save_pretrained(other)
    with pytest.raises(ValueError, match=r"cache .* was made by another autoencoder; remove it"):
        run({**cached, "model": {"pipeline": str(other)}}, tmp_path / "second")
    with pytest.raises(ValueError, match="was made by another size"):
        run({**cached, "data": {**cached["data"], "size": 64}}, tmp_path / "third")
    # Experts are no part of it: the tower that learned takes the same cache.
    run({**cached, "model": {"pipeline": str(tmp_path / "first" / "out")}}, tmp_path / "fourth")


def test_an_interrupted_cache_goes_on(sections, tmp_path, monkeypatch):
    from latte_flow_hf.training import cache

    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    recipe = sections(data={"cache": str(tmp_path / "cache")})
    plain = run(sections(), tmp_path / "plain")
    run({**recipe, "training": {**recipe["training"], "max_steps": 1}}, tmp_path / "first")
    # What a kill leaves: no index, a shard that is not there, half of another under its temporary name.
    (tmp_path / "cache" / "index.json").unlink()
    lost = tmp_path / "cache" / "latents-000000004.safetensors"
    lost.rename(lost.with_suffix(".partial"))
    kept = tmp_path / "cache" / "latents-000000000.safetensors"
    before = kept.stat().st_mtime_ns
    assert tower(run(recipe, tmp_path / "second")) == tower(plain)
    assert kept.stat().st_mtime_ns == before and lost.exists()


# Other files there are read by scripts of their own.
TRAINING_RECIPES = [path for path in sorted(RECIPES.rglob("*.yaml")) if "model" in read_sections(path)]


@pytest.mark.parametrize("file", TRAINING_RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_are_read(file):
    assert is_recipe(read_sections(file))
    Recipe.from_yaml(file)


def test_the_embedded_checkpoints_recipe_is_told_apart():
    assert len(TRAINING_RECIPES) >= 5
    assert not is_recipe(read_sections(RECIPES / "tinyworld" / "checkpoint.yaml"))


def test_the_command_trains_by_the_tiny_recipe_and_refuses_a_misspelt_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = read_sections(RECIPES / "tinyworld" / "experts.yaml")
    made["data"]["source"]["num_pictures"] = 16
    made["training"].update(max_steps=2, per_device_train_batch_size=4, disable_tqdm=True)
    Path("small.yaml").write_text(yaml.safe_dump(made))
    result = CliRunner().invoke(app, ["train", "small.yaml", "-o", "out"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "wrote out" and Path("runs/small/log.json").exists()
    Path("wrong.yaml").write_text(yaml.safe_dump({**made, "modell": {}}))
    result = CliRunner().invoke(app, ["train", "wrong.yaml", "-o", "other"])
    assert result.exit_code == 1 and "did you mean 'model'" in result.stderr
    result = CliRunner().invoke(app, ["train", "small.yaml", "-o", "out"])
    assert result.exit_code == 1 and "exists" in result.stderr


def test_adapters_and_single_experts_learn_by_a_recipe_and_go_on_after_a_stop(sections, pipeline, tmp_path):
    pytest.importorskip("latte_flow_hf.training.adapters")
    adapter = sections(lora={"experts": [1], "r": 2})
    whole = train(Recipe.from_dict(adapter), tmp_path / "work", tmp_path / "whole")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "checkpoint-6")
    resumed = train(Recipe.from_dict(adapter), tmp_path / "work", tmp_path / "resumed")
    weights = "adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    assert not (whole / "model_index.json").exists()

    before = LatteFlowPipeline.from_pretrained(pipeline).model
    after = run(sections(trainable=[1]), tmp_path / "one").model
    layers = zip(before.tower.layers, after.tower.layers)
    changed = [index for index, (old, new) in enumerate(layers) if hash_module(old) != hash_module(new)]
    assert changed == list(before.expert_layers(1))
    assert hash_module(before.tower.head) == hash_module(after.tower.head)
