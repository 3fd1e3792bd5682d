# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Off-loading: the same picture and the same answer, from weights that wait elsewhere.

Where there is no accelerator the CPU is given as the device to run on. Weights still leave the modules between calls,
to the meta device or to files, so that a module no hook brings back would compute with what is not there.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload

from latte_flow_hf import LatteFlowPipeline


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = [CPU, pytest.param(GPU, marks=CUDA)]


@pytest.fixture
def own(pipe):
    """A pipeline whose components are its own: hooks stay on what they were put on."""
    own = LatteFlowPipeline(**{name: copy.deepcopy(component) for name, component in pipe.components.items()})
    own.set_progress_bar_config(disable=True)
    return own


def paint(pipe):
    # Two prompts of different lengths, both branches of guidance, both experts.
    return pipe(
        ["a red circle", "a small blue square above a handwritten seven"],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images.cpu()


def answer(pipe, picture):
    return pipe.chat("what is this?", images=picture, max_new_tokens=4)


def assert_same(pipe, other, picture, device):
    close = {"rtol": 0, "atol": 0} if device == CPU else {"rtol": 1e-3, "atol": 1e-3}
    # Twice: what the first call leaves behind must do for the second.
    for _ in range(2):
        torch.testing.assert_close(paint(other), paint(pipe), **close)
        assert answer(other, picture) == answer(pipe, picture)


@pytest.mark.parametrize("device", DEVICES)
def test_model_cpu_offload(pipe, own, picture, monkeypatch, device):
    own.enable_model_cpu_offload(device=device)
    brought = []
    for name in ("model", "vae"):
        hook = getattr(own, name)._hf_hook

        def pre_forward(*args, name=name, bring=hook.pre_forward):
            brought.append(name)
            return bring(*args)

        monkeypatch.setattr(hook, "pre_forward", pre_forward)
    paint(own)
    # The model for the prompts, for the empty one and for each of four steps; then the autoencoder.
    assert brought == ["model"] * 6 + ["vae"]
    assert_same(pipe, own, picture, device)
    assert {p.device for p in own.model.parameters()} == {CPU}


@pytest.mark.parametrize("device", DEVICES)
def test_sequential_cpu_offload(pipe, own, picture, device):
    if device == CPU:
        # `enable_sequential_cpu_offload` names the device "cpu:0", which accelerate then takes for another than "cpu".
        for component in (own.model, own.vae):
            cpu_offload(component, CPU)
    else:
        own.enable_sequential_cpu_offload()
    assert {p.device.type for p in own.model.parameters()} == {"meta"}
    assert own._execution_device.type == device.type
    assert_same(pipe, own, picture, device)
    assert {p.device.type for p in own.model.parameters()} == {"meta"}


BLOCKS, LEAVES = {"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [BLOCKS, LEAVES])
def test_group_offload(pipe, own, picture, how, device):
    own.enable_group_offload(onload_device=device, **how)
    assert_same(pipe, own, picture, device)


@pytest.mark.parametrize("device", DEVICES)
def test_group_offload_to_disk(pipe, own, picture, tmp_path, device):
    own.enable_group_offload(onload_device=device, offload_to_disk_path=str(tmp_path), **BLOCKS)
    # In the weights' place diffusers leaves memory as it comes, which may still hold them.
    for component in (own.model, own.vae):
        for parameter in component.parameters():
            parameter.data.fill_(float("nan"))
    assert_same(pipe, own, picture, device)


def test_group_offload_that_would_lose_weights_is_refused(own, tmp_path):
    with pytest.raises(ValueError, match="'leaf_level' cannot go to disk: the language head is tied"):
        own.enable_group_offload(onload_device=CPU, offload_to_disk_path=str(tmp_path), **LEAVES)
    assert not list(tmp_path.iterdir()) and not hasattr(own.model.vlm.lm_head, "_diffusers_hook")


@pytest.mark.parametrize("device", DEVICES)
def test_expert_offload(pipe, own, picture, monkeypatch, device):
    own.enable_expert_offload(device)
    offload, layers = own.model.tower.expert_offload, own.model.tower.layers
    size = sum(p.numel() for p in layers.parameters())
    home = {p: p.data_ptr() for p in layers.parameters()}
    live, order = [], []
    for index, layer in enumerate(layers):

        def look(*_, index=index):
            order.append(index)
            away = [p for p in layers.parameters() if p.data_ptr() != home[p]]
            assert {id(p) for p in away} == {id(p) for i in offload.live for p in layers[i].parameters()}
            live.append(sum(p.numel() for p in away) / size)

        layer.register_forward_hook(look)
    assert_same(pipe, own, picture, device)
    # Two pictures of two steps an expert; each of two experts was fetched once a picture, two layers each.
    assert order == [0, 1, 0, 1, 2, 3, 2, 3] * 2 and offload.transfers == 2 * len(layers)
    assert max(live) <= 1 / 2 + 0.1
    # Between calls all weights are at home.
    assert not offload.live and {p: p.data_ptr() for p in layers.parameters()} == home

    with pytest.raises(ValueError, match="another off-loading"):
        pipe.model._hf_hook = None
        try:
            pipe.enable_expert_offload(device)
        finally:
            del pipe.model._hf_hook
    own.disable_expert_offload()
    assert {p.device.type for p in own.model.parameters()} == {device.type}
    assert_same(pipe, own, picture, device)


@pytest.mark.parametrize("steps", [[1, 1], [3, 0], [1, 2]])
def test_expert_offload_whatever_the_steps(pipe, own, steps):
    own.enable_expert_offload("cpu")

    def paint(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", steps_per_expert=steps, generator=generator, output_type="latent").images

    assert torch.equal(paint(own), paint(pipe))
    # A velocity by itself, of the second expert and of the first.
    context = pipe.encode_prompt("a red circle")[0]
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in (100.0, 900.0):
        found, expected = (p.model.predict_velocity(latents, timestep, context) for p in (own, pipe))
        assert torch.equal(found, expected)
        assert len(own.model.tower.expert_offload.live) == 2


def test_offload_needs_an_accelerator(own):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for switch in (own.enable_model_cpu_offload, own.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            switch()
