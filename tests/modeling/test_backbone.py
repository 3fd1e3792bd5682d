# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Every family of backbones that tests/backbones.py lists, at a tiny size, with the stock class as oracle; and what is
refused, with the reason.
"""

import copy
import functools

import pytest
import torch
from accelerate import init_empty_weights
from backbones import BACKBONES, MORE_BACKBONES, image_inputs, prompt_inputs, tiny_backbone, tiny_config
from helpers import fill, noise, same_bytes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
)

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration
from latte_flow_hf.modeling import attention, backbone, modeling_latte_flow
from latte_flow_hf.modeling.modeling_latte_flow import LatteFlowLayerModulation, LatteFlowLayout, check_backbone


SIZES = {"num_experts": 2, "latent_channels": 4, "timestep_frequency_dim": 16}
# Shortened by the backbone's sliding window, if it has one (12 tokens).
LENGTHS = (14, 9)


def make(name: str, **config) -> LatteFlowForConditionalGeneration:
    torch.manual_seed(2)
    model = LatteFlowForConditionalGeneration.from_vlm(tiny_backbone(name), **{**SIZES, **config})
    fill(model.tower, seed=3, std=0.25)
    return model.eval()


@functools.cache
def shared(name: str) -> LatteFlowForConditionalGeneration:
    """One model of each family for all tests that do not change it."""
    return make(name)


@functools.cache
def stock(name: str) -> torch.nn.Module:
    return tiny_backbone(name)


families = pytest.mark.parametrize("name", BACKBONES)
all_families = pytest.mark.parametrize("name", [*BACKBONES, *MORE_BACKBONES])


# Text is the backbone's own.


@torch.no_grad()
@families
def test_text_is_that_of_the_stock_class(name):
    model = shared(name)
    for inputs in (prompt_inputs(name, LENGTHS), prompt_inputs(name, LENGTHS, with_image=True)):
        assert torch.equal(model(**inputs).logits, stock(name)(**inputs).logits)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = stock(name).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    # The image is seen, or the comparison would be one of texts.
    other = {**inputs, "pixel_values": image_inputs(name, len(LENGTHS), seed=9)["pixel_values"]}
    assert (model(**other).logits - model(**inputs).logits).abs().max() > 1e-2


# The tower's layers are those of the backbone.


@torch.no_grad()
@all_families
def test_a_latent_in_the_place_of_the_next_token_is_that_token(name):
    """With the backbone's weights and the modulation neutral, layer by layer, behind a prompt with an image."""
    model, vlm = make(name), stock(name)
    decoder, text = vlm.get_decoder(), vlm.config.get_text_config()
    inputs = prompt_inputs(name, (15,), with_image=True)
    # One more token of text; in the prompt's mask it attends causally.
    longer = {
        key: torch.cat([value, torch.full((1, 1), {"input_ids": 7, "attention_mask": 1}.get(key, 0))], dim=1)
        if key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        else value
        for key, value in inputs.items()
    }
    if name.startswith("paligemma"):
        longer["token_type_ids"][:, -1] = 1
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args[0] if args else kwargs["hidden_states"], output)),
            with_kwargs=True,
        )
        for layer in decoder.layers
    ]
    vlm(**longer)
    for handle in handles:
        handle.remove()
    context = model.encode_context(**inputs)
    layout = model.latent_layout(torch.zeros(1, 4, 1, 1), context)
    one, zero = torch.ones(1, text.hidden_size), torch.zeros(1, text.hidden_size)
    neutral = LatteFlowLayerModulation(torch.cat([one, zero, zero, one], dim=1), None)
    for index, layer in enumerate(model.tower.layers):
        layer.copy_from(decoder.layers[index])
        for new in {"attention_post_norm", "mlp_post_norm"} - layer.copied_modules.keys():
            setattr(layer, new, torch.nn.Identity())
        hidden_states, output = seen[index]
        output = output[0] if isinstance(output, tuple) else output
        found, _ = layer(
            hidden_states[:, -1:],
            None,
            None,
            neutral,
            context_keys=context.keys[index],
            context_values=context.values[index],
            attention_mask=layout.attention_mask[layer.layer_type],
            position_embeddings=layout.position_embeddings[layer.layer_type],
            position_ids=layout.position_ids,
        )
        torch.testing.assert_close(found, output[:, -1:], rtol=1e-4, atol=1e-4 * output.std().item())


