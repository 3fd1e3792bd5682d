"""The experiment runs at a tiny size; started again, it skips what is finished."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from latte_flow_hf.tinyworld.shapes import draw_scene, place_objects


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lora_experts():
    spec = importlib.util.spec_from_file_location("lora_experts", ROOT / "benchmarks" / "lora_experts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings() -> dict:
    settings = yaml.safe_load((ROOT / "recipes" / "tinyworld" / "lora_experts.yaml").read_text())
    settings["rows"] = ["autoencoder", "none", "all", "1"]
    settings["data"]["num_images"] = 12
    settings["training"].update(max_steps=2, per_device_train_batch_size=4, warmup_steps=0, disable_tqdm=True)
    small = {"one": 1, "two": 1, "held_out": 1, "digits": 1}
    settings["evaluation"].update(new=4, old=small, call={"guidance_scale": 1.0, "num_inference_steps": 2})
    return settings


def test_rows_are_trained_evaluated_and_kept(lora_experts, settings, pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipe")
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = ["lora_experts.py", str(file), "--output", str(tmp_path / "out"), "--model", str(tmp_path / "pipe")]
    monkeypatch.setattr(sys, "argv", command)
    lora_experts.main()
    output = tmp_path / "out" / "orange"
    rows = json.loads((output / "table.json").read_text())
    assert [row["experts"] for row in rows] == [[], [], [0, 1], [1]]
    assert all(0 <= row["new"] <= 1 and 0 <= row["old"] <= 1 for row in rows)
    assert rows[2]["parameters"] > rows[3]["parameters"] > 0
    assert len((output / "table.md").read_text().splitlines()) == 2 + 4

    # Again, without the result of one row: nothing is trained, the evaluation is repeated with the same result.
    (output / "rows" / "1.json").unlink()
    monkeypatch.setattr(lora_experts, "train_adapter", None)
    lora_experts.main()
    assert json.loads((output / "table.json").read_text()) == rows


@pytest.mark.parametrize("concept", ["orange", "star"])
def test_new_scenes_have_the_concept_and_the_oracle_recognises_it(lora_experts, concept):
    rng = np.random.default_rng(0)
    scenes = [lora_experts.sample_new_scene(rng, concept) for _ in range(200)]
    assert all(concept in scene.prompt for scene in scenes)
    images = [draw_scene(scene, place_objects(scene, rng)) for scene in scenes]
    correct = [lora_experts.shows_in_wider_world(*pair) for pair in zip(images, scenes)]
    assert np.mean(correct) >= 0.99
    wrong = [lora_experts.shows_in_wider_world(*pair) for pair in zip(images, scenes[1:])]
    assert np.mean(wrong) < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"concept": "red"}, r"concept must be one of \['orange', 'star'\], got 'red'"),
        ({"ranks": 3}, "unknown field 'ranks'"),
    ],
)
def test_invalid_settings_are_refused(lora_experts, settings, change, words, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**settings, **change}))
    with pytest.raises(ValueError, match=words):
        lora_experts.ExperimentSettings.from_yaml(file)
