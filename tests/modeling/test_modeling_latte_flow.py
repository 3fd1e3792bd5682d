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

import pytest
import torch
from helpers import CLOSE, noise, same_bytes
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration, LatteFlowProcessor
from latte_flow_hf.modeling.context import LatteFlowContext


# Owned by expert 0 and 1 of two.
TIMESTEPS = (730.0, 210.0)


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


def test_arguments_that_forward_names_reach_the_backbone(model, backbone, encode):
    inputs = encode("what is this?", "how many shapes are there?")
    embeds = backbone.get_input_embeddings()(inputs["input_ids"]) * 0.5
    mask = inputs["attention_mask"]
    given = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) * 3).expand(3, -1, -1),
        "logits_to_keep": 2,
    }
    assert set(given) <= set(inspect.signature(model.forward).parameters)  # or the Trainer would remove them
    with torch.no_grad():
        ours, stock = model(**given, use_cache=True), backbone(**given, use_cache=True)
        assert torch.equal(ours.logits, stock.logits) and ours.logits.shape[1] == 2
        token = {"input_ids": torch.ones(2, 1, dtype=torch.long), "position_ids": torch.full((3, 2, 1), 40)}
        ours, stock = (
            one(**token, past_key_values=output.past_key_values).logits
            for one, output in ((model, ours), (backbone, stock))
        )
    assert torch.equal(ours, stock)


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


UNEVEN = {"num_experts": 2, "tower_layers": [0, 2, 3], "layers_per_expert": [1, 2]}


@torch.no_grad()
def test_a_tower_layer_is_the_replica_of_its_own_layer(make_model, backbone, context, count_layers):
    model = make_model(filled=False, **UNEVEN)
    for layer, index in zip(model.tower.layers, (0, 2, 3), strict=True):
        assert same_bytes(layer.mlp, backbone.get_decoder().layers[index].mlp)
    assert [list(model.expert_layers(k)) for k in range(2)] == [[0], [1, 2]]
    assert [layer.has_residual for layer in model.tower.layers] == [False, False, True]
    model = make_model(**UNEVEN)
    latents = noise(2, 4, 4, 4)
    for timestep, layers, read in ((730.0, [0], (0,)), (210.0, [1, 2], (2, 3))):
        with count_layers(model) as calls:
            expected = model.predict_velocity(latents, timestep, context)
        assert calls == dict.fromkeys(layers, 1)
        keys, values = (
            tuple(
                states if i in read else torch.full_like(states, float("nan")) for i, states in enumerate(all_states)
            )
            for all_states in (context.keys, context.values)
        )
        partial = LatteFlowContext(keys, values, context.attention_mask, context.next_position, context.has_padding)
        assert torch.equal(model.predict_velocity(latents, timestep, partial), expected)


def test_a_tower_of_some_layers_is_saved_and_loaded(make_model, context, tmp_path):
    model = make_model(**UNEVEN)
    model.save_pretrained(tmp_path)
    loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.config.tower_layers, loaded.config.layers_per_expert) == ([0, 2, 3], [1, 2])
    with torch.no_grad():
        one, other = (m.predict_velocity(noise(2, 4, 4, 4), 210.0, context) for m in (model, loaded))
    assert torch.equal(one, other)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": noise(1, 4, 4, 4)}, "noise must be given with latents, and has no effect alone"),
        ({"noise": noise(1, 4, 4, 4), "states": noise(1, 3, 4, 4, 4)}, "noise must be given with latents"),
        ({"sigmas": [1.0, 0.5, 0.0], "latents": noise(1, 4, 4, 4)}, "sigmas must be given with states"),
        ({"context": {}}, "context must be given with latents or states"),
        ({"latents": noise(1, 4, 4, 4), "states": noise(1, 3, 4, 4, 4)}, "give latents or states, not both"),
    ],
)
def test_forward_refuses_arguments_without_effect(model, encode, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**encode("a red circle"), **arguments)


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
