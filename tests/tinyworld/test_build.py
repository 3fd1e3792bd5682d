"""The whole recipe at a size that takes seconds: every stage, the folder it leaves, and going on after a stop."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.tinyworld import build


RECIPE = Path(__file__).parents[2] / "recipes" / "tinyworld" / "checkpoint.yaml"


@pytest.fixture(scope="module")
def recipe():
    """The real recipe, its numbers made small."""
    sections = yaml.safe_load(RECIPE.read_text())
    for name in [name for name in sections if name.endswith("_training")]:
        sections[name] = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "disable_tqdm": True}
    sections["autoencoder"].update(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4)
    sections["backbone"]["text_config"].update(num_hidden_layers=4, intermediate_size=64)
    sections["backbone"]["vision_config"].update(depth=1)
    sections["experts_data"].update(num_pictures=12)
    return build.Recipe(**sections)


def test_all_stages_end_in_a_pipeline_that_loads(recipe, tmp_path):
    made = build.build_checkpoint(recipe, tmp_path / "work", tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial"))
    pipe = LatteFlowPipeline.from_pretrained(made)
    assert pipe.model.dtype == torch.float32
    assert pipe("a red circle", num_inference_steps=4).images[0].size == (64, 64)
    with pytest.raises(ValueError, match="exists; give another one"):
        build.build_checkpoint(recipe, tmp_path / "work", tmp_path / "out")

    # Started again elsewhere, every stage is finished already: nothing is trained, the bytes are the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    again = build.build_checkpoint(recipe, tmp_path / "work", tmp_path / "again")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (made / weights).read_bytes()


def test_a_stage_that_fails_leaves_nothing_that_looks_finished(tmp_path):
    def fails(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build._finished(tmp_path / "stage", fails)
    assert not (tmp_path / "stage").exists()
    assert build._finished(tmp_path / "stage", lambda folder: (folder / "whole").write_text("")).is_dir()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["whole"]


def test_a_recipe_must_have_exactly_the_known_sections(tmp_path):
    sections = yaml.safe_load(RECIPE.read_text())
    for change in (lambda s: s.pop("experts"), lambda s: s.update(expert={})):
        changed = copy.deepcopy(sections)
        change(changed)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match="expected exactly the sections"):
            build.Recipe.from_yaml(tmp_path / "recipe.yaml")
