# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Programs of `torch.export` against `predict_velocity`: the same bits, also for other images and prompts."""

import io

import pytest
import torch
from backbones import prompt_inputs, tiny_config
from diffusers.hooks import apply_layerwise_casting
from helpers import CLOSE, fill, noise

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration
from latte_flow_hf.modeling.export import ExpertVelocity, export_expert
from latte_flow_hf.training import expert_lora_config


PROMPTS = (["a", "a blue square"], ["a green cross", "a", "a red circle above a blue square", ""])


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def pairs(model, expert, encode, program):
    """Velocities of the program and of the model, for batches of several sizes and prompt lengths."""
    boundaries = model.config.expert_boundaries
    timestep = 500.0 * (boundaries[expert] + boundaries[expert + 1])
    module = ExpertVelocity(model, expert)
    side = model.config.sample_size
    for prompts in PROMPTS:
        context = model.encode_context(**encode(*prompts))
        latents = noise(len(prompts), model.config.latent_channels, side, side).to(model.dtype)
        with torch.no_grad():
            yield (
                program(module.inputs(latents, timestep, context)),
                model.predict_velocity(latents, timestep, context),
            )


def check(model, expert, encode):
    program = saved_and_loaded(export_expert(model, expert))
    callable_program = program.module()
    for found, expected in pairs(model, expert, encode, lambda inputs: callable_program(**inputs)):
        assert torch.equal(found, expected)
    return program


@pytest.fixture(scope="module")
def four(make_model):
    return make_model(num_experts=4, sample_size=4)


def test_a_program_has_the_bits_of_the_model_and_one_expert(four, encode):
    program = check(four, 2, encode)
    of_expert = sum(weight.numel() for weight in four.tower.layers[2].parameters())
    of_tower = sum(weight.numel() for weight in four.tower.parameters())
    of_layers = sum(weight.numel() for weight in four.tower.layers.parameters())
    assert sum(weight.numel() for weight in program.parameters()) == of_tower - of_layers + of_expert
    # Guards refuse what is not of the program: another size, a single image.
    module = ExpertVelocity(four, 2)
    context = four.encode_context(**encode("a", "a"))
    for latents in (noise(2, 4, 8, 4), noise(1, 4, 4, 4)):
        few = context if len(latents) == 2 else context.split()[0]
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(**module.inputs(latents, 400.0, few))


@pytest.mark.slow
@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize(
    "config",
    [{}, {"residual_attention": "probabilities"}, {"residual_attention": None}, {"latent_patch_size": 2}],
)
def test_each_kind_of_attention(expert, config, make_model, encode):
    check(make_model(sample_size=8, **config), expert, encode)


@pytest.mark.slow
def test_half_precision_and_adapters(make_model, encode):
    model = make_model(num_experts=4, sample_size=4).to(torch.bfloat16)
    model.add_adapter(expert_lora_config(model, [1], r=2, init_lora_weights=False), "a")
    check(model.eval(), 1, encode)


def test_what_cannot_be_exported_is_refused(make_model):
    model = make_model(sample_size=4)
    with pytest.raises(ValueError, match="expert must be from 0 to 1, got 2"):
        export_expert(model, 2)
    with pytest.raises(ValueError, match="latents must be"):
        export_expert(model, 0, height=0)
    apply_layerwise_casting(model.tower, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="off-loading or layerwise casting hooks the tower"):
        export_expert(model, 0)


def test_onnx(four, encode, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(export_expert(four, 1), dynamo=True, verbose=False).save(tmp_path / "expert.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "expert.onnx")
    names = [node.name for node in session.get_inputs()]

    def run(inputs):
        tensors = torch.utils._pytree.tree_leaves(inputs)
        (velocity,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors)})
        return torch.from_numpy(velocity)

    for found, expected in pairs(four, 1, encode, run):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_tower_of_some_layers_and_unequal_experts(make_model, encode):
    check(make_model(num_experts=2, sample_size=4, tower_layers=[0, 2, 3], layers_per_expert=[1, 2]), 1, encode)


def test_a_program_of_a_layer_with_a_sliding_window_and_dynamic_frequencies():
    """A window of 12 tokens: prompts may be shorter and longer."""
    vlm_config = tiny_config("gemma3")
    settings = vlm_config.text_config.rope_parameters["sliding_attention"]
    settings |= {"rope_type": "dynamic", "factor": 2.0}
    vlm_config.text_config.max_position_embeddings = 32
    model = LatteFlowForConditionalGeneration(
        LatteFlowConfig(
            vlm_config=vlm_config, num_experts=4, latent_channels=4, sample_size=4, timestep_frequency_dim=16
        )
    ).eval()
    fill(model, seed=3, std=0.25)
    assert model.tower.layers[0].layer_type == "sliding_attention"
    program = export_expert(model, 0).module()
    latents = noise(2, 4, 4, 4)
    for lengths in ((5, 3), (20, 14)):
        context = model.encode_context(**prompt_inputs("gemma3", lengths))
        with torch.no_grad():
            expected = model.predict_velocity(latents, 900.0, context)
            found = program(**ExpertVelocity(model, 0).inputs(latents, 900.0, context))
        torch.testing.assert_close(found, expected, **CLOSE)
    context = model.encode_context(**prompt_inputs("gemma3", (29, 3)))
    with pytest.raises(ValueError, match=r"need 33 positions, but .* change beyond 31"):
        ExpertVelocity(model, 0).inputs(latents, 900.0, context)