OTHER_MODES = [(name, mode) for name in ("paligemma2", "gemma3", "glm4v") for mode in ("probabilities", None)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "scores") for name in (*BACKBONES, *MORE_BACKBONES)), *OTHER_MODES]
)
def test_padded_prompts_give_the_same_velocity(name, mode):
    model = shared(name) if mode == "scores" else make(name, residual_attention=mode)
    latents = noise(2, 4, 4, 4)
    for with_image in (False, True):
        found = model.predict_velocity(
            latents, 730.0, model.encode_context(**prompt_inputs(name, LENGTHS, with_image))
        )
        assert found.std() > 0.1
        for row in range(2):
            # The same prompt alone: without the padding, and its own image.
            batch = prompt_inputs(name, LENGTHS, with_image)
            images = image_inputs(name, 2) if with_image else {}
            kept = batch["attention_mask"][row].bool()
            alone = {key: value[row : row + 1, kept] for key, value in batch.items() if key not in images}
            for key, value in images.items():
                alone[key] = value.unflatten(0, (2, -1))[row]
            expected = model.predict_velocity(latents[row : row + 1], 730.0, model.encode_context(**alone))
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-3, atol=1e-3)


TURNS_PAIRS = ("glm4v", "aya_vision")


@torch.no_grad()
@all_families
def test_both_features_of_a_frequency_turn_by_the_same_position(name):
    """Else a position would stretch queries and keys instead of turning them."""
    model = shared(name)
    context = model.encode_context(**prompt_inputs(name))
    for cos, sin in model.latent_layout(torch.zeros(1, 4, 4, 4), context).position_embeddings.values():
        for states in (cos, sin):
            pairs = states.unflatten(-1, (-1, 2) if name in TURNS_PAIRS else (2, -1))
            first, second = pairs.unbind(-1 if name in TURNS_PAIRS else -2)
            assert torch.equal(first, second)
        # Rows and columns have frequencies of their own.
        assert (cos[0, 1] != cos[0, 0]).any() and (cos[0, 4] != cos[0, 0]).any() and (cos[0, 4] != cos[0, 1]).any()


@families
def test_a_model_is_saved_and_loaded(name, tmp_path):
    model = shared(name)
    model.save_pretrained(tmp_path)
    loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert same_bytes(loaded, model)
    with torch.no_grad():
        one, other = (
            m.predict_velocity(noise(1, 4, 4, 4), 210.0, m.encode_context(**prompt_inputs(name)))
            for m in (model, loaded)
        )
    assert torch.equal(one, other)


