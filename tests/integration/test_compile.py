# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`torch.compile`: the same velocity from one full graph for each expert, at any timestep; `pipe.compile()`: the same
images from layers that share their graphs, for calls of any shape.

`backend="eager"` traces and guards as every backend does, but runs the graph as it is, without a compiler.
"""

import peft
import pytest
import torch
from torch._dynamo.utils import counters

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.training import expert_lora_config


TIMESTEPS = (1000.0, 990.0, 730.0, 600.0, 499.0, 210.0, 20.0)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def assert_same(model, compiled, context: LatteFlowContext, **close):
    latents = torch.randn(len(context), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in TIMESTEPS:
        expert = model.expert_of(timestep)
        arguments = latents, torch.tensor(timestep), context, expert
        torch.testing.assert_close(compiled(*arguments), model.predict_velocity(*arguments), **close)


@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
def test_one_full_graph_for_each_expert(make_model, encode, dynamo, mode):
    model = make_model(residual_attention=mode).requires_grad_(False)
    compiled = torch.compile(model.predict_velocity, backend="eager", fullgraph=True)
    assert_same(model, compiled, model.encode_context(**encode("a red circle")), rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_shapes_become_dynamic(make_model, encode, dynamo):
    model = make_model().requires_grad_(False)
    compiled = torch.compile(model.predict_velocity, backend="eager", fullgraph=True)
    found = []
    for prompts in (["a", "a red circle"], ["a cross", "a", "a green square"], ["", "a", "a cross", "a blue square"]):
        assert_same(model, compiled, model.encode_context(**encode(*prompts)), rtol=0, atol=0)
        found.append(counters["stats"]["unique_graphs"])
    # Another graph for each expert when lengths or batches change for the first time, and none after that.
    assert found == [2, 4, 4] and not counters["graph_break"]


def test_pipeline_with_a_compiled_model(pipe, monkeypatch, dynamo):
    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_inference_steps=6, generator=generator, output_type="pt").images

    expected = generate()
    compiled = torch.compile(pipe.model.predict_velocity, backend="eager", fullgraph=True)
    monkeypatch.setattr(pipe.model, "predict_velocity", compiled, raising=False)
    assert torch.equal(generate(), expected)
    assert counters["stats"]["unique_graphs"] == 2


# `pipe.compile()`.


@pytest.fixture
def compiled_pipe(make_model, pipe, dynamo) -> LatteFlowPipeline:
    pipe.register_modules(model=make_model())
    pipe.compile(backend="eager")
    return pipe


def assert_compiled_graphs(pipe, plain, calls: list[dict], graphs: int) -> None:
    for call in calls:
        expected, found = (
            p(
                **{"num_inference_steps": 4, **call}, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
            for p in (plain, pipe)
        )
        assert torch.equal(found, expected), call
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_new_shapes_compile_nothing(compiled_pipe, own_pipe):
    words = "a red circle left of a blue square "
    prompts = [{"prompt": words * n} for n in (1, 2, 3, 5, 8, 13)] + [{"prompt": "a"}]
    batches = [{"prompt": ["a", words, "a cross"][:n]} for n in (2, 3)] + [{"prompt": [words] * 5, "height": 32}]
    sizes = [{"prompt": "a", "height": h, "width": w} for h, w in ((32, 64), (64, 32), (16, 24), (96, 96), (8, 16))]
    steps = [{"prompt": "a", "num_inference_steps": n} for n in (1, 2, 5, 13)]
    steps += [{"prompt": "a", "steps_per_expert": [3, 1]}]
    # One graph for the first layer of an expert and one for the second, which adds the scores of the first.
    assert_compiled_graphs(compiled_pipe, own_pipe, prompts + batches + sizes + steps, graphs=2)


KINDS = [
    {"prompt": "a"},
    {"prompt": "a", "guidance_scale": 1.0},
    {"prompt": ["a", "a"], "guidance_scale": 1.0},
    {"prompt": ["a", "a cross"], "guidance_scale": 1.0},
    {"prompt": "a", "num_images_per_prompt": 2},
    {"prompt": "a", "num_images_per_prompt": 2, "guidance_scale": 1.0},
    {"prompt": "a", "height": 8, "width": 8},
]


@pytest.mark.slow
def test_more_kinds_than_torch_s_own_limit(compiled_pipe, own_pipe):
    assert torch._dynamo.config.recompile_limit == 8
    # Prompts without guidance that are padded are of the first kind.
    assert_compiled_graphs(compiled_pipe, own_pipe, KINDS, graphs=12)


def test_after_the_last_graph_images_are_still_right(make_model, pipe, own_pipe, dynamo):
    pipe.register_modules(model=make_model())
    pipe.compile(backend="eager", recompile_limit=2)
    assert_compiled_graphs(pipe, own_pipe, KINDS[:2], graphs=2)


# Adapters, and `pipe.compile()` at each place between their changes.


def sequence(folders):
    return [
        lambda pipe: None,
        lambda pipe: pipe.load_lora_weights(folders["a"], adapter_name="a"),
        lambda pipe: pipe.set_adapters("a", [0.5, 1.0]),
        lambda pipe: pipe.load_lora_weights(folders["b"], adapter_name="b"),
        lambda pipe: pipe.set_adapters(["a", "b"], [1.0, 0.5]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.load_lora_weights(folders["b"], adapter_name="a", hotswap=True),
        lambda pipe: pipe.delete_adapters("b"),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("adapters") / name for name in "ab"}
    for folder, experts, rank in zip(folders.values(), ([0, 1], [1]), (2, 4)):
        torch.manual_seed(rank)
        model = make_model()
        peft.get_peft_model(
            model, expert_lora_config(model, experts, r=rank, init_lora_weights=False)
        ).save_pretrained(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("compiled_at", [0, 1, 5, 8, 13])
def test_adapters_that_change_after_compilation(compiled_at, folders, make_model, pipe, own_pipe, dynamo):
    pipe.register_modules(model=make_model())
    found = []
    for place, change in enumerate([*sequence(folders), lambda pipe: None]):
        if place == compiled_at:
            pipe.compile(backend="eager")
        for either in (pipe, own_pipe):
            change(either)
        if place >= compiled_at:
            call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
            expected, images = (
                each(**call, generator=torch.Generator().manual_seed(0)).images for each in (own_pipe, pipe)
            )
            assert torch.equal(images, expected), place
            found.append(images)
    assert len({images.sum().item() for images in found[:5]}) >= min(4, len(found) - 1)
    assert counters["stats"]["unique_graphs"] > 2 or compiled_at == 13


@pytest.mark.slow
@pytest.mark.parametrize("casts_first", [True, False])
def test_layerwise_casting(casts_first, make_model, pipe, own_pipe, dynamo):
    pipe.register_modules(model=make_model())
    own_pipe.model.enable_layerwise_casting()
    if casts_first:
        pipe.model.enable_layerwise_casting()
    pipe.compile(backend="eager")
    if not casts_first:
        pipe.model.enable_layerwise_casting()
    for _ in range(2):
        call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
        expected, images = (
            each(**call, generator=torch.Generator().manual_seed(0)).images for each in (own_pipe, pipe)
        )
        assert torch.equal(images, expected)
    assert pipe.model.tower.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


@pytest.mark.slow
def test_inductor(make_model, encode, dynamo):
    model = make_model().requires_grad_(False)
    compiled = torch.compile(model.predict_velocity, fullgraph=True)
    assert_same(model, compiled, model.encode_context(**encode("a red circle")), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
