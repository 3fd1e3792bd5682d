# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Incomplete and damaged local pipelines: the error names the file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from safetensors.torch import load_file, save_file

from latte_flow_hf import LatteFlowPipeline


@pytest.fixture
def damaged(pipeline, tmp_path):
    """A copy to break, with 4 GB to load it in: a model built from defaults has 72 billion parameters.

    Without the limit the failure of such a test would be the machine's out-of-memory killer, which may hit others.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, hard))
    yield shutil.copytree(pipeline, tmp_path / "damaged")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("component", ["model", "vae"])
def test_truncated_weights_are_named(damaged, component):
    (weights,) = (damaged / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises((OSError, ValueError), match=re.escape(weights.name)):
        LatteFlowPipeline.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("model/model.safetensors", "model.safetensors"),
        ("model/config.json", "config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("vae/config.json", "config.json"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("processor/processor_config.json", "processor"),
        ("processor/tokenizer.json", "tokenizer"),
        ("model_index.json", "model_index.json"),
    ],
)
def test_missing_file_is_named(damaged, file, named):
    (damaged / file).unlink()
    with pytest.raises((OSError, ValueError), match=re.escape(named)) as caught:
        LatteFlowPipeline.from_pretrained(damaged)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", "model/config.json", "scheduler/scheduler_config.json"])
def test_truncated_configuration_is_named(damaged, file):
    path = damaged / file
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises((OSError, ValueError), match=re.escape(path.name)):
        LatteFlowPipeline.from_pretrained(damaged)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_an_autoencoder_that_lacks_a_tensor_is_refused(name, damaged):
    path = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_in.weight"]
    save_file(weights, damaged / "vae" / name)
    message = rf"{name} lacks tensors of AutoencoderDC: decoder\.conv_in\.weight; save or"
    with pytest.raises(OSError, match=message):
        LatteFlowPipeline.from_pretrained(damaged)
    # Where diffusers loads the components before our classes are asked.
    with pytest.raises(OSError, match=message):
        DiffusionPipeline.from_pretrained(damaged)
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(damaged / "vae"))
    assert LatteFlowPipeline.from_pretrained(damaged, vae=vae).vae is vae


def test_a_sharded_autoencoder_is_complete(damaged):
    vae = AutoencoderDC.from_pretrained(damaged / "vae")
    shutil.rmtree(damaged / "vae")
    vae.save_pretrained(damaged / "vae", max_shard_size="20KB")
    assert len(list((damaged / "vae").glob("*.safetensors"))) > 1
    loaded = LatteFlowPipeline.from_pretrained(damaged).vae.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("as_type", [str, Path])
def test_missing_folder_is_named(tmp_path, as_type):
    with pytest.raises((OSError, ValueError), match=re.escape(str(tmp_path / "nowhere"))):
        LatteFlowPipeline.from_pretrained(as_type(tmp_path / "nowhere"))


def test_checkpoint_whose_scheduler_disagrees_is_refused(damaged):
    path = damaged / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "expert_boundaries": [1.0, 0.25, 0.0]}))
    with pytest.raises(ValueError, match=re.escape("[1.0, 0.25, 0.0] are not the model's [1.0, 0.5, 0.0]")):
        LatteFlowPipeline.from_pretrained(damaged)
