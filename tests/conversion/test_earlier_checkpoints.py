# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline as earlier versions saved it gives the same conversions as one of this version.

Earlier versions stored the latent embedding as a linear map of flattened patches.
"""

import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.conversion import (
    extract_backbone,
    from_original,
    from_single_file,
    regroup,
    to_original,
    to_single_file,
)


def to_earlier_layout(path, key):
    """Rewrite a file of weights with the names and shapes of earlier versions."""
    tensors = load_file(path)
    tensors[f"{key}.weight"] = tensors.pop(f"{key}.proj.weight").flatten(1)
    tensors[f"{key}.bias"] = tensors.pop(f"{key}.proj.bias")
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def folders(make_model, processor, vae, tmp_path_factory):
    """The same pipeline in the present layout and in the earlier one, under the same name."""
    present, earlier = (tmp_path_factory.mktemp(name) / "pipeline" for name in ("present", "earlier"))
    model = make_model(latent_patch_size=2, latent_kernel_size=4)
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(present)
    shutil.copytree(present, earlier)
    to_earlier_layout(earlier / "model" / "model.safetensors", "tower.latent_embedding")
    assert load_file(earlier / "model" / "model.safetensors")["tower.latent_embedding.weight"].shape == (32, 64)
    return present, earlier


@pytest.mark.parametrize(
    "convert",
    [
        lambda folder: regroup(folder, 2),
        lambda folder: regroup(folder, 1),
        extract_backbone,
        to_single_file,
        to_original,
        lambda folder: to_original(folder, tower_only=True),
    ],
    ids=["same experts", "regroup", "extract backbone", "to single file", "to original", "tower to original"],
)
def test_conversions_of_a_pipeline(convert, folders, files_of, tmp_path):
    plans = [convert(folder) for folder in folders]
    suffix = ".safetensors" if plans[0].single_file else ""
    outputs = [tmp_path / f"{name}{suffix}" for name in ("present", "earlier")]
    reports = [plan.write(output) for plan, output in zip(plans, outputs)]
    assert reports[0] == reports[1]
    if suffix:
        assert_same_tensors(*outputs)
    else:
        assert files_of(outputs[0]) == files_of(outputs[1])


def test_from_a_single_file(folders, files_of, tmp_path):
    present, earlier = (tmp_path / f"{name}.safetensors" for name in ("present", "earlier"))
    to_single_file(folders[0]).write(present)
    with safe_open(present, framework="pt") as file:
        metadata = file.metadata()
    # Earlier versions stored no hash.
    del metadata["sha256"]
    tensors = load_file(present)
    tensors["model.tower.latent_embedding.weight"] = tensors.pop("model.tower.latent_embedding.proj.weight").flatten(1)
    tensors["model.tower.latent_embedding.bias"] = tensors.pop("model.tower.latent_embedding.proj.bias")
    save_file(tensors, earlier, metadata)
    for path in (present, earlier):
        from_single_file(path).write(path.with_suffix(""))
    assert files_of(present.with_suffix("")) == files_of(earlier.with_suffix(""))


@pytest.mark.parametrize("tower_only", [False, True])
def test_from_a_flat_state_dict(tower_only, folders, files_of, tmp_path):
    flat = tmp_path / "flat.safetensors"
    to_original(folders[0], tower_only=tower_only).write(flat)
    from_original(flat, folders[0], tower_only=tower_only).write(tmp_path / "present")
    to_earlier_layout(flat, "x_embedder")
    from_original(flat, folders[1], tower_only=tower_only).write(tmp_path / "earlier")
    assert files_of(tmp_path / "present") == files_of(tmp_path / "earlier")


def assert_same_tensors(*paths):
    present, earlier = map(load_file, paths)
    assert present.keys() == earlier.keys()
    assert all(present[name].equal(earlier[name]) for name in present)
