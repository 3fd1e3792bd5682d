# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tower's attention: its own kernels against the definition, and transformers' implementations without a residual.

With residual attention the tower's own kernel runs, whatever implementation is chosen: its output must not change, to
the bit. Without a residual the chosen implementation runs: it must equal the definition, with and without padding.
Kernels that need a GPU are replaced by what their documentation says they compute, so that at least the arguments they
are called with are right.
"""

import importlib.util
import itertools
import sys
import types

import pytest
import torch
from helpers import noise
from transformers import modeling_flash_attention_utils as flash
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward
from transformers.utils import logging as transformers_logging

from latte_flow_hf.modeling.attention import residual_probabilities_attention, residual_scores_attention


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = {"padded": ("a red circle", "a small blue square above a handwritten seven"), "unpadded": ("a red circle",)}
RESIDUALS = ("scores", "probabilities")


def velocity(model, context, implementation):
    """By one expert of all four layers: the residual is added three times."""
    if implementation != model.config._attn_implementation:
        model.set_attn_implementation({"": implementation})
    with torch.no_grad():
        return model.predict_velocity(noise(len(context), 4, 4, 4), 730.0, context)


def attention_by_definition(query, key, value, scale, bias=None):
    """(length, heads, d), (keys, groups, d) -> (length, heads, d)."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", (scores if bias is None else scores + bias).softmax(-1), value)


# The two kernels against a loop over images and heads, in float64.


def kernel_inputs(images_per_prompt: int, with_mask: bool, with_residual: bool) -> dict:
    num_prompts, num_heads, num_groups, num_latents, num_context, head_dim = 2, 4, 2, 6, 5, 8
    batch_size = num_prompts * images_per_prompt
    mask = torch.zeros(num_prompts, 1, 1, num_context, dtype=torch.float64)
    mask[0, ..., :2] = float("-inf")
    return {
        "query": noise(batch_size, num_heads, num_latents, head_dim, seed=1).double(),
        "key": noise(batch_size, num_groups, num_latents, head_dim, seed=2).double(),
        "value": noise(batch_size, num_groups, num_latents, head_dim, seed=3).double(),
        "context_keys": noise(num_prompts, num_groups, num_context, head_dim, seed=4).double(),
        "context_values": noise(num_prompts, num_groups, num_context, head_dim, seed=5).double(),
        "context_mask": mask if with_mask else None,
        "residual": noise(batch_size, num_heads, num_latents, num_latents, seed=6).double() if with_residual else None,
        "scaling": 0.3,
    }


