# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The network: text against the stock backbone bit for bit, painting against a second implementation written out here.

`oracle_velocity` recomputes one expert's velocity in float64 with loops over pictures and heads, reading weights by
their names and sharing no code with the package. Its tolerance is that of float32, since the norms and the softmax of
the maps are computed in float32 on purpose.
"""

import copy
import inspect
import math
import re

import numpy as np
import pytest
import torch
from helpers import CLOSE, noise, same_bytes
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration, LatteFlowProcessor
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.modeling.flow_matching import draw_expert_sigmas


# Owned by expert 0 and 1 of two.
TIMESTEPS = (730.0, 210.0)


@pytest.fixture(scope="module")
def context(model, encode) -> LatteFlowContext:
    """Two prompts of different lengths, hence padded."""
    return model.encode_context(**encode("a red circle", "a small blue square above a handwritten seven"))


@pytest.fixture
def trainable(make_model):
    return make_model().train()


# Text: exactly the backbone's.


@pytest.mark.parametrize("with_picture", [False, True])
def test_text_logits_equal_the_backbone_s_bit_for_bit(model, backbone, encode, picture, with_picture):
    inputs = encode("what is this?", "how many shapes are there?", image=picture if with_picture else None)
    with torch.no_grad():
        ours, stock = model(**inputs), backbone(**inputs)
    assert type(ours) is type(stock)
    assert torch.equal(ours.logits, stock.logits)


def test_text_loss_and_tuple_equal_the_backbone_s(model, backbone, encode):
    inputs = encode("what is this?")
    with torch.no_grad():
        ours, stock = model(**inputs, labels=inputs["input_ids"]), backbone(**inputs, labels=inputs["input_ids"])
        assert torch.equal(ours.loss, stock.loss)
        as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], stock.logits)


def test_picture_changes_the_logits(model, encode, picture):
    # The two tests above would pass on a model that drops its pixels on both sides.
    inputs = encode("what is this?", image=picture)
    with torch.no_grad():
        seen = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (seen - other).abs().max() > 1e-3


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_generate_equals_the_backbone_s_token_for_token(model, backbone, encode, picture, with_picture, how):
    inputs = encode("what is this?", "how many shapes are there?", image=picture if with_picture else None)
    found = []
    for speaker in (model, backbone):
        torch.manual_seed(0)
        found.append(speaker.generate(**inputs, max_new_tokens=6, **how))
    assert found[0].shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(*found)


def test_generate_leaves_its_generation_config_alone(model, encode):
    before = model.generation_config.to_dict()
    model.generate(**encode("what is this?"), max_new_tokens=2, do_sample=True, temperature=0.5)
    assert model.generation_config.to_dict() == before


# A new model.


def test_new_model_starts_from_the_backbone_s_layers(make_model, backbone):
    model = make_model(filled=False)
    assert same_bytes(model.vlm, backbone)
    for layer, source in zip(model.tower.layers, backbone.get_decoder().layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert same_bytes(getattr(layer.self_attn, name), getattr(source.self_attn, name)), name
        assert same_bytes(layer.mlp, source.mlp)
        assert same_bytes(layer.attention_norm, source.input_layernorm)
        assert same_bytes(layer.mlp_norm, source.post_attention_layernorm)
        # The backbone of these tests has no norm weight of 1, so that copying is seen; the new norms begin at 1.
        assert (layer.attention_post_norm.weight == 1).all() and (layer.mlp_post_norm.weight == 1).all()
    weights = {p.data_ptr() for p in model.tower.parameters()}
    assert not weights & {p.data_ptr() for p in model.vlm.parameters()}


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_velocity_of_a_new_model_is_exactly_zero(make_model, encode, timestep):
    model = make_model(filled=False)
    velocity = model.predict_velocity(noise(1, 4, 4, 4), timestep, model.encode_context(**encode("a red circle")))
    assert velocity.shape == (1, 4, 4, 4)
    assert (velocity == 0).all()


def test_layers_of_a_new_model_are_the_identity(make_model, encode):
    model = make_model(filled=False)
    seen = []
    for layer in model.tower.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    model.predict_velocity(noise(1, 4, 4, 4), 900.0, model.encode_context(**encode("a red circle")))
    assert len(seen) == 2 and all(torch.equal(before, after) for before, after in seen)


def test_from_vlm_uses_the_backbone_as_it_is_and_freezes_it(backbone):
    vlm = copy.deepcopy(backbone).requires_grad_(True).train()
    model = LatteFlowForConditionalGeneration.from_vlm(vlm, num_experts=2, latent_channels=4)
    assert model.vlm is vlm and model.config.vlm_config is vlm.config
    assert not any(p.requires_grad for p in vlm.parameters()) and not vlm.training
    assert model.generation_config.eos_token_id == vlm.generation_config.eos_token_id
    assert all(p.requires_grad for p in model.tower.parameters())


def test_from_vlm_takes_the_backbone_s_dtype(backbone):
    vlm = copy.deepcopy(backbone).to(torch.bfloat16)
    model = LatteFlowForConditionalGeneration.from_vlm(vlm, num_experts=2, latent_channels=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_from_vlm_can_leave_the_layers_random(backbone):
    def differing(**given):
        torch.manual_seed(0)
        model = LatteFlowForConditionalGeneration.from_vlm(copy.deepcopy(backbone), num_experts=2, **given)
        own, theirs = model.tower.layers[1].state_dict(), backbone.get_decoder().layers[1].state_dict()
        return {name for name in own if name in theirs and not torch.equal(own[name], theirs[name])}

    weights = {f"self_attn.{n}_proj.weight" for n in "qkvo"} | {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert not differing() and differing(copy_layers=False) >= weights


def test_from_vlm_refuses_experts_that_do_not_divide(backbone):
    with pytest.raises(ValueError, match=re.escape("num_experts must divide the backbone's 4 layers, got 3")):
        LatteFlowForConditionalGeneration.from_vlm(copy.deepcopy(backbone), num_experts=3)


# Which layers run, and which weights they see.


def test_experts_own_contiguous_layers(model):
    assert [list(model.expert_layers(k)) for k in range(2)] == [[0, 1], [2, 3]]
    assert [model.expert_of(t) for t in (1000.0, 500.1, 500.0, 0.0)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("timestep", "expert"), [(1000.0, 0), (500.5, 0), (500.0, 1), (0.0, 1)])
def test_only_the_owner_s_layers_run(model, context, count_layers, timestep, expert):
    with count_layers(model) as calls:
        found = model.predict_velocity(noise(2, 4, 4, 4), timestep, context)
    assert calls == dict.fromkeys(model.expert_layers(expert), 1)
    told = model.predict_velocity(noise(2, 4, 4, 4), timestep, context, expert=expert)
    assert torch.equal(found, told)


@pytest.mark.parametrize(("timestep", "expert"), [(730.0, 0), (210.0, 1)])
def test_expert_never_depends_on_other_experts(make_model, model, context, timestep, expert):
    other = make_model()
    for index in set(range(4)) - set(model.expert_layers(expert)):
        for parameter in other.tower.layers[index].parameters():
            parameter.data.fill_(float("nan"))
    latents = noise(2, 4, 4, 4)
    expected = model.predict_velocity(latents, timestep, context)
    assert torch.equal(other.predict_velocity(latents, timestep, context), expected)
    # ... and does depend on its own.
    other.tower.layers[model.expert_layers(expert)[0]].modulation.bias.data.add_(0.5)
    assert not torch.allclose(other.predict_velocity(latents, timestep, context), expected, **CLOSE)


@pytest.mark.parametrize(("timestep", "expert"), [(730.0, 0), (210.0, 1)])
def test_expert_reads_the_backbone_s_keys_of_its_own_layers_only(model, context, timestep, expert):
    layers = model.expert_layers(expert)
    elsewhere = [torch.full_like(k, float("nan")) for k in context.keys]
    keys = tuple(k if i in layers else nan for i, (k, nan) in enumerate(zip(context.keys, elsewhere)))
    values = tuple(v if i in layers else nan for i, (v, nan) in enumerate(zip(context.values, elsewhere)))
    partial = LatteFlowContext(keys, values, context.attention_mask, context.next_position, context.has_padding)
    latents = noise(2, 4, 4, 4)
    expected = model.predict_velocity(latents, timestep, context)
    assert torch.equal(model.predict_velocity(latents, timestep, partial), expected)


# The network against a second implementation.


def linear(module, x):
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def rms_norm(module, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight


def silu(x):
    return x / (1 + torch.exp(-x))


def rotary_table(positions, head_dim, theta):
    """positions (2, N), rows and columns -> cos, sin (N, d): even frequencies turn by the row, odd by the column."""
    angles = torch.stack([positions[i % 2] * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def grid(rows, columns):
    return [(r, s) for r in range(rows) for s in range(columns)]


def wave(place, size):
    """One coordinate's sine-cosine embedding (size,); float32 like the model's, which adds it to float64."""
    angles = [place / 10000 ** (2 * i / size) for i in range(size // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]).double()


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def oracle_velocity(model, latents, timestep, context, expert):
    """One expert's velocity, picture by picture and head by head; everything float64."""
    config, text, tower = model.config, model.config.text_config, model.tower
    num_heads, num_groups = text.num_attention_heads, text.num_key_value_heads
    head_dim, eps = text.hidden_size // num_heads, text.rms_norm_eps
    mode, patch = config.residual_attention, config.latent_patch_size
    channels, height, width = latents.shape[1:]
    rows, columns = height // patch, width // patch
    first = expert * text.num_hidden_layers // config.num_experts
    last = (expert + 1) * text.num_hidden_layers // config.num_experts
    velocities = []
    for b in range(len(latents)):
        # The angles alone are float32 in the model; in float64 a timestep of 1000 would differ in the fifth digit.
        half = config.timestep_frequency_dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = torch.tensor(timestep[b], dtype=torch.float32) * frequencies
        time = torch.cat([angles.cos(), angles.sin()]).double()
        embedding = tower.timestep_embedding.mlp
        time = silu(linear(embedding.linear_2, silu(linear(embedding.linear_1, time))))

        def pixel(c, row, column, picture=latents[b]):
            inside = 0 <= row < height and 0 <= column < width
            return picture[c, row, column] if inside else torch.zeros((), dtype=torch.float64)

        around = (config.latent_kernel_size - patch) // 2
        seen = range(-around, patch + around)
        tokens = [
            torch.stack([pixel(c, r * patch + i, s * patch + j) for c in range(channels) for i in seen for j in seen])
            for r in range(rows)
            for s in range(columns)
        ]
        embedding = tower.latent_embedding.proj
        x = torch.stack(tokens) @ embedding.weight.flatten(1).T + embedding.bias
        x = x + torch.stack(
            [
                torch.cat([wave(s, text.hidden_size // 2), wave(r, text.hidden_size // 2)])
                for r, s in grid(rows, columns)
            ]
        )
        start = int(context.next_position[b])
        positions = torch.tensor([(start + r, start + s) for r, s in grid(rows, columns)]).T.double()
        cos, sin = rotary_table(positions, head_dim, text.rope_parameters["rope_theta"])

        mask = context.attention_mask[b]
        previous_maps = None
        for index in range(first, last):
            layer = tower.layers[index]
            a, c, d, e = linear(layer.modulation, time).chunk(4)
            attention, normed = layer.self_attn, rms_norm(layer.attention_norm, x, eps)
            q, k, v = (linear(getattr(attention, f"{name}_proj"), normed) for name in "qkv")
            heads, maps = [], []
            for h in range(num_heads):
                g = h // (num_heads // num_groups)
                query = turn(q[:, h * head_dim : (h + 1) * head_dim], cos, sin)
                key = turn(k[:, g * head_dim : (g + 1) * head_dim], cos, sin)
                value = v[:, g * head_dim : (g + 1) * head_dim]
                old_keys, old_values = context.keys[index][b, g][mask], context.values[index][b, g][mask]
                to_context = query @ old_keys.T / math.sqrt(head_dim)
                to_latents = query @ key.T / math.sqrt(head_dim)
                gate = 0.0
                if previous_maps is not None:
                    gate = math.tanh(float(linear(attention.residual_gate, time)[h]))
                if mode == "scores" and previous_maps is not None:
                    to_latents = to_latents + gate * previous_maps[h]
                exponentials = torch.exp(torch.cat([to_context, to_latents], dim=1))
                weights = exponentials / exponentials.sum(1, keepdim=True)
                on_context, on_latents = weights[:, : len(old_keys)], weights[:, len(old_keys) :]
                if mode == "probabilities" and previous_maps is not None:
                    on_latents = on_latents + gate * previous_maps[h]
                maps.append({"scores": to_latents, "probabilities": on_latents, None: None}[mode])
                heads.append(on_context @ old_values + on_latents @ value)
            previous_maps = None if mode is None else maps
            attended = linear(attention.o_proj, torch.cat(heads, dim=1))
            x = x + a * rms_norm(layer.attention_post_norm, attended, eps)
            mlp = layer.mlp
            inner = (1 + c) * rms_norm(layer.mlp_norm, x, eps) + d
            fed = linear(mlp.down_proj, silu(linear(mlp.gate_proj, inner)) * linear(mlp.up_proj, inner))
            x = x + e * rms_norm(layer.mlp_post_norm, fed, eps)
        scale, shift = linear(tower.head.modulation, time).chunk(2)
        out = linear(tower.head.proj, (1 + scale) * rms_norm(tower.head.norm, x, eps) + shift)
        velocity = torch.zeros(channels, height, width, dtype=torch.float64)
        for n in range(rows * columns):
            r, s = divmod(n, columns)
            velocity[:, r * patch : (r + 1) * patch, s * patch : (s + 1) * patch] = out[n].view(channels, patch, patch)
        velocities.append(velocity)
    return torch.stack(velocities)


@torch.no_grad()
@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize(("patch_size", "kernel_size"), [(1, None), (2, None), (1, 3), (2, 6)])
@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
def test_velocity_equals_the_oracle(make_model, encode, mode, patch_size, kernel_size, num_experts):
    sizes = {"latent_patch_size": patch_size, "latent_kernel_size": kernel_size}
    model = make_model(num_experts=num_experts, residual_attention=mode, **sizes).double()
    context = model.encode_context(**encode("a red circle", "a small blue square above a handwritten seven"))
    latents = noise(2, 4, 4, 6).double()
    for expert in range(num_experts):
        low, high = (1000 * model.config.expert_boundaries[expert + i] for i in (1, 0))
        timestep = [low + 0.9 * (high - low), low + 0.2 * (high - low)]
        found = model.predict_velocity(latents, torch.tensor(timestep), context)
        expected = oracle_velocity(model, latents, timestep, context, expert)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residual_attention_is_no_small_print(make_model, encode, context):
    # Else the three modes of the oracle test could be mixed up unseen.
    latents = noise(2, 4, 4, 4)
    modes = ("scores", "probabilities", None)
    found = [make_model(residual_attention=mode) for mode in modes]
    # Without gates the third has fewer weights; the seeds then fall elsewhere, so take them from the first.
    for model in found[1:]:
        model.tower.load_state_dict(found[0].tower.state_dict(), strict=False)
    velocities = [model.predict_velocity(latents, 730.0, context) for model in found]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (velocities[one] - velocities[other]).abs().max() > 1e-2


def test_first_layer_of_an_expert_has_no_gate(make_model):
    with_gate = [hasattr(layer.self_attn, "residual_gate") for layer in make_model(num_experts=2).tower.layers]
    assert with_gate == [False, True, False, True]
    without = make_model(num_experts=2, residual_attention=None)
    assert not any(hasattr(layer.self_attn, "residual_gate") for layer in without.tower.layers)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_latents_positions_continue_after_the_prompt(make_model, encode, picture, patch_size):
    model = make_model(latent_patch_size=patch_size)
    contexts = [model.encode_context(**encode("a red circle", image=i)) for i in (None, picture)]
    context = LatteFlowContext.cat(contexts)
    seen = []
    rotary = model.tower.rotary_emb
    handle = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True
    )
    model.predict_velocity(noise(2, 4, 4, 6), 730.0, context)
    handle.remove()
    rows, columns = 4 // patch_size, 6 // patch_size
    of_rows, of_columns = (call[1] for call in seen)
    for b in range(2):
        start = context.next_position[b].item()
        for axis in range(3):
            assert of_rows[axis, b].tolist() == [start + r for r, _ in grid(rows, columns)]
            assert of_columns[axis, b].tolist() == [start + c for _, c in grid(rows, columns)]
    assert context.next_position[0] != context.next_position[1]


# What is refused.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latents": noise(2, 3, 4, 4)}, "latents must be (batch, 4, height, width), got (2, 3, 4, 4)."),
        ({"latents": noise(4, 4, 4)}, "latents must be (batch, 4, height, width), got (4, 4, 4)."),
        (
            {"latents": noise(3, 4, 4, 4)},
            "context must have one prompt for each of 3 latents, or one for the same number of latents each, got 2.",
        ),
        (
            {"timestep": torch.tensor([700.0, 300.0])},
            "timestep must be in the interval of one expert, got those of [0, 1].",
        ),
        ({"timestep": torch.tensor([700.0] * 3)}, "timestep must be one, or one for each of 2 latents, got 3."),
        ({"timestep": 1000.5}, "sigma must be from 0 to 1 (a timestep from 0 to 1000), got 1.0005 (1000.5)."),
        ({"timestep": -1.0}, "sigma must be from 0 to 1 (a timestep from 0 to 1000), got -0.001 (-1.0)."),
        ({"expert": 2}, "expert must be from 0 to 1, got 2."),
        ({"expert": -1}, "expert must be from 0 to 1, got -1."),
    ],
)
def test_predict_velocity_refuses(model, context, count_layers, changed, message):
    given = {"latents": noise(2, 4, 4, 4), "timestep": 700.0, "context": context, **changed}
    with count_layers(model) as calls, pytest.raises(ValueError, match=re.escape(message)):
        model.predict_velocity(**given)
    assert not calls


