"""Runs on a small random pipeline: what is trained, what they save, and resuming after a stop."""

import copy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.cli import app
from latte_flow_hf.training import TextToImageCollator, encode_prompts, last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.recipe import ModelSettings, Recipe
from latte_flow_hf.training.train import load_pipeline, train


RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_backbone_keeps_its_bytes_and_the_experts_are_trained(recipe, run, pipeline, tmp_path):
    pipe, before = run(recipe(), tmp_path), LatteFlowPipeline.from_pretrained(pipeline)
    assert hash_module(pipe.model.vlm) == hash_module(before.model.vlm)
    assert hash_module(pipe.model.tower) != hash_module(before.model.tower)


def test_a_killed_run_ends_in_the_bytes_of_one_never_stopped(recipe, run, read_log, tmp_path):
    """Killed after the first checkpoint at any moment, with a cache and averages."""
    content = recipe(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 60, "save_steps": 4})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    whole = run(content, tmp_path / "whole")
    command = [sys.executable, "-m", "latte_flow_hf.cli", "train", str(file), "-o", str(tmp_path / "parts" / "out")]
    process = subprocess.Popen([*command, "--work-dir", str(tmp_path / "parts" / "work")])
    checkpoints = tmp_path / "parts" / "work" / "checkpoints"
    while process.poll() is None and last_checkpoint(checkpoints) is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = int(last_checkpoint(checkpoints).name.removeprefix("checkpoint-"))
    assert 0 < killed_at < 60 and not (tmp_path / "parts" / "out").exists()
    # As if it had been killed while writing the next checkpoint.
    partial = checkpoints / f"checkpoint-{killed_at + 1}"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert hash_module(run(content, tmp_path / "parts").model.tower) == hash_module(whole.model.tower)
    assert read_log(tmp_path / "parts")[-1]["step"] == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_run_resumes_without_a_cache(recipe, run, tmp_path, streaming):
    change = {"data": {"source": {**recipe()["data"]["source"], "streaming": streaming}, "shuffle_buffer": 4}}
    whole = run(recipe(**change), tmp_path / "whole")
    # What a run killed after step 4 leaves.
    checkpoints = tmp_path / "parts" / "work" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    (tmp_path / "whole" / "work" / "checkpoints").rename(checkpoints)
    shutil.rmtree(checkpoints / "checkpoint-6")
    assert hash_module(run(recipe(**change), tmp_path / "parts").model.tower) == hash_module(whole.model.tower)


def test_conversations_train_the_backbone_only_if_it_is_trainable(recipe, run, read_log, pipeline, tmp_path):
    before = hash_module(LatteFlowPipeline.from_pretrained(pipeline).model.vlm)
    understanding = {"source": {"path": "tinyworld", "num_conversations": 20}, "share": 0.5}
    short = {"max_steps": 2, "gradient_accumulation_steps": 2}
    frozen = run(recipe(understanding=understanding, training=short), tmp_path / "frozen")
    trained = run(recipe(understanding=understanding, training=short, trainable="vlm"), tmp_path / "trained")
    assert hash_module(frozen.model.vlm) == before != hash_module(trained.model.vlm)
    for folder in ("frozen", "trained"):
        (entry,) = [entry for entry in read_log(tmp_path / folder) if "lm_loss" in entry]
        (total,) = [entry["loss"] for entry in read_log(tmp_path / folder) if "loss" in entry]
        parts = entry["lm_loss"] + entry["expert_0_loss"] + entry["expert_1_loss"]
        assert total == pytest.approx(parts, rel=1e-4)


def test_accumulation_and_checkpointing_give_the_gradients_of_the_plain_step(model, processor):
    """Half batches in the Trainer's step, divided by their number, against one forward pass."""
    contexts = encode_prompts(model, processor, ["a red circle", ""])
    batch = TextToImageCollator(contexts, 0.0)([{"latents": torch.randn(4, 4, 4), "prompt": 0}] * 4)
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        arguments = TrainingArguments(
            gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, report_to=[]
        )
        trainer = Trainer(trained, arguments)
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trainer.current_gradient_accumulation_steps = 2
        torch.manual_seed(0)
        loss = trainer.training_step(trained, dict(batch), num_items_in_batch=None)
        torch.manual_seed(0)
        assert loss == pytest.approx(model(**batch).loss.item() / 2, rel=1e-5)
        gradients.append([parameter.grad for parameter in trained.tower.parameters()])
    for plain, checkpointed in zip(*gradients):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)


def test_the_command_trains_and_refuses_a_misspelt_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((RECIPES / "tinyworld" / "experts.yaml").read_text())
    content["data"]["source"]["num_images"] = 16
    content["training"].update(max_steps=2, per_device_train_batch_size=4, disable_tqdm=True)
    Path("small.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["train", "small.yaml", "-o", "out"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "wrote out" and Path("runs/small/log.json").exists()
    Path("wrong.yaml").write_text(yaml.safe_dump({**content, "modell": {}}))
    result = CliRunner().invoke(app, ["train", "wrong.yaml", "-o", "other"])
    assert result.exit_code == 1 and "did you mean 'model'" in result.stderr
    result = CliRunner().invoke(app, ["train", "small.yaml", "-o", "out"])
    assert result.exit_code == 1 and "exists" in result.stderr


def test_adapters_and_single_experts_are_trained_and_resumed(recipe, run, pipeline, tmp_path):
    adapter = recipe(lora={"experts": [1], "r": 2})
    whole = train(Recipe.from_dict(adapter), tmp_path / "work", tmp_path / "whole")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "checkpoint-6")
    resumed = train(Recipe.from_dict(adapter), tmp_path / "work", tmp_path / "resumed")
    weights = "adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    assert not (whole / "model_index.json").exists()

    before = LatteFlowPipeline.from_pretrained(pipeline).model
    after = run(recipe(trainable=[1]), tmp_path / "one").model
    layers = zip(before.tower.layers, after.tower.layers)
    changed = [index for index, (old, new) in enumerate(layers) if hash_module(old) != hash_module(new)]
    assert changed == list(before.expert_layers(1))
    assert hash_module(before.tower.head) == hash_module(after.tower.head)


def test_a_new_pipeline_has_the_settings_of_the_recipe(pipeline, processor, tmp_path):
    parts = Path(pipeline)
    LatteFlowPipeline.from_pretrained(pipeline).model.vlm.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    settings = ModelSettings(
        backbone=str(tmp_path / "backbone"),
        autoencoder=str(parts / "vae"),
        experts={"num_experts": 4, "timestep_frequency_dim": 16, "copy_layers": False},
        scheduler={"new_noise": [0.5, 0.5, 0.0, 0.0]},
        timestep_sampling="logit_normal",
    )
    pipe = load_pipeline(settings)
    assert pipe.model.config.num_experts == 4 and pipe.model.config.timestep_sampling == "logit_normal"
    assert pipe.model.config.latent_channels == pipe.vae.config.latent_channels
    assert pipe.scheduler.config.new_noise == [0.5, 0.5, 0.0, 0.0]
    assert pipe.scheduler.config.expert_boundaries == pipe.model.config.expert_boundaries
    layers = zip(pipe.model.tower.layers, pipe.model.vlm.get_decoder().layers)
    assert not any(torch.equal(own.mlp.up_proj.weight, other.mlp.up_proj.weight) for own, other in layers)
    pipe.save_pretrained(tmp_path / "out")
    paths = [path for path in (tmp_path / "out").rglob("*.json") if str(tmp_path) in path.read_text()]
    assert not paths
