# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the sampling loop does at each step, counted: nothing that could be done once, nothing that is not asked for.

Counts of calls, rows and bytes; how fast that is, the benchmarks say.
"""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.modeling.attention import residual_scores_attention as one_pass_attention
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.modeling.modeling_latte_flow import LatteFlowTower


PROMPTS = ["a red circle", "a small blue square above a handwritten seven", "a cross"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def paint(pipe, prompt=PROMPTS[0], **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt, **{"num_inference_steps": 8, "generator": generator, "output_type": "latent", **arguments}
    ).images


@pytest.fixture
def rows(pipe, monkeypatch):
    """The latents and the prompts of each call of the model."""
    found = []
    predict = pipe.model.predict_velocity

    def counted(latents, timestep, context, **arguments):
        found.append((len(latents), len(context)))
        return predict(latents, timestep, context, **arguments)

    monkeypatch.setattr(pipe.model, "predict_velocity", counted, raising=False)
    return found


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_attention_in_one_pass_equals_the_formula(pictures, residual):
    draw = torch.Generator().manual_seed(0)
    prompts, heads, groups, length, context, size = 2, 4, 2, 6, 5, 8
    batch = prompts * pictures

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    query, key, value = (normal(batch, n, length, size) for n in (heads, groups, groups))
    context_keys, context_values = normal(prompts, groups, context, size), normal(prompts, groups, context, size)
    bias = torch.zeros(prompts, 1, 1, context, dtype=torch.float64)
    bias[1, ..., :2] = float("-inf")
    added = normal(batch, heads, length, length) if residual else None
    output, scores = one_pass_attention(query, key, value, context_keys, context_values, bias, added, 0.3)
    for row in range(batch):
        for head in range(heads):
            group, prompt = head // (heads // groups), row // pictures
            own = 0.3 * query[row, head] @ key[row, group].T + (0 if added is None else added[row, head])
            other = 0.3 * query[row, head] @ context_keys[prompt, group].T + bias[prompt, 0]
            # The definition; the softmax is taken in float32, also of float64.
            weights = torch.cat([other, own], dim=-1).softmax(-1)
            expected = weights @ torch.cat([context_values[prompt, group], value[row, group]])
            torch.testing.assert_close(output[row, :, head], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scores[row, head], own)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
def test_pictures_that_share_a_prompt_equal_those_that_do_not(make_model, encode, mode, attention):
    model = make_model(residual_attention=mode)
    model.set_attn_implementation(attention)
    context = model.encode_context(**encode(*PROMPTS[:2]))
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    apart = context.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    with torch.no_grad():
        for timestep in (900.0, 100.0):
            found, expected = (model.predict_velocity(latents, timestep, c) for c in (context, apart))
            torch.testing.assert_close(found, expected, **CLOSE)


def test_many_pictures_of_a_prompt_are_those_one_by_one(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    together = paint(pipe, PROMPTS[:2], num_images_per_prompt=3, generator=generators)
    for index, picture in enumerate(together):
        alone = paint(pipe, PROMPTS[index // 3], generator=torch.Generator().manual_seed(index))[0]
        torch.testing.assert_close(picture, alone, rtol=1e-3, atol=1e-4)


def test_stochastic_steps_draw_from_each_picture_s_generator(pipe):
    plain = paint(pipe, PROMPTS[:2], generator=[torch.Generator().manual_seed(seed) for seed in range(2)])
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    together = paint(pipe, PROMPTS[:2], generator=tuple(torch.Generator().manual_seed(seed) for seed in range(2)))
    for index, picture in enumerate(together):
        alone = paint(pipe, PROMPTS[index], generator=torch.Generator().manual_seed(index))[0]
        torch.testing.assert_close(picture, alone, rtol=1e-3, atol=1e-4)
        assert (picture - plain[index]).abs().max() > 1e-2


def test_eight_pictures_of_a_prompt_share_one_cache(pipe, rows, monkeypatch):
    copies = []
    cat = LatteFlowContext.cat
    monkeypatch.setattr(LatteFlowContext, "cat", lambda contexts: copies.append(len(contexts)) or cat(contexts))
    monkeypatch.setattr(LatteFlowContext, "rows", lambda *_: pytest.fail("a context was copied"))
    paint(pipe, num_images_per_prompt=8)
    # Both branches of guidance, joined once.
    assert copies == [2] and rows == [(16, 2)] * 8
    rows.clear()
    paint(pipe, num_images_per_prompt=8, guidance_scale=1.0)
    assert copies == [2] and rows == [(8, 1)] * 8


def test_what_steps_have_in_common_is_worked_out_once(pipe, model, monkeypatch):
    calls = Counter()
    maps = {f"modulation {i}": layer.modulation for i, layer in enumerate(model.tower.layers)}
    gates = {i: getattr(layer.self_attn, "residual_gate", None) for i, layer in enumerate(model.tower.layers)}
    maps |= {f"gate {i}": gate for i, gate in gates.items() if gate is not None}
    maps |= {"head": model.tower.head.modulation, "timestep": model.tower.timestep_embedding}
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: calls.update([(name, len(args[0]))]))
        for name, module in maps.items()
    ]
    layout = LatteFlowTower.layout
    monkeypatch.setattr(LatteFlowTower, "layout", lambda *args: calls.update(["layout"]) or layout(*args))
    paint(pipe)
    for hook in hooks:
        hook.remove()
    # Two experts of four steps each; the head and the timestep embedding serve both.
    expected = {(name, 4): 2 if name in ("head", "timestep") else 1 for name in maps}
    assert calls == {**expected, "layout": 1}


def test_guidance_by_expert(pipe, rows):
    uniform = paint(pipe, guidance_scale=3.0)
    assert torch.equal(paint(pipe, guidance_scale=[3.0, 3.0]), uniform)
    rows.clear()
    found = paint(pipe, guidance_scale=[3.0, 1.0])
    assert rows == [(2, 2)] * 4 + [(1, 1)] * 4

    def end_guidance(pipe, step, timestep, tensors):
        if step == 3:
            pipe._guidance_scale = 1.0

    torch.testing.assert_close(paint(pipe, guidance_scale=3.0, callback_on_step_end=end_guidance), found, **CLOSE)
    assert not torch.equal(found, uniform)


def test_guidance_in_an_interval(pipe, rows):
    # Sigmas 1, 0.875, ..., 0.125.
    found = paint(pipe, guidance_scale=3.0, guidance_interval=(0.3, 0.8))
    assert rows == [(1, 1)] * 2 + [(2, 2)] * 4 + [(1, 1)] * 2
    whole, none = paint(pipe, guidance_scale=3.0), paint(pipe, guidance_scale=1.0)
    assert torch.equal(paint(pipe, guidance_scale=3.0, guidance_interval=(0.0, 1.0)), whole)
    assert torch.equal(paint(pipe, guidance_scale=3.0, guidance_interval=(0.01, 0.02)), none)
    assert not torch.equal(found, whole) and not torch.equal(found, none)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_scale": [4.0]}, r"one for each of 2 experts, got \[4.0\]"),
        ({"guidance_scale": [4.0, float("nan")]}, "nan"),
        ({"guidance_interval": (0.8, 0.2)}, r"got \(0.8, 0.2\)"),
        ({"guidance_interval": (0.0, 2.0)}, r"got \(0.0, 2.0\)"),
        ({"guidance_interval": 0.5}, "got 0.5"),
    ],
)
def test_guidance_that_cannot_be(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        paint(pipe, **arguments)


def test_heun_is_corrected_by_the_expert_whose_step_it_was(pipe, model, count_layers):
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, solver="heun")
    asked = []
    predict = model.predict_velocity

    def noted(latents, timestep, context, expert, **arguments):
        asked.append((float(timestep), expert))
        return predict(latents, timestep, context, expert=expert, **arguments)

    model.predict_velocity = noted
    try:
        paint(pipe, num_inference_steps=4)
    finally:
        del model.predict_velocity
    assert asked == [(1000, 0), (750, 0), (750, 0), (500, 0), (500, 1), (250, 1), (250, 1)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_layers_paint_the_same_from_one_graph_a_kind(make_model, pipe, attention):
    torch._dynamo.reset()
    counters.clear()
    pipe.register_modules(model=make_model())
    pipe.model.set_attn_implementation(attention)
    expected = paint(pipe)
    pipe.compile(backend="eager")
    assert torch.equal(paint(pipe), expected)
    # A group's first layer, which hands on, and its second, which reuses: for both experts and all steps.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch._dynamo.reset()
