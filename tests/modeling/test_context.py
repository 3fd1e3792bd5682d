# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The encoded prompt: the stock cache, positions after the prompt, padding, selecting and joining prompts."""

import copy

import pytest
import torch
from helpers import CLOSE, noise
from transformers import DynamicCache

from latte_flow_hf.modeling.context import LatteFlowContext


# Owned by expert 0 and 1 of two.
TIMESTEPS = (730.0, 210.0)


@pytest.mark.parametrize("with_picture", [False, True])
def test_context_is_the_stock_prefill_s_cache(model, backbone, encode, picture, with_picture):
    inputs = encode("a red circle", image=picture if with_picture else None)
    context = model.encode_context(**inputs)
    with torch.no_grad():
        cache = backbone(**inputs, past_key_values=DynamicCache(), use_cache=True).past_key_values
    assert len(context.keys) == 4 and len(context) == 1 and not context.has_padding
    for layer, keys, values in zip(cache.layers, context.keys, context.values, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    # The first free position is where the backbone itself would go on.
    _, deltas = backbone.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    assert context.next_position.tolist() == (inputs["input_ids"].shape[1] + deltas[:, 0]).tolist()


def test_picture_takes_fewer_positions_than_tokens(model, encode, picture):
    # 16 tokens on a grid of 4 x 4 take 4 positions: else the test above would not tell positions from lengths.
    inputs = encode("a red circle", image=picture)
    assert model.encode_context(**inputs).next_position.item() == inputs["input_ids"].shape[1] - 12


@torch.no_grad()
@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_batch_equals_its_items_one_by_one(model, encode, timestep):
    prompts = ["a red circle", "a cross", "a small blue square above a handwritten seven"]
    latents = noise(3, 4, 4, 4)
    together = model.encode_context(**encode(*prompts))
    assert together.has_padding
    batch = model.predict_velocity(latents, timestep, together)
    for row, prompt in enumerate(prompts):
        alone = model.encode_context(**encode(prompt))
        assert not alone.has_padding and together.next_position[row] == alone.next_position[0]
        single = model.predict_velocity(latents[row : row + 1], timestep, alone)
        torch.testing.assert_close(batch[row : row + 1], single, **CLOSE)
    # Prompts matter at all.
    swapped = model.predict_velocity(latents, timestep, together.select(torch.tensor([2, 0, 1])))
    assert (swapped - batch).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("with_picture", [False, True])
def test_padding_side_makes_no_difference(model, processor, encode, picture, with_picture):
    short = encode("a red circle", image=picture if with_picture else None)
    pad = processor.tokenizer.pad_token_id
    vision = {name: short[name] for name in ("pixel_values", "image_grid_thw") if name in short}
    ids, extra = short["input_ids"], 7
    filler = ids.new_full((1, extra), pad)
    zeros = torch.zeros_like(filler)
    types = short["mm_token_type_ids"]
    mask = short["attention_mask"]
    latents = noise(1, 4, 4, 4)
    expected = model.predict_velocity(latents, 730.0, model.encode_context(**short))
    for side in ("left", "right"):
        order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
        context = model.encode_context(
            input_ids=torch.cat(order(ids, filler), 1),
            attention_mask=torch.cat(order(mask, zeros), 1),
            mm_token_type_ids=torch.cat(order(types, zeros), 1),
            **vision,
        )
        found = model.predict_velocity(latents, 730.0, context)
        torch.testing.assert_close(found, expected, **CLOSE, msg=side)


@torch.no_grad()
def test_padding_is_never_read(model, context):
    padded = ~context.attention_mask
    assert padded.any()
    hide = padded[:, None, :, None]
    keys = tuple(k.masked_fill(hide, 100.0) for k in context.keys)
    values = tuple(v.masked_fill(hide, -100.0) for v in context.values)
    other = LatteFlowContext(keys, values, context.attention_mask, context.next_position, True)
    latents = noise(2, 4, 4, 4)
    for timestep in TIMESTEPS:
        expected = model.predict_velocity(latents, timestep, context)
        assert torch.equal(model.predict_velocity(latents, timestep, other), expected)


def test_missing_mask_means_no_padding(model, encode):
    inputs = encode("a red circle")
    one, other = model.encode_context(**inputs), model.encode_context(inputs["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(one.keys + one.values, other.keys + other.values))
    assert torch.equal(one.next_position, other.next_position) and not other.has_padding


@torch.no_grad()
def test_latents_never_change_the_context(model, encode):
    context = model.encode_context(**encode("a red circle", "a blue cross on the left of a yellow circle"))
    before = copy.deepcopy(context)
    for seed in range(2):
        for timestep in TIMESTEPS:
            model.predict_velocity(noise(2, 4, 4, 4, seed=seed), timestep, context)
    for old, new in zip(before.keys + before.values, context.keys + context.values):
        assert torch.equal(old, new)
    assert torch.equal(before.attention_mask, context.attention_mask)
    assert torch.equal(before.next_position, context.next_position)


@torch.no_grad()
def test_latents_see_each_other_in_both_directions(model, encode):
    context = model.encode_context(**encode("a red circle"))
    latents = noise(1, 4, 2, 2)
    before = model.predict_velocity(latents, 730.0, context)
    for place in ((0, 0), (1, 1)):
        changed = latents.clone()
        changed[0, :, *place] += 3.0
        difference = (model.predict_velocity(changed, 730.0, context) - before).abs().amax(1)
        assert (difference > 1e-4).all()


@torch.no_grad()
def test_picture_in_the_prompt_changes_the_velocity(model, encode, picture):
    inputs = encode("a red circle", image=picture)
    latents = noise(1, 4, 4, 4)
    found = [
        model.predict_velocity(latents, 730.0, model.encode_context(**given))
        for given in (inputs, {**inputs, "pixel_values": -inputs["pixel_values"]}, encode("a red circle"))
    ]
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert (found[0] - found[2]).abs().max() > 1e-2


@torch.no_grad()
def test_rows_choose_prompts_in_order(model, context):
    index = torch.tensor([1, 0, 1])
    chosen = context.select(index)
    assert len(chosen) == 3 and chosen.has_padding
    for name in ("keys", "values"):
        for new, old in zip(getattr(chosen, name), getattr(context, name), strict=True):
            assert torch.equal(new, old[index])
    assert chosen.next_position.tolist() == context.next_position[index].tolist()
    assert torch.equal(chosen.attention_mask, context.attention_mask[index])
    latents = noise(2, 4, 4, 4)
    all_rows = model.predict_velocity(latents[index], 730.0, chosen)
    torch.testing.assert_close(all_rows, model.predict_velocity(latents, 730.0, context)[index], **CLOSE)


@torch.no_grad()
def test_cat_joins_contexts_of_different_lengths(model, encode, picture):
    parts = [
        model.encode_context(**encode("a cross")),
        model.encode_context(**encode("a red circle", "a small blue square above a handwritten seven")),
        model.encode_context(**encode("a cross", image=picture)),
    ]
    joined = LatteFlowContext.cat(parts)
    lengths = [part.attention_mask.shape[1] for part in parts]
    assert len(joined) == 4 and joined.has_padding
    assert joined.attention_mask.shape[1] == max(lengths)
    assert joined.attention_mask.sum(1).tolist() == [n for part in parts for n in part.attention_mask.sum(1).tolist()]
    # On the left: every prompt ends in the last column.
    assert joined.attention_mask[:, -1].all()
    latents = noise(4, 4, 4, 4)
    one_by_one = [model.predict_velocity(chunk, 730.0, part) for chunk, part in zip(latents.split([1, 2, 1]), parts)]
    torch.testing.assert_close(model.predict_velocity(latents, 730.0, joined), torch.cat(one_by_one), **CLOSE)


def test_cat_knows_when_nothing_is_padded(model, encode):
    part = model.encode_context(**encode("a cross"))
    joined = LatteFlowContext.cat([part, part])
    assert not joined.has_padding and len(joined) == 2
    assert all(torch.equal(keys, torch.cat([old, old])) for keys, old in zip(joined.keys, part.keys))


def test_context_of_the_first_layers_is_the_start_of_the_whole(model, encode):
    inputs = encode("a red circle", "a cross")
    whole, part = model.encode_context(**inputs), model.encode_context(**inputs, num_layers=2)
    assert len(whole.keys) == len(model.vlm.model.language_model.layers) == 4 and len(part.keys) == 2
    for name in ("keys", "values"):
        for ours, theirs in zip(getattr(part, name), getattr(whole, name)):
            assert torch.equal(ours, theirs)
    assert torch.equal(part.next_position, whole.next_position)


@pytest.mark.parametrize("with_image", [False, True])
def test_split_is_the_inverse_of_cat(model, encode, picture, with_image):
    parts = [
        model.encode_context(**encode("a cross", image=picture if with_image else None)),
        model.encode_context(**encode("a small blue square above a handwritten seven")),
    ]
    for part, again in zip(parts, LatteFlowContext.cat(parts).split(), strict=True):
        assert not again.has_padding and torch.equal(part.next_position, again.next_position)
        for name in ("keys", "values"):
            assert all(torch.equal(a, b) for a, b in zip(getattr(part, name), getattr(again, name), strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": None}, "input_ids must be the tokens of the prompts"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"got \(1, 0\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must have the shape of input_ids"),
        ({"image_grid_thw": torch.tensor([[1, 8, 8]])}, "mm_token_type_ids must be given with images"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds must not be given"),
        ({"past_key_values": DynamicCache()}, "past_key_values must not be given"),
    ],
)
def test_bad_prompts_are_refused(model, encode, changed, message):
    inputs = {name: value for name, value in encode("a red circle").items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match=message):
        model.encode_context(**{**inputs, **changed})


def test_an_expert_needs_only_the_keys_and_values_of_its_layers(model, encode):
    context = model.encode_context(**encode("a red circle", "a longer prompt of other words"))
    latents = noise(2, 4, 8, 8)
    for expert, timesteps in enumerate(([900.0, 600.0], [400.0, 100.0])):
        own = context.of_layers(model.config.context_layers(expert))
        assert [keys.numel() > 0 for keys in own.keys] == [index // 2 == expert for index in range(4)]
        expected = model.predict_velocity(latents, torch.tensor(timesteps), context)
        assert torch.equal(model.predict_velocity(latents, torch.tensor(timesteps), own), expected)
        # Through splitting and joining, and with the modulation of each image computed apart.
        modulations = [model.modulate(torch.tensor([timestep]), expert) for timestep in timesteps]
        found = model.predict_velocity(
            latents,
            torch.tensor(timesteps),
            LatteFlowContext.cat(own.split()),
            expert,
            type(modulations[0]).cat(modulations),
        )
        torch.testing.assert_close(found, expected, **CLOSE)
