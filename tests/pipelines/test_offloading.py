# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Expert off-loading in the pipeline: the same images and answers, with one expert on the device at a time."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layerwise_casting,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from torch.distributed.tensor import DTensor, init_device_mesh

from latte_flow_hf.pipelines.offloading import has_forward_hooks, runs_only_in_forward, uses_shared_state


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = [CPU, pytest.param(GPU, marks=CUDA)]


def generate(pipe, **arguments):
    # Two prompts of different lengths, both branches of guidance, both experts.
    prompts = ["a red circle", "a small blue square above a handwritten seven"]
    arguments = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe(prompts, output_type="pt", **arguments).images.cpu()


def assert_same(pipe, offloaded, picture, device):
    close = {"rtol": 0, "atol": 0} if device == CPU else {"rtol": 1e-3, "atol": 1e-3}
    # Twice, because the second call starts from what the first one leaves behind.
    for _ in range(2):
        torch.testing.assert_close(generate(offloaded), generate(pipe), **close)
        answers = [p.chat("what is this?", images=picture, max_new_tokens=4) for p in (offloaded, pipe)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("device", DEVICES)
def test_one_expert_is_on_the_device(pipe, own_pipe, picture, device):
    own_pipe.enable_expert_offload(device)
    offload, layers = own_pipe.expert_offload, own_pipe.model.tower.layers
    size = sum(p.numel() for p in layers.parameters())
    cpu_pointers = {p: p.data_ptr() for p in layers.parameters()}
    shares, order, handles = [], [], []
    for index, layer in enumerate(layers):

        def record(*_, index=index):
            order.append(index)
            moved = [p for p in layers.parameters() if p.data_ptr() != cpu_pointers[p]]
            assert {id(p) for p in moved} == {id(p) for i in offload.loaded_layers for p in layers[i].parameters()}
            shares.append(sum(p.numel() for p in moved) / size)

        handles.append(layer.register_forward_hook(record))
    assert_same(pipe, own_pipe, picture, device)
    for handle in handles:
        handle.remove()
    # Two calls with two steps for each of two experts; each expert has two layers and is transferred once in a call.
    assert order == [0, 1, 0, 1, 2, 3, 2, 3] * 2 and offload.num_transfers == 2 * len(layers)
    assert max(shares) <= 1 / 2
    # Between calls all weights are on the CPU.
    assert not offload.loaded_layers and {p: p.data_ptr() for p in layers.parameters()} == cpu_pointers

    own_pipe.disable_expert_offload()
    assert own_pipe.expert_offload is None
    assert {p.device.type for p in own_pipe.model.parameters()} == {device.type}
    assert_same(pipe, own_pipe, picture, device)
    assert offload.num_transfers == 2 * len(layers)


@pytest.mark.parametrize("steps", [[1, 1], [3, 0], [1, 2]])
def test_any_steps_per_expert(pipe, own_pipe, steps):
    own_pipe.enable_expert_offload("cpu")
    found, expected = (generate(p, steps_per_expert=steps) for p in (own_pipe, pipe))
    assert torch.equal(found, expected)
    assert own_pipe.expert_offload.num_transfers == 2 * sum(n > 0 for n in steps)


def test_without_the_pipeline(pipe, own_pipe):
    own_pipe.enable_expert_offload("cpu")
    context = pipe.encode_prompt("a red circle")[0]
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in (100.0, 900.0):
        found, expected = (p.model.predict_velocity(latents, timestep, context) for p in (own_pipe, pipe))
        assert torch.equal(found, expected)
        assert len(own_pipe.expert_offload.loaded_layers) == 2


def test_a_call_that_failed_leaves_nothing_behind(pipe, own_pipe):
    own_pipe.enable_expert_offload("cpu")

    def fail(pipe, step, timestep, tensors):
        if step == 1:  # the last step of the first expert, after its layers made room
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate(own_pipe, callback_on_step_end=fail)
    assert torch.equal(generate(own_pipe), generate(pipe))
    assert not own_pipe.expert_offload.loaded_layers


def test_another_off_loading_is_refused(own_pipe):
    add_hook_to_module(own_pipe.model, ModelHook())
    with pytest.raises(ValueError, match="another off-loading moves the same weights"):
        own_pipe.enable_expert_offload("cpu")
    assert own_pipe.expert_offload is None


def test_group_offload_that_would_lose_weights_is_refused(own_pipe, tmp_path):
    with pytest.raises(ValueError, match="'leaf_level' cannot go to disk: the language head is tied"):
        own_pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert not list(tmp_path.iterdir()) and not hasattr(own_pipe.model.vlm.lm_head, "_diffusers_hook")


def test_sharded_layers_run_only_in_forward(model, tmp_path):
    tower = copy.deepcopy(model.tower)
    assert not runs_only_in_forward(tower)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(tower.layers[0].modulation.weight.detach(), init_device_mesh("cpu", (1,)))
        tower.layers[0].modulation.weight = torch.nn.Parameter(sharded)
        assert runs_only_in_forward(tower)
    finally:
        torch.distributed.destroy_process_group()


# Caches of diffusers.


@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(),
        FasterCacheConfig(),
        FirstBlockCacheConfig(),
        MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4),
        PyramidAttentionBroadcastConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_enable_cache_is_refused(model, config):
    with pytest.raises(ValueError, match=f"{type(config).__name__} is not supported: diffusers' caches find no layer"):
        model.enable_cache(config)


