# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Half precision, int8 and 4-bit weights: close to float32, and closer than a prompt is to another.

The bounds are a few times what was measured, the velocity's relative error: float16 0.2%, bfloat16 1.6%, int8 2.2%.
Another prompt changes the velocity by 15% to 22%.
"""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint


BOUND = {torch.float16: 0.005, torch.bfloat16: 0.05, "int8": 0.05, "nf4": 0.5}


def velocity(model, encode, prompt="a red circle", timestep=730.0):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        return model.predict_velocity(latents, timestep, model.encode_context(**encode(prompt))).float()


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def paint(pipe, prompt="a red circle"):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=4, generator=generator, output_type="pt").images.float()


@pytest.fixture(scope="module")
def saved(model, processor, vae, tmp_path_factory):
    """A pipeline's folder. The session's model goes through it as a copy."""

    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(copy.deepcopy(model), processor, vae, scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("timestep", [999.0, 730.0, 210.0, 3.0])
@pytest.mark.parametrize("how", ["to", "dtype="])
def test_half_precision_is_close(model, saved, encode, dtype, timestep, how):
    if how == "to":
        half = copy.deepcopy(model).to(dtype)
    else:
        half = LatteFlowForConditionalGeneration.from_pretrained(saved / "model", dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    expected = velocity(model, encode, timestep=timestep)
    found = distance(velocity(half, encode, timestep=timestep), expected)
    assert 0 < found < BOUND[dtype]
    assert distance(velocity(model, encode, "a blue square", timestep), expected) > 2 * BOUND[dtype]


def test_half_is_float16(model, encode):
    half = copy.deepcopy(model).half()
    assert torch.equal(velocity(half, encode), velocity(copy.deepcopy(model).to(torch.float16), encode))


def test_bfloat16_tells_neighbouring_timesteps_apart(model):
    # bfloat16 has eight bits: from 512 on it would round timesteps to multiples of four.
    embed = copy.deepcopy(model).to(torch.bfloat16).tower.timestep_embedding
    angles = embed.frequencies(torch.tensor([999.0, 998.0]))
    assert angles.dtype == torch.float32 and (angles[0] - angles[1]).abs().max() > 0.1
    expected = model.tower.timestep_embedding(torch.tensor([999.0]))
    assert distance(embed(torch.tensor([999.0])).float(), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipeline_in_half_precision(pipe, saved, dtype):
    half = LatteFlowPipeline.from_pretrained(saved, dtype=dtype)
    cast = LatteFlowPipeline.from_pretrained(saved).to(dtype)
    expected = paint(pipe)
    for other in (half, cast):
        other.set_progress_bar_config(disable=True)
        assert other.vae.dtype == other.model.dtype == dtype
        found = paint(other)
        assert found.isfinite().all() and found.std() > 0.01
        assert 0 < (found - expected).abs().mean() < 0.02
        assert isinstance(other.chat("what is this?", max_new_tokens=3), str)


# Quantization.

# Small, and the size of every layer's output hangs on them.
STAY = ("latent_embedding", "timestep_embedding", "modulation", "residual_gate", "head")


def assert_quantized(model, is_quantized):
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in linear.items() if is_quantized(module)}
    kept = {name for name in linear if name == "vlm.lm_head" or any(word in name.split(".") for word in STAY)}
    assert quantized == set(linear) - kept
    assert len([name for name in quantized if name.startswith("tower.layers.")]) == 4 * 7


def int8():
    config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig(version=2)
    return TorchAoConfig(config), lambda module: "Int8" in type(module.weight).__name__


@pytest.mark.parametrize("door", ["model", "pipeline"])
def test_torchao_int8_weights(model, pipe, saved, encode, tmp_path, door):
    config, is_quantized = int8()
    if door == "model":
        found = LatteFlowForConditionalGeneration.from_pretrained(saved / "model", quantization_config=config)
        painter = LatteFlowPipeline.from_pretrained(saved, model=found)
    else:
        mapping = PipelineQuantizationConfig(quant_mapping={"model": config})
        painter = LatteFlowPipeline.from_pretrained(saved, quantization_config=mapping)
    painter.set_progress_bar_config(disable=True)
    assert_quantized(painter.model, is_quantized)
    for timestep in (730.0, 210.0):
        expected = velocity(model, encode, timestep=timestep)
        assert 0 < distance(velocity(painter.model, encode, timestep=timestep), expected) < BOUND["int8"]
        assert distance(velocity(model, encode, "a blue square", timestep), expected) > 2 * BOUND["int8"]
    picture = paint(painter)
    assert picture.isfinite().all() and 0 < (picture - paint(pipe)).abs().mean() < 0.02
    painter.save_pretrained(tmp_path)
    size = [(folder / "model" / "model.safetensors").stat().st_size for folder in (tmp_path, saved)]
    assert size[0] < size[1]
    again = LatteFlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_quantized(again.model, is_quantized)
    assert torch.equal(paint(again), picture)


def test_own_exceptions_are_added(saved):
    config, is_quantized = int8()
    config.modules_to_not_convert = ["vlm"]
    found = LatteFlowForConditionalGeneration.from_pretrained(saved / "model", quantization_config=config)
    names = [n for n, m in found.named_modules() if isinstance(m, torch.nn.Linear) and is_quantized(m)]
    assert names and not any(n.startswith("vlm.") or any(w in n.split(".") for w in STAY) for n in names)


def test_bitsandbytes_4_bit(encode):
    # Of the embedded checkpoint: its CPU kernel takes no rows shorter than 64.
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = Path(tiny_checkpoint()) / "model"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    found = LatteFlowForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    linear = {name: module for name, module in found.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = [name for name, module in linear.items() if not isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert all(name == "vlm.lm_head" or any(word in name.split(".") for word in STAY) for name in kept)
    expected = LatteFlowForConditionalGeneration.from_pretrained(folder)
    latents = torch.randn(1, expected.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (m.predict_velocity(latents, 730.0, m.encode_context(**encode("a"))) for m in (found, expected))
    assert 0 < distance(one, other) < BOUND["nf4"]


# The autoencoder's own switches.


def test_tiling_and_slicing_give_the_same_picture(pipe, make_vae):
    vae = make_vae()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        vae.enable_slicing()
        torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-5, atol=1e-5)
        vae.disable_slicing()
        # Up to one tile, the very same.
        vae.enable_tiling()
        assert torch.equal(vae.decode(latents).sample, expected)
        # Four tiles of 96 pixels, blended over 32. Far from a tile's edge nothing changes; near it, little.
        vae.enable_tiling(96, 96, 64, 64)
        tiled = vae.decode(latents).sample
        torch.testing.assert_close(tiled[..., :40, :40], expected[..., :40, :40], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiled[..., -24:, -24:], expected[..., -24:, -24:], rtol=1e-2, atol=1e-1)
        assert 0 < (tiled - expected).abs().mean() < 0.1 * expected.std()
