"""The embedded checkpoint is built at a size that takes seconds: every stage, the folder it leaves, and restarting."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training.recipe import Recipe


FOLDER = Path(__file__).parents[2] / "recipes" / "tinyworld"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("tinyworld_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SHORT = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1, "disable_tqdm": True}


@pytest.fixture(scope="module")
def stages(build):
    """The real stages with small numbers."""
    content = yaml.safe_load((FOLDER / "stages.yaml").read_text())
    for name in [name for name in content if name.endswith("_training")]:
        content[name] = SHORT
    content["autoencoder"].update(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4)
    content["backbone"]["text_config"].update(num_hidden_layers=4, intermediate_size=64)
    content["backbone"]["vision_config"].update(depth=1)
    return build.Stages.from_dict(content)


@pytest.fixture(scope="module")
def recipe():
    """The real recipe of the experts with small numbers."""
    content = yaml.safe_load((FOLDER / "checkpoint.yaml").read_text())
    content["data"]["source"]["num_images"] = 12
    content["training"] = SHORT
    return Recipe.from_dict(content)


def test_all_stages_end_in_a_pipeline_that_loads(build, stages, recipe, tmp_path):
    work_dir = tmp_path / "work"
    output = build.build_checkpoint(stages, recipe, work_dir, tmp_path / "out")
    stage_folders = {
        "processor",
        "autoencoder",
        "vision",
        "language",
        "joint",
        "backbone",
        "cache",
        "pipeline",
        "runs",
    }
    assert {path.name for path in work_dir.iterdir()} == stage_folders
    pipe = LatteFlowPipeline.from_pretrained(output)
    assert pipe.model.dtype == torch.float32
    assert pipe.scheduler.config.new_noise == [0.3, 0.6, 0.6, 0.0]
    assert pipe("a red circle", num_inference_steps=4).images[0].size == (64, 64)
    assert not [path for path in output.rglob("*.json") if str(tmp_path) in path.read_text()]
    log = json.loads((output / "training_log.json").read_text())["stages"]
    assert set(log) == {"vision", "language", "joint", "backbone", "autoencoder", "experts"}
    assert all(entries[-1]["step"] == 2 and entries[-1]["seconds"] > 0 for entries in log.values())
    with pytest.raises(ValueError, match="exists; remove it"):
        build.build_checkpoint(stages, recipe, work_dir, tmp_path / "out")

    # Started again with another output, every stage is finished: nothing is trained, the bytes are the same.
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*") if path.is_file()}
    again = build.build_checkpoint(stages, recipe, work_dir, tmp_path / "again")
    assert before == {path: path.stat().st_mtime_ns for path in work_dir.rglob("*") if path.is_file()}
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (output / weights).read_bytes()


def test_a_stage_that_fails_leaves_nothing_that_looks_finished(build, tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build.build_once(tmp_path / "stage", fail)
    assert not (tmp_path / "stage").exists()
    assert build.build_once(tmp_path / "stage", lambda folder: (folder / "whole").write_text("")).is_dir()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["whole"]


def test_stages_must_have_exactly_the_known_sections(build, tmp_path):
    content = yaml.safe_load((FOLDER / "stages.yaml").read_text())
    for change, words in (
        (lambda c: c.pop("backbone"), "backbone is missing"),
        (lambda c: c.update(backbones={}), "unknown field 'backbones'; did you mean 'backbone'"),
    ):
        changed = copy.deepcopy(content)
        change(changed)
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=f"stages.yaml: {words}"):
            build.Stages.from_yaml(tmp_path / "stages.yaml")