def test_sides_must_be_multiples_of_the_patch(make_model, context):
    message = "latents must have a height and a width that are multiples of 2, got (4, 5)."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_model(latent_patch_size=2).predict_velocity(noise(2, 4, 4, 5), 700.0, context)


@pytest.mark.parametrize("expert", [-1, 2])
def test_expert_layers_refuses(model, expert):
    with pytest.raises(ValueError, match=f"expert must be from 0 to 1, got {expert}"):
        model.expert_layers(expert)


def test_forward_checks_latents_against_prompts(model, encode):
    with pytest.raises(ValueError, match="context must have a prompt for each of the 3 latents, got 1"):
        model(**encode("a red circle"), latents=noise(3, 4, 4, 4))


# Training.


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_flow_loss_is_the_sum_over_experts_recomputed(model, encode, batch):
    prompts = ["a red circle", "a cross", "a blue square", "a handwritten seven", "a cross above a circle"][:batch]
    inputs, data, start = encode(*prompts), noise(batch, 4, 4, 4, seed=1), noise(batch, 4, 4, 4, seed=2)
    with torch.no_grad():
        output = model(**inputs, latents=data, noise=start, generator=torch.Generator().manual_seed(7))
        # By the definition: example i goes to expert i mod K; too few examples are gone through again.
        generator, context, expected = torch.Generator().manual_seed(7), model.encode_context(**inputs), []
        for expert in range(2):
            rows = torch.tensor([i % batch for i in range(max(batch, 2)) if i % 2 == expert])
            high, low = model.config.expert_boundaries[expert : expert + 2]
            sigma = draw_expert_sigmas(len(rows), (high, low), generator)
            s = sigma[:, None, None, None]
            noisy = (1 - s) * data[rows] + s * start[rows]
            velocity = model.predict_velocity(noisy, 1000 * sigma, context.select(rows))
            expected.append((velocity - (start[rows] - data[rows])).square().mean().item())
    assert output.expert_losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert output.flow_loss.item() == pytest.approx(sum(expected), rel=1e-5)
    assert torch.equal(output.loss, output.flow_loss)
    assert output.lm_loss is None and output.logits is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_overlap_widens_the_intervals_in_training_alone(make_model, encode, monkeypatch, overlap, training):
    model = make_model().train(training)
    model.interval_overlap = overlap
    drawn = []

    def draw(count, interval, generator=None, sampling="uniform"):
        drawn.append(interval)
        return draw_expert_sigmas(count, interval, generator, sampling)

    monkeypatch.setattr("latte_flow_hf.modeling.flow_matching.draw_expert_sigmas", draw)
    with torch.no_grad():
        model(**encode("a red circle", "a cross"), latents=noise(2, 4, 4, 4))
    assert drawn == [(1.0, pytest.approx(0.5 * (1 - overlap if training else 1))), (0.5, 0.0)]