def by_definition(mode: str, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    query, num_context = inputs["query"], inputs["context_keys"].shape[2]
    images_per_prompt = len(query) // len(inputs["context_keys"])
    outputs, maps = torch.zeros_like(query), []
    for image, head in itertools.product(range(len(query)), range(query.shape[1])):
        prompt, group = image // images_per_prompt, head // (query.shape[1] // inputs["key"].shape[1])
        keys = torch.cat([inputs["context_keys"][prompt, group], inputs["key"][image, group]])
        values = torch.cat([inputs["context_values"][prompt, group], inputs["value"][image, group]])
        scores = query[image, head] @ keys.T * inputs["scaling"]
        if inputs["context_mask"] is not None:
            scores[:, :num_context] += inputs["context_mask"][prompt, 0, 0]
        if mode == "scores" and inputs["residual"] is not None:
            scores[:, num_context:] += inputs["residual"][image, head]
        weights = scores.softmax(-1)
        if mode == "probabilities" and inputs["residual"] is not None:
            weights[:, num_context:] += inputs["residual"][image, head]
        outputs[image, head] = weights @ values
        maps.append((scores if mode == "scores" else weights)[:, num_context:])
    return outputs.transpose(1, 2), torch.stack(maps).view(*query.shape[:3], -1)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("images_per_prompt", [1, 3])
@pytest.mark.parametrize("mode", RESIDUALS)
def test_kernel_equals_the_definition(mode, images_per_prompt, with_mask, with_residual):
    inputs = kernel_inputs(images_per_prompt, with_mask, with_residual)
    if mode == "scores":
        found = residual_scores_attention(**inputs)
    else:
        module = types.SimpleNamespace(num_key_value_groups=2, training=False)
        found = residual_probabilities_attention(module, **inputs)
    # The softmax is computed in float32.
    for one, other in zip(found, by_definition(mode, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Which kernel runs in the tower.


@pytest.mark.parametrize("padding", PROMPTS)
@pytest.mark.parametrize("mode", RESIDUALS)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_with_a_residual_the_implementation_makes_no_difference(make_model, encode, mode, padding, implementation):
    model = make_model(num_experts=1, residual_attention=mode)
    model.set_attn_implementation("eager")
    context = model.encode_context(**encode(*PROMPTS[padding]))
    assert context.has_padding == (padding == "padded")
    assert torch.equal(velocity(model, context, implementation), velocity(model, context, "eager"))


@pytest.mark.parametrize("padding", PROMPTS)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_without_a_residual_the_implementation_equals_eager(make_model, encode, padding, implementation):
    model = make_model(num_experts=1, residual_attention=None)
    model.set_attn_implementation("eager")
    context = model.encode_context(**encode(*PROMPTS[padding]))
    expected = velocity(model, context, "eager")
    # flex_attention in its Python form: compiling it takes a C++ compiler and half a minute.
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(velocity(model, context, implementation), expected, **CLOSE)


@pytest.mark.parametrize("mode", [*RESIDUALS, None])
def test_which_kernel_runs(make_model, encode, monkeypatch, mode):
    model = make_model(num_experts=1, residual_attention=mode)
    context = model.encode_context(**encode("a red circle"))
    calls = []

    def spy(*args, **kwargs):
        calls.append(1)
        return eager_attention_forward(*args, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    velocity(model, context, "sdpa")
    assert len(calls) == (4 if mode is None else 0)


def test_residual_and_padding_change_the_velocity(make_model, encode):
    # The comparisons of this file would pass on a model that ignores both.
    model = make_model(num_experts=1)
    context = model.encode_context(**encode(*PROMPTS["padded"]))
    expected = velocity(model, context, "eager")
    context.has_padding = False
    assert (velocity(model, context, "eager") - expected).abs().max() > 1e-2
    context.has_padding = True
    for layer in model.tower.layers[1:]:
        layer.self_attn.residual_gate.weight.data.zero_()
        layer.self_attn.residual_gate.bias.data.zero_()
    assert (velocity(model, context, "eager") - expected).abs().max() > 1e-2


@pytest.mark.parametrize("mode", [*RESIDUALS, None])
def test_one_line_says_that_the_tower_runs_its_own_attention(make_model, caplog, mode):
    model = make_model(residual_attention=mode)
    transformers_logging.warning_once.cache_clear()
    for _ in range(2):
        model.set_attn_implementation({"": "flex_attention"})
    lines = [record.getMessage() for record in caplog.records if "runs its own attention" in record.getMessage()]
    assert len(lines) == (0 if mode is None else 1)
    assert all(f"residual_attention={mode!r}" in line and "'flex_attention'" in line for line in lines)


@pytest.mark.skipif(flash.is_flash_attn_2_available(), reason="flash-attn is here")
def test_flash_attention_that_is_not_installed_is_named(make_model):
    with pytest.raises(ImportError, match=r"[Ff]lash"):
        make_model(residual_attention=None).set_attn_implementation("flash_attention_2")


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert not causal and not dropout_p
    return torch.stack([attention_by_definition(*item, softmax_scale) for item in zip(q, k, v)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert not causal and not dropout_p
    queries, keys = (itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
    return torch.cat(
        [attention_by_definition(q[a:b], k[c:d], v[c:d], softmax_scale) for (a, b), (c, d) in zip(queries, keys)]
    )


@pytest.mark.parametrize("padding", PROMPTS)
def test_flash_attention_is_called_correctly(make_model, encode, monkeypatch, padding):
    model = make_model(num_experts=1, residual_attention=None)
    context = model.encode_context(**encode(*PROMPTS[padding]))
    expected = velocity(model, context, "eager")
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
    }.items():
        monkeypatch.setattr(flash, name, value, raising=False)
    # Set past the check that asks for the package and a GPU.
    model.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(velocity(model, context, "flash_attention_2"), expected, **CLOSE)


# xFormers.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_xformers_is_refused_without_a_gpu(pipe):
    with pytest.raises(ValueError, match="'xformers' needs a GPU, but torch finds none; use 'sdpa' instead"):
        pipe.enable_xformers_memory_efficient_attention()
    assert pipe.model.config._attn_implementation == "sdpa"
    # Its counterpart changes nothing that is not xFormers.
    pipe.model.set_attn_implementation({"": "eager"})
    pipe.disable_xformers_memory_efficient_attention()
    assert pipe.model.config._attn_implementation == "eager"
    pipe.model.set_attn_implementation({"": "sdpa"})


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
    """What its documentation gives as equivalent."""
    biases = [None] * len(query) if attn_bias is None else attn_bias
    return torch.stack([attention_by_definition(*item, scale, bias) for *item, bias in zip(query, key, value, biases)])


@pytest.fixture
def xformers_calls(monkeypatch):
    """The arguments of each call; the package itself need not be there."""
    calls = []

    def called(query, key, value, **kwargs):
        calls.append((query, key, value, kwargs["attn_bias"]))
        return memory_efficient_attention(query, key, value, **kwargs)

    if importlib.util.find_spec("xformers") is None:
        monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    module = importlib.import_module("xformers.ops")
    monkeypatch.setattr(module, "memory_efficient_attention", called, raising=False)
    return calls


@pytest.mark.parametrize("padding", PROMPTS)
def test_xformers_is_called_correctly(make_model, encode, xformers_calls, padding):
    model = make_model(num_experts=1, residual_attention=None)
    context = model.encode_context(**encode(*PROMPTS[padding]))
    expected = velocity(model, context, "eager")
    model.config._attn_implementation_internal = "xformers"
    torch.testing.assert_close(velocity(model, context, "xformers"), expected, **CLOSE)
    assert len(xformers_calls) == 4


def test_xformers_kernel_objects_to_the_device_alone(make_model, encode, xformers_calls):
    cutlass = pytest.importorskip("xformers.ops.fmha.cutlass")
    from xformers.ops.fmha.common import Inputs

    model = make_model(num_experts=1, residual_attention=None)
    context = model.encode_context(**encode(*PROMPTS["padded"]))
    model.config._attn_implementation_internal = "xformers"
    velocity(model, context, "xformers")
    # Not a multiple of eight, and one bias for each head: what its check of the alignment is about.
    assert any(bias is not None and bias.shape[1] == 4 and bias.shape[3] % 8 for *_, bias in xformers_calls)
    for query, key, value, bias in xformers_calls:
        reasons = cutlass.FwOp.not_supported_reasons(Inputs(query, key, value, attn_bias=bias))
        assert len(reasons) == 1 and reasons[0].startswith("device=cpu"), reasons


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["scores", None])
def test_xformers_equals_eager_on_a_gpu(make_model, encode, mode):
    pytest.importorskip("xformers")
    model = make_model(num_experts=1, residual_attention=mode).cuda()
    inputs = encode(*PROMPTS["padded"]).to("cuda")
    latents = noise(2, 4, 4, 4).cuda()
    found = []
    with torch.no_grad():
        for implementation in ("eager", "xformers"):
            model.set_attn_implementation(implementation)
            # The backbone runs it too.
            assert model.vlm.config._attn_implementation == implementation
            found.append(model.predict_velocity(latents, 730.0, model.encode_context(**inputs)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    model.set_use_memory_efficient_attention_xformers(False)
    assert model.config._attn_implementation == "sdpa"
