# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Off-loading by accelerate and diffusers: the same images and answers from weights that are kept elsewhere.

Without an accelerator, the CPU is given as the device to run on. Between calls the weights are still taken away, to
the meta device or to files, so that a module without its hook would compute with missing weights.
"""

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from latte_flow_hf import LatteFlowInpaintPipeline
from latte_flow_hf.pipelines.offloading import runs_only_in_forward


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = [CPU, pytest.param(GPU, marks=CUDA)]


def generate(pipe):
    # Two prompts of different lengths, both branches of guidance, both experts.
    return pipe(
        ["a red circle", "a small blue square above a handwritten seven"],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images.cpu()


def generate_part(pipe, picture):
    """Encodes an image first, and runs one expert only."""
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 32, 64))
    inpaint = LatteFlowInpaintPipeline.from_pipe(pipe)
    call = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return inpaint("a red circle", picture, mask, 0.5, **call).images.cpu()


def answer(pipe, picture):
    return pipe.chat("what is this?", images=picture, max_new_tokens=4)


@pytest.fixture
def assert_same(pipe, picture, monkeypatch):
    def assert_same(offloaded, device):
        expected = generate(pipe)
        # Twice, because the second call starts from what the first one leaves behind.
        for _ in range(2):
            close = {"rtol": 0, "atol": 1e-5} if device == CPU else {"rtol": 1e-3, "atol": 1e-3}
            torch.testing.assert_close(generate(offloaded), expected, **close)
            assert answer(offloaded, picture) == answer(pipe, picture)
            torch.testing.assert_close(generate_part(offloaded, picture), generate_part(pipe, picture), **close)
        if device == CPU:
            # The same bits, if both compute modulations step by step.
            only_in_forward = runs_only_in_forward(offloaded.model.tower)
            name = "latte_flow_hf.pipelines.denoising.runs_only_in_forward"
            monkeypatch.setattr(name, lambda tower: only_in_forward)
            assert torch.equal(generate(offloaded), generate(pipe))

    return assert_same


@pytest.mark.parametrize("device", DEVICES)
def test_model_cpu_offload(own_pipe, assert_same, monkeypatch, device):
    own_pipe.enable_model_cpu_offload(device=device)
    assert not runs_only_in_forward(own_pipe.model.tower)
    calls = []
    for name in ("model", "vae"):
        hook = getattr(own_pipe, name)._hf_hook

        def pre_forward(*args, name=name, original=hook.pre_forward):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(hook, "pre_forward", pre_forward)
    generate(own_pipe)
    # The model for all prompts, for the modulations of two experts and for each of four steps; then the autoencoder.
    assert calls == ["model"] * 7 + ["vae"]
    assert_same(own_pipe, device)
    assert {p.device for p in own_pipe.model.parameters()} == {CPU}


@pytest.mark.parametrize("device", DEVICES)
def test_sequential_cpu_offload(own_pipe, assert_same, device):
    if device == CPU:
        # `enable_sequential_cpu_offload` names the device "cpu:0", which accelerate takes for another than "cpu".
        for component in (own_pipe.model, own_pipe.vae):
            cpu_offload(component, CPU)
    else:
        own_pipe.enable_sequential_cpu_offload()
    assert {p.device.type for p in own_pipe.model.parameters()} == {"meta"}
    assert own_pipe._execution_device.type == device.type
    assert runs_only_in_forward(own_pipe.model.tower)
    assert_same(own_pipe, device)
    assert {p.device.type for p in own_pipe.model.parameters()} == {"meta"}


BLOCKS, LEAVES = {"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [BLOCKS, LEAVES])
def test_group_offload(own_pipe, assert_same, how, device):
    own_pipe.enable_group_offload(onload_device=device, **how)
    assert runs_only_in_forward(own_pipe.model.tower)
    assert_same(own_pipe, device)


@pytest.mark.parametrize("device", DEVICES)
def test_group_offload_to_disk(own_pipe, assert_same, tmp_path, device):
    own_pipe.enable_group_offload(onload_device=device, offload_to_disk_path=str(tmp_path), **BLOCKS)
    # diffusers leaves uninitialized memory in place of the weights, which may still hold them.
    for component in (own_pipe.model, own_pipe.vae):
        for parameter in component.parameters():
            parameter.data.fill_(float("nan"))
    assert_same(own_pipe, device)


def test_offload_needs_an_accelerator(own_pipe):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for enable in (own_pipe.enable_model_cpu_offload, own_pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            enable()