def test_labels_add_the_backbone_s_own_loss(model, backbone, encode):
    inputs, labels = encode("a red circle", "a cross"), encode("a red circle", "a cross")["input_ids"]
    with torch.no_grad():
        output = model(**inputs, labels=labels, latents=noise(2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        alone = model(**inputs, latents=noise(2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        stock = backbone(**inputs, labels=labels)
    assert torch.equal(output.lm_loss, stock.loss) and torch.equal(output.logits, stock.logits)
    assert torch.equal(output.flow_loss, alone.flow_loss)
    assert torch.equal(output.loss, alone.flow_loss + stock.loss)


@pytest.mark.parametrize(
    "prompts", [["a red circle", "a cross"], ["a cross", "a red circle above a blue square", "a"]]
)
def test_given_context_replaces_the_prompt(model, encode, prompts):
    # Equal up to rounding: without one, each expert's prompts are prefilled on their own.
    inputs, data = encode(*prompts), noise(len(prompts), 4, 4, 4)
    with torch.no_grad():
        one = model(**inputs, latents=data, generator=torch.Generator().manual_seed(0))
        other = model(context=model.encode_context(**inputs), latents=data, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.expert_losses, other.expert_losses, rtol=1e-5, atol=0)


def test_loss_follows_its_generator_and_may_be_a_tuple(model, encode):
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    with torch.no_grad():
        losses = [
            model(**inputs, latents=data, return_dict=False, generator=torch.Generator().manual_seed(seed))[0]
            for seed in (0, 0, 1)
        ]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_loss_with_a_picture_in_the_prompt(model, encode, picture):
    output = model(**encode("a red circle", "a cross", image=picture), latents=noise(2, 4, 4, 4))
    assert torch.isfinite(output.loss) and output.loss.requires_grad


def test_what_the_trainer_adds_is_taken(model, encode):
    # The stock Trainer hands this to every forward that takes keyword arguments.
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    output = model(**inputs, latents=data, num_items_in_batch=torch.tensor(2))
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_tower_parameter_learns_in_one_step_and_nothing_else(make_model, encode, batch, mode):
    model = make_model(residual_attention=mode).train()
    inputs = encode(*["a red circle", "a cross", "a blue square"][:batch])
    model(**inputs, latents=noise(batch, 4, 4, 4), generator=torch.Generator().manual_seed(0)).loss.backward()
    idle = [name for name, p in model.tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Key biases too: they move the scores on latents, not those on the context.
    assert idle == []
    assert all(p.grad is None for p in model.vlm.parameters())
    assert not any(p.requires_grad for p in model.vlm.parameters())


def test_each_expert_learns_from_its_own_share(trainable, encode):
    # The same loss, but of one expert: no gradient may reach the layers of the other.
    context = trainable.encode_context(**encode("a red circle"))
    trainable.predict_velocity(noise(1, 4, 4, 4), 210.0, context).square().sum().backward()
    with_gradient = {i for i, layer in enumerate(trainable.tower.layers) if layer.modulation.weight.grad is not None}
    assert with_gradient == {2, 3}


def test_training_step_runs_each_layer_once_and_prefills_as_deep_as_it_reads(trainable, encode, count_layers):
    prompts = encode("a red circle", "a cross", "a blue square")
    rows = dict.fromkeys(range(4), 0)

    def count(index):
        def add(module, inputs, output):
            rows[index] += len(inputs[0])

        return add

    handles = [
        layer.register_forward_hook(count(index))
        for index, layer in enumerate(trainable.vlm.model.language_model.layers)
    ]
    with count_layers(trainable) as calls:
        trainable(**prompts, latents=noise(3, 4, 4, 4))
    assert calls == dict.fromkeys(range(4), 1)
    # Two prompts for the first expert, which reads two layers; one for the second, which reads the layers above.
    assert rows == {0: 3, 1: 3, 2: 1, 3: 1}

    context = trainable.encode_context(**prompts)
    rows = dict.fromkeys(range(4), 0)
    trainable(context=context, latents=noise(3, 4, 4, 4))
    assert rows == dict.fromkeys(range(4), 0)
    for handle in handles:
        handle.remove()


def test_new_model_learns(make_model, encode):
    # From exact zero: the head's zeros must not stop all that is behind them for ever.
    model = make_model(filled=False).train()
    inputs, data, start = encode("a red circle", "a cross"), noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    before = copy.deepcopy(model.vlm)
    fresh = copy.deepcopy(model.tower)
    optimizer = torch.optim.Adam(model.tower.parameters(), lr=5e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs, latents=data, noise=start, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2 * (start - data).square().mean().item(), rel=0.5)
    assert losses[-1] < 0.5 * losses[0]
    assert same_bytes(model.vlm, before)
    old = dict(fresh.named_parameters())
    unmoved = [name for name, p in model.tower.named_parameters() if torch.equal(p, old[name])]
    assert unmoved == []


def test_gradient_checkpointing_gives_the_same_gradients(make_model, encode):
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    found = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, latents=data, generator=torch.Generator().manual_seed(0)).loss.backward()
        found.append({name: p.grad for name, p in model.tower.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_train_keeps_the_backbone_in_eval(make_model):
    model = make_model()
    assert model.train() is model
    assert model.training and model.tower.training and model.tower.layers[0].training
    assert not any(module.training for module in model.vlm.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


# Saving and loading.


def test_save_and_load_give_the_same_bytes(model, tmp_path, encode):
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    latents, inputs = noise(1, 4, 4, 4), encode("a red circle")
    with torch.no_grad():
        expected = model.predict_velocity(latents, 730.0, model.encode_context(**inputs))
    for door in (LatteFlowForConditionalGeneration, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded, report = door.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is LatteFlowForConditionalGeneration
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert same_bytes(loaded, model)
        # Frozen, tied and quiet, as it was.
        assert not any(p.requires_grad for p in loaded.vlm.parameters())
        assert all(p.requires_grad for p in loaded.tower.parameters())
        assert not loaded.training
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
        with torch.no_grad():
            found = loaded.predict_velocity(latents, 730.0, loaded.encode_context(**inputs))
        assert torch.equal(found, expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LatteFlowConfig
    assert AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).tower is not None


def test_sharded_file_gives_the_same_bytes(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_bytes(LatteFlowForConditionalGeneration.from_pretrained(tmp_path), model)


def test_new_experts_on_loading_keep_their_given_weights(make_model, tmp_path):
    # `_init_weights` zeroes modulation, gates and head: loaded ones must survive it.
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.tower.head.proj.weight != 0).all()
    assert (loaded.tower.layers[1].self_attn.residual_gate.weight != 0).all()


def test_auto_processor_opens_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LatteFlowProcessor


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        LatteFlowForConditionalGeneration.from_pretrained(tmp_path)


# Chat.


class Listener(TextStreamer):
    """A stock streamer that keeps what it would print."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


def say(model, processor, inputs, **how) -> str:
    tokens = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_chat_with_a_string(model, processor, encode, picture):
    for image in (None, picture):
        answer = model.chat(processor, "what is this?", images=image, max_new_tokens=6)
        expected = say(model, processor, encode("what is this?", image=image), max_new_tokens=6)
        assert answer == expected and answer


def test_chat_over_several_turns(model, processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "what colour is it?"},
    ]
    given = copy.deepcopy(messages)
    answer = model.chat(processor, messages, max_new_tokens=6)
    inputs = processor(
        text=[
            processor.apply_chat_template(processor.conversation(messages), add_generation_prompt=True, tokenize=False)
        ],
        images=[picture],
        return_tensors="pt",
    )
    assert answer == say(model, processor, inputs, max_new_tokens=6)
    assert answer != model.chat(processor, messages[:1], max_new_tokens=6)
    # The conversation is the caller's.
    assert [m["role"] for m in messages] == [m["role"] for m in given] and messages[1] == given[1]


def test_chat_streams_what_it_answers(model, processor, picture):
    listener = Listener(processor.tokenizer)
    answer = model.chat(processor, "what is this?", images=[picture], streamer=listener, max_new_tokens=8)
    assert "".join(listener.pieces).strip() == answer
    assert len([piece for piece in listener.pieces if piece]) > 1


def test_chat_answers_at_most_256_tokens_unless_told(make_model, processor):
    model = make_model()
    model.generation_config.eos_token_id = None
    counts = []
    model.vlm.register_forward_hook(lambda *_: counts.append(1))
    model.chat(processor, "what is this?")
    assert len(counts) == 256


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.int64), 7, {"no": "picture"}])
def test_chat_refuses_what_is_no_picture(model, processor, image):
    with pytest.raises(ValueError, match=f"an image must be .*{type(image).__name__}"):
        model.chat(processor, "what is this?", images=image)


def test_chat_refuses_a_file_that_is_no_picture(model, processor, text_file):
    with pytest.raises(ValueError, match=f"image .*{re.escape(str(text_file))}.* cannot be read"):
        model.chat(processor, "what is this?", images=str(text_file))


@pytest.mark.parametrize(
    ("call", "config", "checkpoint", "expected"),
    [
        ({}, None, {}, 256),
        ({}, None, {"max_new_tokens": 7}, 7),
        ({}, {}, {"max_new_tokens": 7}, 7),
        ({}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, 5),
        ({"max_new_tokens": 3}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, 3),
        ({"max_new_tokens": np.int64(3)}, None, {}, 3),
        ({"max_length": 40}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, "up to 40"),
        ({}, {"max_length": 40}, {"max_new_tokens": 7}, "up to 40"),
    ],
    ids=range(8),
)
def test_chat_takes_its_length_from_the_nearest_config(make_model, processor, call, config, checkpoint, expected):
    model = make_model()
    model.generation_config.update(eos_token_id=None, **checkpoint)
    counts = []
    model.vlm.register_forward_hook(lambda *_: counts.append(1))
    generation_config = None if config is None else GenerationConfig(**config)
    model.chat(processor, "what is this?", generation_config=generation_config, **call)
    if expected == "up to 40":
        expected = 40 - processor.encode_conversations([processor.conversation("what is this?")])["input_ids"].shape[1]
    assert len(counts) == expected


def test_a_given_generation_config_is_completed_by_the_checkpoint_s(make_model, encode):
    model = make_model()
    inputs = encode("what is this?")
    tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(tokens[0])
    model.vlm.generation_config.eos_token_id = None
    given = GenerationConfig(max_new_tokens=8)
    assert model.generate(**inputs, generation_config=given).shape[1] == inputs["input_ids"].shape[1] + 1
    assert given.eos_token_id is None


def test_chat_answers_with_every_form_of_output(model, processor, picture):
    question = "what is this?"
    expected = model.chat(processor, question, picture, max_new_tokens=6)
    assert model.chat(processor, question, picture, max_new_tokens=6, return_dict_in_generate=True) == expected
    given = GenerationConfig(max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert model.chat(processor, question, picture, generation_config=given) == expected


@pytest.mark.parametrize("several", [{"num_return_sequences": 2}, {"generation_config": 2}])
def test_chat_refuses_several_answers(model, processor, several):
    if "generation_config" in several:
        several = {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)}
    with pytest.raises(ValueError, match="num_return_sequences must be 1 in chat, got 2"):
        model.chat(processor, "what is this?", **several)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_chat_refuses_a_backbone_that_overflows(make_model, processor, value, do_sample):
    model = make_model()
    with torch.no_grad():
        model.vlm.get_decoder().norm.weight.fill_(value)
    with pytest.raises(ValueError, match=r"the backbone's logits are not finite in dtype torch\.float32"):
        model.chat(processor, "what is this?", do_sample=do_sample)


def test_forbidden_tokens_are_no_overflow(model, processor):
    plain = model.chat(processor, "what is this?", max_new_tokens=4)
    forbidden = processor.tokenizer(plain)["input_ids"]
    assert model.chat(processor, "what is this?", max_new_tokens=4, suppress_tokens=forbidden) != plain


@pytest.fixture
def warned(caplog):
    """What has been logged; what is logged once is logged again in each test."""
    transformers_logging.warning_once.cache_clear()
    return caplog


def test_a_prompt_beyond_the_positions_is_warned_of_once(make_model, processor, encode, picture, warned):
    model = make_model()
    model.config.text_config.max_position_embeddings = 40
    long = "a red circle " * 20
    model.encode_context(**encode("a red circle"))
    # 16 tokens of an image take 4 positions.
    inputs = encode("what is this?", image=picture)
    assert inputs["input_ids"].shape[1] > 40
    model.encode_context(**inputs)
    assert warned.messages == []
    model.encode_context(**encode(long))
    model.encode_context(**encode("a red circle", long))
    model.chat(processor, long, max_new_tokens=1)
    assert ["more tokens than the 40 positions" in message for message in warned.messages].count(True) == 1


def test_unknown_words_are_warned_of_if_the_checkpoint_tells_its_own(make_model, processor, warned):
    model = make_model()
    model.chat(processor, "what is a dog?", max_new_tokens=1)
    assert warned.messages == []
    model.config.trained_words = ["a", "circle", "is", "red", "what"]
    model.chat(processor, "What is a red, red circle?", max_new_tokens=1)
    assert warned.messages == []
    model.chat(processor, [{"role": "user", "content": "What is a Dog near a cat?"}], max_new_tokens=1)
    (message,) = warned.messages
    assert message.startswith(
        "The model never learned the words ['dog', 'near', 'cat']: expect a wrong answer or image."
    )
    assert message.endswith("It knows a, circle, is, red, what.")


def test_an_adapter_may_have_taught_other_words(make_model, processor, warned):
    model = make_model()
    model.config.trained_words = ["circle"]
    model.add_adapter(LoraConfig(target_modules=r"tower\..*q_proj"))
    model.chat(processor, "a dog", max_new_tokens=1)
    assert not any("never learned" in message for message in warned.messages)


def test_forward_names_what_the_processor_returns(processor):
    # The Trainer removes the inputs that the signature does not name.
    assert set(processor.model_input_names) <= set(
        inspect.signature(LatteFlowForConditionalGeneration.forward).parameters
    )


def test_image_features_are_the_backbone_s(model, backbone, encode, picture):
    inputs = encode("what is this?", image=picture)
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    found, expected = (one.get_image_features(**vision).pooler_output for one in (model, backbone))
    assert len(found) == 1 and torch.equal(found[0], expected[0])


def test_chat_refuses_nothing_to_say(model, processor):
    with pytest.raises(ValueError, match=r"messages must be a string or a non-empty list of messages, got \[\]"):
        model.chat(processor, [])
