# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that hold the latent embedding as a linear map of flattened patches."""

import pytest
import torch
from helpers import noise, same_bytes
from safetensors.torch import load_file, save_file

from latte_flow_hf import LatteFlowForConditionalGeneration


WEIGHT, BIAS = "tower.latent_embedding.proj.weight", "tower.latent_embedding.proj.bias"


@pytest.fixture(params=[(1, None), (2, 6)], ids=str)
def old_checkpoint(request, make_model, tmp_path):
    patch_size, kernel_size = request.param
    model = make_model(latent_patch_size=patch_size, latent_kernel_size=kernel_size)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["tower.latent_embedding.weight"] = weights.pop(WEIGHT).flatten(1)
    weights["tower.latent_embedding.bias"] = weights.pop(BIAS)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return model, tmp_path


def test_old_checkpoint_loads_to_the_same_bytes(old_checkpoint):
    model, folder = old_checkpoint
    assert same_bytes(LatteFlowForConditionalGeneration.from_pretrained(folder), model)


def test_convolution_equals_the_linear_map_of_flattened_patches(old_checkpoint):
    model, folder = old_checkpoint
    embedding, weights = model.tower.latent_embedding, load_file(folder / "model.safetensors")
    latents = noise(2, 4, 4, 6)
    patches = torch.nn.functional.unfold(
        latents, embedding.proj.kernel_size, padding=embedding.proj.padding, stride=embedding.proj.stride
    ).transpose(1, 2)
    expected = patches @ weights["tower.latent_embedding.weight"].T + weights["tower.latent_embedding.bias"]
    torch.testing.assert_close(embedding(latents), expected, rtol=1e-5, atol=1e-5)


def test_new_checkpoint_is_saved_under_the_new_name(old_checkpoint, tmp_path):
    _, folder = old_checkpoint
    LatteFlowForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "new")
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert {WEIGHT, BIAS} <= names and "tower.latent_embedding.weight" not in names


def test_weight_of_another_size_is_reported(old_checkpoint):
    _, folder = old_checkpoint
    weights = load_file(folder / "model.safetensors")
    weights["tower.latent_embedding.weight"] = weights["tower.latent_embedding.weight"][:, :-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"have another shape.*latent_embedding"):
        LatteFlowForConditionalGeneration.from_pretrained(folder)
