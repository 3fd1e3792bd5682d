# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the sampling loop does at each step: nothing that can be done once, and nothing that was not asked for.

Calls and rows are counted here; the benchmarks measure time.
"""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.modeling.attention import residual_scores_attention
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.modeling.modeling_latte_flow import LatteFlowTower


PROMPTS = ["a red circle", "a small blue square above a handwritten seven", "a cross"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def generate(pipe, prompt=PROMPTS[0], **arguments) -> torch.Tensor:
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


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_scores_attention_equals_the_formula(num_images, residual):
    draw = torch.Generator().manual_seed(0)
    prompts, heads, groups, length, context, size = 2, 4, 2, 6, 5, 8
    batch = prompts * num_images

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    query, key, value = (normal(batch, n, length, size) for n in (heads, groups, groups))
    context_keys, context_values = normal(prompts, groups, context, size), normal(prompts, groups, context, size)
    bias = torch.zeros(prompts, 1, 1, context, dtype=torch.float64)
    bias[1, ..., :2] = float("-inf")
    added = normal(batch, heads, length, length) if residual else None
    output, scores = residual_scores_attention(query, key, value, context_keys, context_values, bias, added, 0.3)
    for row in range(batch):
        for head in range(heads):
            group, prompt = head // (heads // groups), row // num_images
            own = 0.3 * query[row, head] @ key[row, group].T + (0 if added is None else added[row, head])
            other = 0.3 * query[row, head] @ context_keys[prompt, group].T + bias[prompt, 0]
            # The definition; the softmax is taken in float32, also of float64.
            weights = torch.cat([other, own], dim=-1).softmax(-1)
            expected = weights @ torch.cat([context_values[prompt, group], value[row, group]])
            torch.testing.assert_close(output[row, :, head], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scores[row, head], own)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
def test_images_that_share_a_context_equal_those_that_do_not(make_model, encode, mode, attention):
    model = make_model(residual_attention=mode)
    model.set_attn_implementation(attention)
    context = model.encode_context(**encode(*PROMPTS[:2]))
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    apart = context.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    with torch.no_grad():
        for timestep in (900.0, 100.0):
            found, expected = (model.predict_velocity(latents, timestep, c) for c in (context, apart))
            torch.testing.assert_close(found, expected, **CLOSE)


def test_several_images_of_a_prompt_equal_single_images(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    together = generate(pipe, PROMPTS[:2], num_images_per_prompt=3, generator=generators)
    for index, image in enumerate(together):
        alone = generate(pipe, PROMPTS[index // 3], generator=torch.Generator().manual_seed(index))[0]
        torch.testing.assert_close(image, alone, rtol=1e-3, atol=1e-4)


def test_stochastic_steps_draw_from_the_generator_of_each_image(pipe):
    plain = generate(pipe, PROMPTS[:2], generator=[torch.Generator().manual_seed(seed) for seed in range(2)])
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, new_noise=1.0)
    together = generate(pipe, PROMPTS[:2], generator=tuple(torch.Generator().manual_seed(seed) for seed in range(2)))
    for index, image in enumerate(together):
        alone = generate(pipe, PROMPTS[index], generator=torch.Generator().manual_seed(index))[0]
        torch.testing.assert_close(image, alone, rtol=1e-3, atol=1e-4)
        assert (image - plain[index]).abs().max() > 1e-2


def test_eight_images_of_a_prompt_share_one_context(pipe, rows, monkeypatch):
    joined, selected = [], []
    cat, select = LatteFlowContext.cat, LatteFlowContext.select
    monkeypatch.setattr(LatteFlowContext, "cat", lambda contexts: joined.append(len(contexts)) or cat(contexts))
    monkeypatch.setattr(LatteFlowContext, "select", lambda *args: selected.append(len(args[1])) or select(*args))
    generate(pipe, num_images_per_prompt=8)
    # Both branches of guidance are joined once, and nothing is copied for each image.
    assert joined == [2] and selected == [1, 1] and rows == [(16, 2)] * 8
    rows.clear()
    generate(pipe, num_images_per_prompt=8, guidance_scale=1.0)
    assert joined == [2] and selected == [1, 1, 1] and rows == [(8, 1)] * 8


def test_what_steps_have_in_common_is_computed_once(pipe, model, monkeypatch):
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
    generate(pipe)
    for hook in hooks:
        hook.remove()
    # Two experts of four steps each, which share the head and the timestep embedding; a layout with guidance and one
    # without.
    expected = {(name, 4): 2 if name in ("head", "timestep") else 1 for name in maps}
    assert calls == {**expected, "layout": 2}


def test_layers_compute_their_modulation_if_nothing_may_run_ahead(own_pipe, monkeypatch):
    expected = generate(own_pipe)
    monkeypatch.setattr("latte_flow_hf.pipelines.denoising.runs_only_in_forward", lambda tower: True)
    events = []
    for layer in own_pipe.model.tower.layers:
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
        layer.modulation.register_forward_hook(lambda *_: events.append("modulation"))
    torch.testing.assert_close(generate(own_pipe), expected, **CLOSE)
    # Eight steps of two layers, each of which computes its own.
    assert events == ["layer", "modulation"] * 16


def test_guidance_by_expert(pipe, rows):
    uniform = generate(pipe, guidance_scale=3.0)
    assert torch.equal(generate(pipe, guidance_scale=[3.0, 3.0]), uniform)
    rows.clear()
    found = generate(pipe, guidance_scale=[3.0, 1.0])
    assert rows == [(2, 2)] * 4 + [(1, 1)] * 4

    def end_guidance(pipe, step, timestep, tensors):
        if step == 3:
            pipe._guidance_scale = 1.0

    torch.testing.assert_close(generate(pipe, guidance_scale=3.0, callback_on_step_end=end_guidance), found, **CLOSE)
    assert not torch.equal(found, uniform)


def test_guidance_in_an_interval(pipe, rows):
    # Sigmas 1, 0.875, ..., 0.125.
    found = generate(pipe, guidance_scale=3.0, guidance_interval=(0.3, 0.8))
    assert rows == [(1, 1)] * 2 + [(2, 2)] * 4 + [(1, 1)] * 2
    whole, none = generate(pipe, guidance_scale=3.0), generate(pipe, guidance_scale=1.0)
    assert torch.equal(generate(pipe, guidance_scale=3.0, guidance_interval=(0.0, 1.0)), whole)
    assert torch.equal(generate(pipe, guidance_scale=3.0, guidance_interval=(0.01, 0.02)), none)
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
def test_invalid_guidance_is_refused(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(pipe, **arguments)


def test_heun_s_second_evaluation_belongs_to_the_expert_of_the_step(pipe, model, count_layers):
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, solver="heun")
    calls = []
    predict = model.predict_velocity

    def recorded(latents, timestep, context, expert, **arguments):
        calls.append((float(timestep), expert))
        return predict(latents, timestep, context, expert=expert, **arguments)

    model.predict_velocity = recorded
    try:
        generate(pipe, num_inference_steps=4)
    finally:
        del model.predict_velocity
    assert calls == [(1000, 0), (750, 0), (750, 0), (500, 0), (500, 1), (250, 1), (250, 1)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_layers_share_a_graph(make_model, pipe, attention):
    torch._dynamo.reset()
    counters.clear()
    pipe.register_modules(model=make_model())
    pipe.model.set_attn_implementation(attention)
    expected = generate(pipe)
    pipe.compile(backend="eager")
    assert torch.equal(generate(pipe), expected)
    # One for the first layer of an expert and one for the second, which adds the scores of the first; both experts and
    # all steps share them.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch._dynamo.reset()
