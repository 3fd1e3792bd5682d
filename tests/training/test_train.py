"""Runs on a small random pipeline: what is trained, what they save, and resuming after a stop."""

import copy
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.cli import app
from latte_flow_hf.files import check_hash
from latte_flow_hf.folder_lock import lock_folder
from latte_flow_hf.training import TextToImageCollator, encode_prompts, last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.recipe import ModelSettings, Recipe
from latte_flow_hf.training.train import load_pipeline, train, training_arguments


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
def test_a_stopped_run_resumes_without_a_cache(recipe, run, read_log, tmp_path, streaming):
    change = {"data": {"source": {**recipe()["data"]["source"], "streaming": streaming}, "shuffle_buffer": 4}}
    whole = run(recipe(**change), tmp_path / "whole")
    # What a run killed after step 4 leaves.
    checkpoints = tmp_path / "parts" / "work" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    (tmp_path / "whole" / "work" / "checkpoints").rename(checkpoints)
    shutil.rmtree(checkpoints / "checkpoint-6")
    before = [entry["seconds"] for entry in read_log(tmp_path / "whole")]
    assert hash_module(run(recipe(**change), tmp_path / "parts").model.tower) == hash_module(whole.model.tower)
    # The time of the first part counts; its values in the checkpoint are those that it logged.
    after = [entry["seconds"] for entry in read_log(tmp_path / "parts")]
    assert after == sorted(after) and 0 < after[0] == before[0]


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
            activation_checkpointing=checkpointing, gradient_accumulation_steps=2, report_to=[]
        )
        trainer = Trainer(trained, arguments)
        if checkpointing:
            trained.activation_checkpointing_enable()
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


def test_an_adapter_is_trained_further(recipe, pipeline, tmp_path):
    """Without a learning rate the new adapter has the weights of the old one; anything else is refused at once."""
    first = train(Recipe.from_dict(recipe(lora={"experts": [1], "r": 2})), tmp_path / "one", tmp_path / "first")

    def further(folder, **lora):
        lora = {"experts": [1], "r": 2, "weights": str(first), **lora}
        content = recipe(lora=lora, training={"learning_rate": 0.0, "max_steps": 1})
        return train(Recipe.from_dict(content), tmp_path / folder / "work", tmp_path / folder / "out")

    second = further("two")
    weights, again = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    # Neither the configuration nor the model card tells where the base model was.
    assert json.loads((first / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert not any(pipeline in path.read_text() for path in first.iterdir() if path.suffix != ".safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    for name, change in (("r", {"r": 4}), ("lora_alpha", {"lora_alpha": 4}), ("target_modules", {"experts": [0]})):
        with pytest.raises(ValueError, match=f"lora: weights: .* has {name}"):
            further("three", **change)
    assert not (tmp_path / "three" / "work" / "checkpoints" / "checkpoint-1").exists()
    with pytest.raises(ValueError, match="weights must be the folder or hub id"):
        further("three", weights=3)


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


@pytest.fixture(scope="module")
def finished(pipeline, images, tmp_path_factory):
    """The recipe and the folder of a run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    source = {"path": "imagefolder", "data_dir": str(images), "cache_dir": str(folder / "datasets")}
    content = {
        "model": {"pipeline": pipeline},
        "data": {"source": source, "caption": "text", "size": 32},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "save_steps": 2,
            "disable_tqdm": True,
        },
        "ema": {"decay": 0.9},
    }
    train(Recipe.from_dict(content), folder / "work", folder / "out")
    return content, folder


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the finished run as if it had been killed at step 2: its recipe and its working folder."""
    content, folder = copy.deepcopy(finished[0]), tmp_path / "stopped"
    shutil.copytree(finished[1] / "work", folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    return content, folder


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"learning_rate": 1e-3}}, "training: learning_rate 0.003 -> 0.001"),
        ({"training": {"max_steps": 3}}, "training: max_steps 4 -> 3"),
        ({"training": {"weight_decay": 0.1}}, "training: weight_decay None -> 0.1"),
        ({"data": {"prompt": "a photo of {}"}}, r"data: prompt \{\} -> a photo of \{\}"),
        ({"data": {"flip": True}, "seed": 1}, "data: flip False -> True; seed 0 -> 1"),
        ({"prompt_dropout": 0.2}, "prompt_dropout 0.1 -> 0.2"),
        ({"trainable": [1]}, r"other weights or averages \(trainable experts -> \[1\]\); use another --work-dir"),
        ({"lora": {"experts": [1]}}, "other weights or averages"),
        ({"ema": {"decay": 0.8}}, "other weights or averages .*ema: decay 0.9 -> 0.8"),
    ],
)
def test_a_working_folder_belongs_to_one_recipe(change, words, stopped, tmp_path):
    content, folder = stopped
    for name, value in change.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    before = tree(folder)
    with pytest.raises(ValueError, match=words):
        train(Recipe.from_dict(content), folder, tmp_path / "out")
    assert tree(folder) == before and not (tmp_path / "out").exists()