def apply_faster(model):
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BCHW"
    )
    apply_faster_cache(model, config)


def apply_taylor(model):
    apply_taylorseer_cache(model.tower, TaylorSeerCacheConfig(cache_identifiers=[r"layers\.\d+\.mlp"]))


@pytest.mark.parametrize(
    ("apply", "hook"), [(apply_faster, "faster_cache_denoiser"), (apply_taylor, "taylorseer_cache")]
)
def test_a_call_with_a_cache_is_refused(own_pipe, pipe, apply, hook):
    apply(own_pipe.model)
    with pytest.raises(
        ValueError, match=rf"model has the hooks \['{hook}'\], but caches of diffusers are not supported"
    ):
        generate(own_pipe)
    for module in own_pipe.model.modules():
        if hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(hook, recurse=False)
    torch.testing.assert_close(generate(own_pipe), generate(pipe), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "apply",
    [
        lambda model: apply_taylorseer_cache(model, TaylorSeerCacheConfig()),
        lambda model: apply_pyramid_attention_broadcast(
            model,
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
        ),
        lambda model: apply_mag_cache(model, MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4)),
    ],
    ids=["TaylorSeer", "PyramidAttentionBroadcast", "MagCache"],
)
def test_caches_that_find_no_layer_leave_no_trace(own_pipe, pipe, apply):
    """They look for names and classes of diffusers' models, and say nothing: nothing is faster, and nothing wrong."""
    apply(own_pipe.model)
    assert not has_forward_hooks(own_pipe.model) and not uses_shared_state(own_pipe.model)
    assert torch.equal(generate(own_pipe), generate(pipe))


@pytest.mark.parametrize(
    "apply",
    [
        lambda tower: apply_first_block_cache(tower, FirstBlockCacheConfig()),
        lambda tower: apply_mag_cache(tower, MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4)),
    ],
    ids=["FirstBlockCache", "MagCache"],
)
def test_caches_that_find_the_layers_do_not_know_them(own_pipe, apply):
    with pytest.raises(ValueError, match=r"LatteFlowLayer.* not registered"):
        apply(own_pipe.model.tower)


def test_hooks_that_keep_nothing_are_allowed(own_pipe, pipe):
    apply_layerwise_casting(own_pipe.model.tower.layers, torch.bfloat16, torch.float32)
    assert (generate(own_pipe) - generate(pipe)).abs().max() < 0.2
