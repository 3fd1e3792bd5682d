# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Every attention implementation against the eager one, in all three residual modes, with and without padding.

Kernels that need a GPU are stood in for by what their documentation says they compute, so that at least the arguments
they are called with are right; nothing of transformers or of this package is replaced.
"""

import importlib.util
import itertools
import re
import sys
import types

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from latte_flow_hf import LatteFlowForConditionalGeneration


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = {"padded": ("a red circle", "a small blue square above a handwritten seven"), "unpadded": ("a red circle",)}
MODES = ("scores", "probabilities", None)


def velocity(model, context, implementation):
    """By one expert of all four layers: the residual is handed on three times."""
    if implementation != model.config._attn_implementation:
        model.set_attn_implementation({"": implementation})
    latents = torch.randn(len(context), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict_velocity(latents, 730.0, context)


@pytest.fixture(scope="module", params=MODES, ids=str)
def one_expert(request, make_model):
    return make_model(num_experts=1, residual_attention=request.param)


@pytest.fixture(params=PROMPTS)
def context(request, one_expert, encode):
    one_expert.set_attn_implementation("eager")
    context = one_expert.encode_context(**encode(*PROMPTS[request.param]))
    assert context.has_padding == (request.param == "padded")
    return context


def test_sdpa_equals_eager(one_expert, context):
    torch.testing.assert_close(velocity(one_expert, context, "sdpa"), velocity(one_expert, context, "eager"), **CLOSE)


def test_eager_sees_its_residual_and_its_padding(make_model, encode):
    # The comparisons of this file would pass on a model that drops both on either side.
    model = make_model(num_experts=1)
    context = model.encode_context(**encode(*PROMPTS["padded"]))
    right = velocity(model, context, "eager")
    context.has_padding = False
    assert (velocity(model, context, "eager") - right).abs().max() > 1e-2
    context.has_padding = True
    for layer in model.tower.layers[1:]:
        layer.self_attn.residual_gate.weight.data.zero_()
        layer.self_attn.residual_gate.bias.data.zero_()
    assert (velocity(model, context, "eager") - right).abs().max() > 1e-2


def test_flex_attention_equals_eager_or_is_refused(one_expert, context):
    if one_expert.config.residual_attention == "probabilities":
        with pytest.raises(ValueError, match="'flex_attention' never shows the attention map"):
            velocity(one_expert, context, "flex_attention")
        return
    expected = velocity(one_expert, context, "eager")
    # Its Python form: compiling it takes a C++ compiler and half a minute.
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(velocity(one_expert, context, "flex_attention"), expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("mode", ["scores", "probabilities"])
def test_flash_attention_is_refused_where_it_cannot_be_right(make_model, implementation, mode):
    model = make_model(residual_attention=mode)
    with pytest.raises(ValueError, match=rf"{implementation}.*residual_attention='{mode}'.*in the backbone alone"):
        model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == "sdpa" == model.vlm.config._attn_implementation


def test_flash_attention_is_refused_when_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("'sdpa' or 'flex_attention' would do")):
        LatteFlowForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.skipif(flash.is_flash_attn_2_available(), reason="flash-attn is here")
def test_flash_attention_that_is_not_installed_is_named(make_model):
    with pytest.raises(ImportError, match=r"[Ff]lash"):
        make_model(residual_attention=None).set_attn_implementation("flash_attention_2")


def attention_by_definition(query, key, value, scale, bias=None):
    """(length, heads, d), (keys, groups, d) -> (length, heads, d)."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", (scores if bias is None else scores + bias).softmax(-1), value)


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
def test_flash_attention_is_called_rightly_without_a_residual(make_model, encode, monkeypatch, padding):
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
    with pytest.raises(ValueError, match="'xformers' needs a GPU, and torch finds none; 'sdpa' would do"):
        pipe.enable_xformers_memory_efficient_attention()
    assert pipe.model.config._attn_implementation == "sdpa"
    # Its counterpart takes nothing away that is not xFormers.
    pipe.model.set_attn_implementation({"": "eager"})
    pipe.disable_xformers_memory_efficient_attention()
    assert pipe.model.config._attn_implementation == "eager"
    pipe.model.set_attn_implementation({"": "sdpa"})


def test_xformers_is_refused_where_it_shows_no_map(make_model):
    with pytest.raises(ValueError, match="'xformers' never shows the attention map"):
        make_model(residual_attention="probabilities").set_use_memory_efficient_attention_xformers(True)


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
@pytest.mark.parametrize("mode", ["scores", None])
def test_xformers_is_called_rightly(make_model, encode, xformers_calls, padding, mode):
    model = make_model(num_experts=1, residual_attention=mode)
    context = model.encode_context(**encode(*PROMPTS[padding]))
    expected = velocity(model, context, "eager")
    model.config._attn_implementation_internal = "xformers"
    torch.testing.assert_close(velocity(model, context, "xformers"), expected, **CLOSE)
    assert len(xformers_calls) == 4


def test_xformers_kernel_has_one_objection_the_device(make_model, encode, xformers_calls):
    cutlass = pytest.importorskip("xformers.ops.fmha.cutlass")
    from xformers.ops.fmha.common import Inputs

    model = make_model(num_experts=1)
    context = model.encode_context(**encode(*PROMPTS["padded"]))
    model.config._attn_implementation_internal = "xformers"
    velocity(model, context, "xformers")
    # Not a multiple of eight, and one bias a head: what its check for alignment is about.
    assert any(bias is not None and bias.shape[1] == 4 and bias.shape[3] % 8 for *_, bias in xformers_calls)
    for query, key, value, bias in xformers_calls:
        reasons = cutlass.FwOp.not_supported_reasons(Inputs(query, key, value, attn_bias=bias))
        assert len(reasons) == 1 and reasons[0].startswith("device=cpu"), reasons


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_xformers_equals_eager_on_a_gpu(pipe, make_model, encode):
    pytest.importorskip("xformers")
    model = make_model(num_experts=1).cuda()
    context = model.encode_context(**encode(*PROMPTS["padded"]).to("cuda"))
    latents = torch.randn(2, 4, 4, 4, device="cuda")
    with torch.no_grad():
        model.set_attn_implementation({"": "eager"})
        expected = model.predict_velocity(latents, 730.0, context)
        model.set_use_memory_efficient_attention_xformers(True)
        torch.testing.assert_close(model.predict_velocity(latents, 730.0, context), expected, rtol=1e-3, atol=1e-3)
        model.set_use_memory_efficient_attention_xformers(False)
    assert model.config._attn_implementation == "sdpa"
