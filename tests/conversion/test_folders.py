# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Reading of pipelines and autoencoders, and the check of a converted model."""

import json

import pytest
import torch

from latte_flow_hf.conversion.folders import (
    MODEL,
    check_velocity,
    edit_json,
    files_saved_by,
    local_folder,
    read_autoencoder,
    read_pipeline,
    read_small_files,
    source_name,
)
from latte_flow_hf.conversion.streaming import StoredTensor


def test_what_is_neither_a_folder_nor_on_the_hub():
    with pytest.raises(OSError, match="nobody/nothing is not a folder, and cannot be downloaded"):
        local_folder("nobody/nothing")


def test_the_name_of_a_source_has_no_local_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert source_name(tmp_path / "mine") == source_name(".") == "mine"
    assert source_name("user/model") == "user/model"


def test_small_files_are_neither_weights_nor_hidden(tmp_path):
    for name in (
        "a.json",
        "b/c.txt",
        "b/x.safetensors",
        "x.safetensors.index.json",
        "x.bin",
        ".git/d",
        "b/.e",
        "x.pt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_small_files(tmp_path) == {"a.json": b"a.json", "b/c.txt": b"b/c.txt"}


def test_files_saved_by_a_component(processor):
    files = files_saved_by(processor.save_pretrained, "processor")
    assert "processor/tokenizer.json" in files and all(name.startswith("processor/") for name in files)
    assert {
        f"processor/{name}": content for name, content in files_saved_by(processor.save_pretrained).items()
    } == files


def test_edit_json():
    assert json.loads(edit_json(b'{"a": 1, "b": [2]}', a=3, c=None)) == {"a": 3, "b": [2], "c": None}


def test_a_pipeline_is_read_without_its_weights(pipeline_folder, model, vae):
    pipeline = read_pipeline(str(pipeline_folder))
    assert pipeline.name == pipeline_folder.name and pipeline.config.num_experts == 2
    assert all(parameter.is_meta for parameter in pipeline.model.parameters())
    assert "model_index.json" in pipeline.small_files and "model/config.json" in pipeline.small_files
    (stored, autoencoder), expected = pipeline.weights.values(), model.state_dict()
    assert set(stored) == set(expected) - {"vlm.lm_head.weight"} and set(autoencoder) == set(vae.state_dict())
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel', which is not an autoencoder"),
        ({"_class_name": "Nonsense"}, "'Nonsense', which is not an autoencoder"),
        ({"latent_channels": 4}, "'None', which is not an autoencoder"),
        ({"_class_name": "VQModel"}, "VQModel.*does not encode and decode images"),
        ({"_class_name": "AutoencoderKLHunyuanImage"}, "AutoencoderKLHunyuanImage in .* is incomplete"),
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan.*has no latent_channels"),
        ({"_class_name": "AutoencoderKLCogVideoX"}, "AutoencoderKLCogVideoX.*does not encode and decode images"),
    ],
)
def test_what_is_not_an_autoencoder_of_images(settings, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words):
        read_autoencoder(tmp_path)


def test_check_velocity_reads_the_first_expert_alone(pipeline_folder, model):
    pipeline = read_pipeline(pipeline_folder)
    read = []

    def recorded(name, tensor):
        return StoredTensor(tensor.dtype, tensor.shape, lambda: read.append(name) or tensor.read())

    found = check_velocity(
        pipeline.config, {name: recorded(name, tensor) for name, tensor in pipeline.weights[MODEL].items()}
    )
    assert found.startswith("expert 0 predicts a finite velocity with root mean square ")
    layers = {name.split(".")[2] for name in read if name.startswith("tower.layers.")}
    assert layers == {"0", "1"} and all(name.startswith("tower.") for name in read)
    assert set(read) == {name for name in model.state_dict() if name.startswith("tower.")} - {
        name for name in model.state_dict() if name.startswith(("tower.layers.2.", "tower.layers.3."))
    }