@all_families
def test_a_new_tower_starts_from_the_backbone_and_learns(name):
    """From a velocity of zero, and with the gradients of every expert, on pictures that the prompts tell apart."""
    torch.manual_seed(0)
    model = LatteFlowForConditionalGeneration.from_vlm(tiny_backbone(name), **SIZES).train()
    for layer in model.tower.layers:
        source = model.get_decoder().layers[layer.source_index]
        for ours, theirs in layer.copied_modules.items():
            for leaf, weight in source.get_submodule(theirs).state_dict().items():
                assert torch.equal(layer.get_submodule(ours).state_dict()[leaf], weight)
    context = model.encode_context(**prompt_inputs(name, (6,) * 8))
    # Like latents of the tiny world: a shape of one colour on one background, in another place for each prompt.
    latents = -0.5 * torch.ones(8, 4, 4, 4)
    for row in range(8):
        latents[row, :, row % 4, row // 2 % 4] = 1.5
    assert not model.predict_velocity(latents, 730.0, context).any()
    optimizer = torch.optim.AdamW(model.tower.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(12):
        loss = model(context=context, latents=latents, generator=generator).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        used = {n for n, parameter in model.tower.named_parameters() if parameter.grad is not None}
        optimizer.zero_grad()
    assert used == {n for n, _ in model.tower.named_parameters()}
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses


# The check at construction sees what would be wrong.


def nothing_to_see(*arguments):
    return None


def leave_out(name):
    """`attend_to_context` without one of its arguments."""

    def changed(mode, module, *inputs):
        names = ("query", "key", "value", "context_keys", "context_values", "mask", "residual", "scaling", "softcap")
        inputs = [(1.0 if name == "scaling" else None) if n == name else given for n, given in zip(names, inputs)]
        return attention.attend_to_context(mode, module, *inputs)

    return changed


def always_full_attention(rotary_emb, like, positions, kind):
    return backbone.rotary_cos_sin(rotary_emb, like, positions, "full_attention")


def of_position_0(pos_embed, position_embeddings, position_ids, attention_mask):
    return LatteFlowLayout(pos_embed, position_embeddings, torch.zeros_like(position_ids), attention_mask)


@pytest.mark.parametrize(
    ("name", "part", "wrong", "layer"),
    [
        ("paligemma2", "attend_to_context", leave_out("softcap"), "layer 0, Gemma2DecoderLayer"),
        ("gemma3", "attend_to_context", leave_out("scaling"), "layer 0, Gemma3DecoderLayer"),
        ("gemma3", "sliding_window", nothing_to_see, r"layer 0, Gemma3DecoderLayer \(sliding_attention\)"),
        ("gemma3", "rotary_cos_sin", always_full_attention, r"Gemma3DecoderLayer \(sliding_attention\)"),
        ("mistral3", "tower_text_config", nothing_to_see, "failed with"),
        ("ministral3", "LatteFlowLayout", of_position_0, "layer 0, Ministral3DecoderLayer"),
    ],
)
def test_a_layer_that_is_not_the_backbone_s_is_refused(name, part, wrong, layer, monkeypatch):
    config = LatteFlowConfig(vlm_config=tiny_config(name), **SIZES)
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    check_backbone(config)
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    monkeypatch.setattr(modeling_latte_flow, part, wrong)
    with pytest.raises(ValueError, match=f"{layer}.* cannot be mirrored|cannot be mirrored.*{layer}"):
        check_backbone(config)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "glm4v"])
def test_a_norm_in_another_place_is_seen(name, monkeypatch):
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    swap = {"attention_norm": "mlp_norm", "mlp_norm": "attention_norm"}
    wrong = tuple({swap.get(ours, ours): theirs for ours, theirs in norms.items()} for norms in backbone.LAYER_NORMS)
    monkeypatch.setattr(backbone, "LAYER_NORMS", wrong)
    with pytest.raises(ValueError, match="cannot be mirrored: the output of a layer"):
        check_backbone(LatteFlowConfig(vlm_config=tiny_config(name), **SIZES))


def test_the_check_changes_no_random_numbers_and_nothing_of_the_configuration(monkeypatch):
    config = LatteFlowConfig(vlm_config=tiny_config("gemma3"), **SIZES)
    before = copy.deepcopy(config.to_dict())
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"):
        check_backbone(config)
    assert torch.equal(torch.rand(3), expected)
    assert config.to_dict() == before and torch.get_default_dtype() == torch.float32


def test_without_weights_inside_init_empty_weights(monkeypatch):
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    with init_empty_weights():
        model = LatteFlowForConditionalGeneration(LatteFlowConfig(vlm_config=tiny_config("gemma3"), **SIZES))
    assert all(weight.is_meta for weight in model.parameters())
    monkeypatch.setattr(modeling_latte_flow, "_CHECKED", {})
    monkeypatch.setattr(modeling_latte_flow, "attend_to_context", leave_out("scaling"))
    with init_empty_weights(), pytest.raises(ValueError, match="the output of a layer"):
        check_backbone(model.config)


# What is refused.


TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 64, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GEMMA4 = {**TEXT, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 |= {"vocab_size_per_layer_input": 64}
REFUSED = {
    "qwen3_5": (
        {"text_config": {**TEXT, "linear_num_key_heads": 2, "linear_num_value_heads": 2}},
        "Qwen3_5DecoderLayer cannot be mirrored: its linear attention keeps a state",
    ),
    "lfm2_vl": (
        {"text_config": {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}},
        "Lfm2DecoderLayer cannot be mirrored: its convolution keeps a state",
    ),
    "gemma4": (
        {"text_config": {**GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}},
        "Gemma4TextDecoderLayer cannot be mirrored: it reads an embedding of the token in every layer",
    ),
    "mllama": (
        {
            "text_config": {**TEXT, "cross_attention_layers": [1]},
            "vision_config": {**VISION, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 32},
        },
        "MllamaCrossAttentionDecoderLayer cannot be mirrored: it attends to the image by cross-attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_mirrored_are_refused_with_the_reason(name):
    content, words = REFUSED[name]
    config = LatteFlowConfig(vlm_config=AutoConfig.for_model(name, **content), num_experts=2)
    with pytest.raises(ValueError, match=words):
        LatteFlowForConditionalGeneration(config)


class RemoteConfig(Qwen2VLConfig):
    """Stands in a module outside of transformers, as remote code does."""


@pytest.mark.parametrize(
    ("vlm_config", "words"),
    [
        (LlamaConfig(), "must be of a vision-language model, got 'llama', a text-only model"),
        (AutoConfig.for_model("siglip"), "got 'siglip', which transformers does not list"),
        (AutoConfig.for_model("florence2"), "got the encoder-decoder 'florence2'"),
        (RemoteConfig(), r"part of transformers, got RemoteConfig .*code from elsewhere"),
        (AutoConfig.for_model("pix2struct"), "got the encoder-decoder 'pix2struct'"),
    ],
)
def test_what_is_no_vision_language_model_with_a_decoder_is_refused(vlm_config: PreTrainedConfig, words):
    with pytest.raises(ValueError, match=words):
        LatteFlowConfig(vlm_config=vlm_config)


def test_a_width_without_sines_and_cosines_for_rows_and_columns_is_refused():
    vlm_config = tiny_config("llava_llama")
    vlm_config.text_config.hidden_size = 30
    with pytest.raises(ValueError, match=r"hidden_size that is a multiple of 4, .* got 30"):
        LatteFlowConfig(vlm_config=vlm_config, **SIZES)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 31,
        },
    ],
)
def test_prompts_that_change_the_rotary_frequencies_are_refused(settings):
    """They would change those of other prompts too: of the same batch, or of a later call."""
    vlm_config = tiny_config("llava_llama")
    vlm_config.text_config.max_position_embeddings = 32
    vlm_config.text_config.rope_parameters = {"rope_theta": 10000.0, **settings}
    model = LatteFlowForConditionalGeneration(LatteFlowConfig(vlm_config=vlm_config, **SIZES)).eval()
    fill(model, seed=1, std=0.25)

    def velocity(num_tokens: int, side: int = 4) -> torch.Tensor:
        context = model.encode_context(**prompt_inputs("llava_llama", (num_tokens,)))
        return model.predict_velocity(noise(1, 4, side, side), 730.0, context)

    expected = velocity(27)
    for num_tokens, side, last in ((28, 4, 32), (26, 6, 32), (32, 4, 32)):
        with pytest.raises(ValueError, match=rf"need {last} positions, but .* change beyond 31; use a shorter prompt"):
            velocity(num_tokens, side)
    # By a longer text, the backbone's own frequencies may have changed.
    model(**prompt_inputs("llava_llama", (40,)))
    assert torch.equal(velocity(27), expected)


def test_a_decoder_without_layers_is_refused():
    config = LatteFlowConfig(vlm_config=AutoConfig.for_model("git"), num_experts=2)
    with pytest.raises(ValueError, match=r"GitForCausalLM cannot be used: its decoder .* has no layers and no rotary"):
        LatteFlowForConditionalGeneration(config)


def test_from_vlm_takes_whole_vision_language_models_alone():
    with pytest.raises(ValueError, match="got 'llama', a text-only model"):
        text = {**TEXT, "model_type": "llama"}
        LatteFlowForConditionalGeneration.from_vlm(AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)))
    vlm = AutoModelForImageTextToText.from_config(tiny_config("qwen2_vl"))
    with pytest.raises(ValueError, match="vlm must be a Qwen2VLForConditionalGeneration, got Qwen2VLModel"):
        LatteFlowForConditionalGeneration.from_vlm(vlm.model, **SIZES)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_images_need_the_types_of_tokens_where_the_mask_depends_on_them(name):
    inputs = prompt_inputs(name, with_image=True)
    del inputs["token_type_ids"]
    with pytest.raises(ValueError, match="token_type_ids must be given with images, as the processor returns it"):
        shared(name).encode_context(**inputs)