def test_a_working_folder_belongs_to_one_starting_model(stopped, own_pipe, tmp_path):
    content, folder = stopped
    with torch.no_grad():
        next(own_pipe.vae.parameters()).add_(1e-3)
    own_pipe.save_pretrained(tmp_path / "other")
    content["model"]["pipeline"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model: pipeline .*; autoencoder of the starting model"):
        train(Recipe.from_dict(content), folder, tmp_path / "out")


def test_a_finished_run_takes_no_more_steps(finished, tmp_path):
    content, folder = finished
    work = tmp_path / "work"
    shutil.copytree(folder / "work", work)
    output = train(Recipe.from_dict(content), work, tmp_path / "again")
    # Step 4 is in the middle of an epoch.
    assert last_checkpoint(work / "checkpoints").name == "checkpoint-4"
    pipes = [LatteFlowPipeline.from_pretrained(path) for path in (folder / "out", output)]
    assert hash_module(pipes[0].model) == hash_module(pipes[1].model)


def test_a_working_folder_belongs_to_the_same_data(stopped, images, tmp_path):
    content, folder = stopped
    copied = tmp_path / "images"
    shutil.copytree(images, copied)
    content["data"]["source"] = {"path": "imagefolder", "data_dir": str(copied)}
    content["data"]["source"]["cache_dir"] = str(tmp_path / "datasets")
    content["validation"] = {"source": content["data"]["source"]}
    content["training"]["eval_strategy"] = "steps"
    train(Recipe.from_dict(content), folder.with_name("work"), tmp_path / "first")
    train(Recipe.from_dict(content), folder.with_name("work"), tmp_path / "again")
    captions = (copied / "metadata.jsonl").read_text()
    (copied / "metadata.jsonl").write_text(captions.replace("red", "blue"))
    # The recipe is the same, and the old result would be taken for that of the new captions.
    with pytest.raises(ValueError, match=r"data \(the files of `data`; the files of `validation`\); use another"):
        train(Recipe.from_dict(content), folder.with_name("work"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train(Recipe.from_dict(content), folder.with_name("work"), tmp_path / "out", allow_changes=True)


def test_more_steps_and_other_logging_go_on_and_changes_need_a_flag(stopped, run, tmp_path):
    content, folder = stopped
    shutil.copytree(folder, tmp_path / "flag" / "work")
    content["training"].update(max_steps=5, logging_steps=1, save_steps=3)
    content["samples"] = {"prompts": ["a"], "call": {"num_inference_steps": 2}}
    more = train(Recipe.from_dict(content), folder, tmp_path / "more")
    assert last_checkpoint(folder / "checkpoints").name == "checkpoint-5"
    # The averages of a run of five steps that was never stopped.
    whole = run(content, tmp_path / "whole")
    assert hash_module(LatteFlowPipeline.from_pretrained(more).model.tower) == hash_module(whole.model.tower)

    # A new learning rate takes effect: the Trainer alone would go on with that of the checkpoint.
    content["training"].update(learning_rate=0.0, weight_decay=0.0)
    content["training"]["max_steps"] = 4
    with pytest.raises(ValueError, match=r"learning_rate 0.003 -> 0.0.*--allow-changes"):
        train(Recipe.from_dict(content), tmp_path / "flag" / "work", tmp_path / "out")
    train(Recipe.from_dict(content), tmp_path / "flag" / "work", tmp_path / "out", allow_changes=True)
    checkpoints = tmp_path / "flag" / "work" / "checkpoints"
    weights = [load_file(checkpoints / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # From now on the folder belongs to the changed recipe; fewer steps than it has are refused in any case.
    content["training"]["max_steps"] = 3
    with pytest.raises(ValueError, match="holds a run of 4 steps already, but max_steps is 3"):
        train(Recipe.from_dict(content), tmp_path / "flag" / "work", tmp_path / "third", allow_changes=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "model.safetensors",
        "trainer_state.json",
        "ema/shared.safetensors",
    ],
)
def test_a_damaged_checkpoint_is_named(damage, name, stopped, tmp_path):
    content, folder = stopped
    path = folder / "checkpoints" / "checkpoint-2" / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(data[:middle] if damage == "truncated" else flipped)
    words = f"checkpoint-2 has {'no' if damage == 'missing' else 'a damaged'} {name}; remove this folder"
    with pytest.raises(OSError, match=words) as error:
        train(Recipe.from_dict(content), folder, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_working_folder_is_used_by_one_process(stopped, tmp_path):
    content, folder = stopped
    before = tree(folder)
    with lock_folder(folder), pytest.raises(OSError, match="stopped is in use by process"):
        train(Recipe.from_dict(content), folder, tmp_path / "out")
    assert tree(folder) == before


def test_what_a_killed_run_left_is_removed(stopped, tmp_path):
    content, folder = stopped
    (folder / "checkpoints" / "checkpoint-3").mkdir()
    train(Recipe.from_dict(content), folder, tmp_path / "out")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "run.json",
    ]


def test_the_output_is_checked_before_the_work(recipe, tmp_path):
    settings = Recipe.from_dict(recipe(model={"pipeline": str(tmp_path / "nowhere")}))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("none")
    for name in ("file", "link", "file/out"):
        with pytest.raises((ValueError, OSError), match=f"output .*{name}"):
            train(settings, tmp_path / "work", tmp_path / name)
    assert not (tmp_path / "work").exists()


def test_the_result_has_a_card_and_hashes(finished, images):
    out = finished[1] / "out"
    card = (out / "README.md").read_text()
    assert "Trained with `latte-flow train` for 4 steps" in card and "/" + images.name not in card
    weights = sorted(out.rglob("*.safetensors"))
    assert len(weights) == 2 and all(check_hash(path) for path in weights)


def full_disk(*args, **kwargs):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_at_the_end_leaves_nothing_of_the_result(stopped, monkeypatch, tmp_path):
    content, folder = stopped
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    content["training"].update(save_strategy="no")
    with pytest.raises(OSError, match=r"out cannot be written .*No space left") as error:
        train(Recipe.from_dict(content), folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped"]
    monkeypatch.undo()
    train(Recipe.from_dict(content), folder, tmp_path / "out")


def test_validation_measures_the_same_loss_and_does_not_change_the_run(recipe, run, read_log, images, tmp_path):
    plain = run(recipe(), tmp_path / "plain")
    source = recipe()["data"]["source"]
    validated = recipe(validation={"source": source}, training={"eval_steps": 2, "learning_rate": 3e-3})
    pipe = run(validated, tmp_path / "validated")
    assert hash_module(pipe.model.tower) == hash_module(plain.model.tower)
    losses = {entry["step"]: entry["eval_loss"] for entry in read_log(tmp_path / "validated") if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6] and len(set(losses.values())) == 3

    # The loss is that of the averaged weights, which are the result; from a cache it is the same.
    cached = {"source": source, "cache": str(tmp_path / "cache")}
    still = recipe(
        model={"pipeline": str(tmp_path / "validated" / "out")},
        validation=cached,
        training={"max_steps": 1, "learning_rate": 0.0, "eval_steps": 1, "weight_decay": 0.0},
    )
    run(still, tmp_path / "still")
    (entry,) = [entry for entry in read_log(tmp_path / "still") if "eval_loss" in entry]
    assert entry["eval_loss"] == pytest.approx(losses[6], rel=1e-5)


def test_the_best_checkpoint_is_kept_and_is_the_result(recipe, run, read_log, tmp_path):
    """With a learning rate that destroys the weights after the second step, the best checkpoint is an early one."""
    content = recipe(
        validation={"source": recipe()["data"]["source"]},
        ema={"decay": 0.0},
        training={
            "max_steps": 8,
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "save_steps": 1,
            "load_best_model_at_end": True,
        },
    )
    pipe = run(content, tmp_path)
    losses = {entry["step"]: entry["eval_loss"] for entry in read_log(tmp_path) if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best < 7
    checkpoints = tmp_path / "work" / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (best, 7, 8)}
    averages = load_file(checkpoints / f"checkpoint-{best}" / "ema" / "shared.safetensors")
    weights = dict(pipe.model.named_parameters())
    assert averages and all(torch.equal(weights[name], average) for name, average in averages.items())


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_has_deprecated_arguments(file, tmp_path):
    content = yaml.safe_load(file.read_text())
    if "model" not in content:
        pytest.skip("settings of a script")
    if file.parent.name == "reproduce":
        # A part of recipes, which add the model.
        content["model"] = {"pipeline": "tinyworld"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        content["training"].pop("bf16", None)
        training_arguments(Recipe.from_dict(content), tmp_path)


def test_a_trained_backbone_is_resumed(recipe, run, tmp_path):
    content = recipe(trainable="vlm", training={"lr_scheduler_type": "constant"})
    whole = run(content, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "work", tmp_path / "parts" / "work")
    shutil.rmtree(tmp_path / "parts" / "work" / "checkpoints" / "checkpoint-6")
    assert hash_module(run(content, tmp_path / "parts").model) == hash_module(whole.model)


def test_guidance_in_the_weights_is_not_added_again(
    recipe, run, count_layers, pipeline, caplog, monkeypatch, tmp_path
):
    """Guidance is trained into the weights, and the result is sampled with one evaluation per step."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    content = recipe(folded_guidance_scale=3.0, training={"max_steps": 2})
    pipe = run(content, tmp_path)
    assert pipe.model.config.sampling == {"guidance_scale": 1.0, "folded_guidance_scale": 3.0}
    plain = run(recipe(training={"max_steps": 2}), tmp_path / "plain")
    assert hash_module(pipe.model.tower) != hash_module(plain.model.tower)
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.zeros(1, 4, 8, 8)}
    caplog.clear()
    images = pipe("a red circle", **call).images
    assert not pipe.do_classifier_free_guidance
    assert torch.equal(images, pipe("a red circle", **call, guidance_scale=1.0).images) and not caplog.records
    pipe("a red circle", **call, guidance_scale=3.0)
    assert len(caplog.records) == 1 and "trained or distilled into their weights" in caplog.text
    with pytest.raises(ValueError, match=r"experts \[0, 1\] of the model were trained or distilled with guidance"):
        model = {"pipeline": str(tmp_path / "out")}
        train(Recipe.from_dict({**content, "model": model}), tmp_path / "again", tmp_path / "second")

    adapter = train(
        Recipe.from_dict({**content, "lora": {"experts": [1], "r": 2}}), tmp_path / "lora", tmp_path / "adapter"
    )
    base = LatteFlowPipeline.from_pretrained(pipeline)
    base.load_lora_weights(str(adapter))
    assert base.model.sampling == {"guidance_scale": [4.0, 1.0], "folded_guidance_scale": [1.0, 3.0]}
    scheduler, used = base.scheduler, []
    base("a red circle", **call, callback_on_step_end=lambda p, *_: used.append(p.scheduler.config) or {})
    assert used == [scheduler.config] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folded_guidance_scale": 1.0}, "folded_guidance_scale must be greater than 1"),
        ({"folded_guidance_scale": 4.0, "prompt_dropout": 0.0}, "needs prompt_dropout above 0"),
    ],
)
def test_guidance_that_cannot_be_learned_is_refused(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(recipe(**change))
