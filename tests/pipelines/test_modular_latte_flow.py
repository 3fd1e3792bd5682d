# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The modular pipeline against the pipeline, and guiders of diffusers against their formulas."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import InputParam

from latte_flow_hf import LatteFlowModularPipeline, LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.pipelines.modular_latte_flow import LatteFlowBlocks


@pytest.fixture
def modular(pipe) -> LatteFlowModularPipeline:
    """A modular pipeline around the components of `pipe`."""
    modular = LatteFlowModularPipeline(LatteFlowBlocks())
    modular.update_components(**pipe.components)
    modular.set_progress_bar_config(disable=True)
    return modular


def generate(modular, guider=None, **call):
    if guider is not None:
        modular.update_components(guider=guider)
    call = {"prompt": "a red circle", "num_inference_steps": 4, **call}
    return modular(**call, generator=torch.Generator().manual_seed(0), output_type="latent", output="images")


def latents_of(pipe, **call):
    call = {"prompt": "a red circle", "num_inference_steps": 4, **call}
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.fixture
def messages(picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "the same in red"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"prompt": ["a red circle", "a blue square left of a red circle"], "num_images_per_prompt": 2},
        {"prompt": ["a", "a red circle"], "negative_prompt": "a blue square", "height": 32, "width": 64},
        {"num_inference_steps": None, "steps_per_expert": [3, 1]},
        {"sigmas": [1.0, 0.7, 0.2]},
        {"timesteps": [1000.0, 300.0]},
    ],
)
def test_classifier_free_guidance_gives_the_bits_of_the_pipeline(call, pipe, modular):
    assert torch.equal(generate(modular, **call), latents_of(pipe, guidance_scale=4.0, **call))


def test_images_and_conversations_as_prompts(pipe, modular, picture, messages):
    for call in ({"image": picture}, {"prompt": None, "messages": messages}):
        assert torch.equal(generate(modular, **call), latents_of(pipe, guidance_scale=4.0, **call))


def test_other_solvers_and_no_guidance(pipe, modular):
    for solver in ("heun", "euler"):
        boundaries = pipe.model.config.expert_boundaries
        scheduler = LatteFlowScheduler(expert_boundaries=boundaries, solver=solver, new_noise=0.3)
        if solver == "heun":
            scheduler = LatteFlowScheduler(expert_boundaries=boundaries, solver=solver)
        pipe.scheduler = scheduler
        modular.update_components(scheduler=scheduler)
        modular.guider.enable()
        assert torch.equal(generate(modular), latents_of(pipe, guidance_scale=4.0))
        modular.guider.disable()
        assert torch.equal(generate(modular), latents_of(pipe, guidance_scale=1.0))
    assert modular.scheduler is scheduler and modular.guider._step is None


def test_decoded_images(pipe, modular):
    generator = torch.Generator().manual_seed(0)
    state = modular(prompt="a red circle", num_inference_steps=2, generator=generator)
    (expected,) = pipe(
        "a red circle", num_inference_steps=2, guidance_scale=4.0, generator=generator.manual_seed(0)
    ).images
    assert state.get("images")[0].tobytes() == expected.tobytes()
    assert isinstance(state.get("context"), LatteFlowContext)
    # Another call can start from the state of this one.
    again = modular(state=state, prompt=None, latents=None, generator=generator.manual_seed(0), output="images")
    assert again[0].tobytes() == expected.tobytes()


def test_interval_of_a_guider_counts_evaluations(pipe, modular):
    """`start` and `stop` are fractions of the evaluations: here the second and third of four."""
    found = generate(modular, ClassifierFreeGuidance(4.0, start=0.25, stop=0.75))
    # Evaluations at sigma 1, 0.75, 0.5 and 0.25.
    expected = latents_of(pipe, guidance_scale=4.0, guidance_interval=(0.4, 0.8))
    assert torch.equal(found, expected)
    assert not torch.equal(found, latents_of(pipe, guidance_scale=4.0))


def by_hand(pipe, combine, predict=None):
    """Four steps of Euler in which `combine(conditional, unconditional, step)` gives the velocity."""
    latents = pipe.prepare_latents(1, 64, 64, torch.float32, "cpu", torch.Generator().manual_seed(0))
    context, negative = pipe.encode_prompt("a red circle")
    both = LatteFlowContext.cat([negative, context])
    for step, sigma in enumerate((1.0, 0.75, 0.5, 0.25)):
        if predict is None:
            pair = pipe.model.predict_velocity(torch.cat([latents, latents]), 1000 * sigma, both)
            uncond, cond = pair.chunk(2)
        else:
            cond, uncond = predict(latents, 1000 * sigma, context, negative)
        latents = latents - 0.25 * combine(cond, uncond, step)
    return latents


def zero_star(cond, uncond, step):
    uncond = uncond * cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1))[:, :, None, None]
    return torch.zeros_like(cond) if step == 0 else uncond + 4.0 * (cond - uncond)


def projected(cond, uncond, step):
    return normalized_guidance(cond, uncond, 4.0, norm_threshold=15.0)


@pytest.mark.parametrize(
    ("guider", "combine"),
    [(ClassifierFreeZeroStarGuidance(4.0), zero_star), (AdaptiveProjectedGuidance(4.0), projected)],
)
@torch.no_grad()
def test_guiders_of_diffusers_combine_the_predictions(guider, combine, pipe, modular):
    torch.testing.assert_close(generate(modular, guider), by_hand(pipe, combine), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "guider",
    [TangentialClassifierFreeGuidance(4.0), AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1)],
)
def test_other_guiders_of_two_predictions_run(guider, pipe, modular):
    found = generate(modular, guider)
    assert found.isfinite().all() and not torch.allclose(found, latents_of(pipe, guidance_scale=4.0), atol=1e-3)


def test_a_momentum_starts_anew_with_each_call(modular):
    guider = AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5)
    assert torch.equal(generate(modular, guider), generate(modular))


def without_layers(model, layers):
    """The model with layers that do nothing: their modulation of the residual branches is zero."""
    weaker = copy.deepcopy(model)
    for index in layers:
        weaker.tower.layers[index].forward = lambda hidden_states, _, scores, *__, **___: (hidden_states, scores)
    return weaker


@torch.no_grad()
def test_auto_guidance_skips_layers_of_the_unconditional_model(pipe, modular):
    weaker = without_layers(pipe.model, [1, 2])

    def predict(latents, timestep, context, negative):
        return pipe.model.predict_velocity(latents, timestep, context), weaker.predict_velocity(
            latents, timestep, negative
        )

    guider = AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig([1, 2], fqn="auto"))
    expected = by_hand(pipe, lambda cond, uncond, step: uncond + 2.0 * (cond - uncond), predict)
    torch.testing.assert_close(generate(modular, guider), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, latents_of(pipe, guidance_scale=2.0), atol=1e-3)


@torch.no_grad()
def test_skip_layer_guidance(pipe, modular):
    weaker, shared = without_layers(pipe.model, [0]), {}

    def predict(latents, timestep, context, negative):
        shared["skipped"] = weaker.predict_velocity(latents, timestep, context)
        return [pipe.model.predict_velocity(latents, timestep, c) for c in (context, negative)]

    def combine(cond, uncond, step):
        velocity = uncond + 4.0 * (cond - uncond)
        return velocity + 2.8 * (cond - shared["skipped"]) if step == 1 else velocity

    # diffusers excludes the first of its steps.
    guider = SkipLayerGuidance(
        4.0, skip_layer_config=LayerSkipConfig([0]), skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5
    )
    torch.testing.assert_close(generate(modular, guider), by_hand(pipe, combine, predict), atol=1e-4, rtol=1e-4)


def test_layers_are_skipped_in_one_call_alone(pipe, modular):
    """Hooks on shared layers would change the images of other threads, and stay after an error."""
    expected = latents_of(pipe, guidance_scale=4.0)
    modular.update_components(guider=AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig([0, 1, 2, 3])))
    guided = generate(modular)
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(latents_of, pipe, guidance_scale=4.0) for _ in range(3)]
        again = threads.submit(generate, modular)
        assert all(torch.equal(other.result(), expected) for other in others)
        assert torch.equal(again.result(), guided)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.model.modules())


def layers(indices, **config):
    return AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig(indices, **config))


@pytest.mark.parametrize(
    ("guider", "words"),
    [
        (PerturbedAttentionGuidance(perturbed_guidance_layers=[1]), "PerturbedAttentionGuidance needs other predict"),
        (SmoothedEnergyGuidance(seg_guidance_layers=[1]), "SmoothedEnergyGuidance needs other predictions"),
        (LTX2Guidance(), "LTX2Guidance needs other predictions"),
        (AutoGuidance(2.0, auto_guidance_layers=[1], dropout=1.0), "can skip whole layers only, got LayerSkipConfig"),
        (layers([0, 2], skip_ff=False), "can skip whole layers only"),
        (layers([0, 2], dropout=0.5), "can skip whole layers only"),
        (layers([1]), r"skips the layers \[1\], but needs a layer of each expert .* 1: \[2, 3\]"),
        (layers([0, 2, 4]), r"skips the layers \[0, 2, 4\], but needs"),
        (
            SkipLayerGuidance(4.0, skip_layer_config=LayerSkipConfig([0]), skip_layer_guidance_stop=0.1),
            "skips layers at none of the 4 steps",
        ),
        ("none", "guider must be a guider of diffusers, got str"),
    ],
)
def test_guiders_that_would_do_nothing_are_refused(guider, words, modular, count_layers):
    modular.guider = guider
    with count_layers(modular.model) as calls, pytest.raises(ValueError, match=words):
        generate(modular)
    assert not calls


def test_distilled_experts_are_not_guided_twice(modular, make_model):
    model = make_model()
    model.config.sampling = {"steps_per_expert": [1, 1], "guidance_scale": 1.0, "distilled_experts": [1]}
    modular.update_components(model=model)
    with pytest.raises(ValueError, match=r"guider ClassifierFreeGuidance would guide the experts \[1\] a second time"):
        generate(modular, num_inference_steps=None)
    half = ClassifierFreeGuidance(4.0, stop=0.5)
    assert generate(modular, half, num_inference_steps=None).isfinite().all()
    with pytest.raises(ValueError, match="expert 1 was distilled to"):
        generate(modular, num_inference_steps=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"guidance_scale": 7.0}, r"guidance_scale: no input of these blocks.*set by the guider"),
        ({"height": 33}, "height must be a positive multiple"),
        ({"prompt": None}, "give either `prompt` or `messages`"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must be of shape"),
    ],
)
def test_wrong_inputs_are_refused(call, words, modular):
    with pytest.raises(ValueError, match=words):
        generate(modular, **call)


def test_any_checkpoint_of_the_pipeline_is_one_of_the_modular_pipeline(pipeline):
    modular = ModularPipeline.from_pretrained(pipeline)
    assert isinstance(modular, LatteFlowModularPipeline)
    with pytest.raises(ValueError, match="model, scheduler: not loaded yet; call load_components"):
        generate(modular)
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    assert torch.equal(generate(modular), latents_of(LatteFlowPipeline.from_pretrained(pipeline), guidance_scale=4.0))


def test_what_is_saved_is_loaded_again_guider_included(modular, tmp_path):
    modular.update_components(guider=AdaptiveProjectedGuidance(3.0, eta=0.5))
    modular.guider.guidance_scale = 2.5
    expected = generate(modular)
    modular.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert json.loads((tmp_path / "moved" / "modular_model_index.json").read_text())["guider"][1] == (
        "AdaptiveProjectedGuidance"
    )
    loaded = ModularPipeline.from_pretrained(tmp_path / "moved")
    loaded.load_components(dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.guider.guidance_scale, loaded.guider.eta) == (2.5, 0.5)
    assert torch.equal(generate(loaded), expected)


def test_a_component_that_cannot_be_loaded_is_named(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "damaged")
    (tmp_path / "damaged" / "model" / "model.safetensors").write_bytes(b"")
    modular = ModularPipeline.from_pretrained(tmp_path / "damaged")
    with pytest.raises(OSError, match="model: could not be loaded"):
        modular.load_components()
    with pytest.raises(ValueError, match=r"names must be among .* got \['unet'\]"):
        modular.load_components("unet")


def test_a_pipeline_without_autoencoder(pipe, tmp_path):
    LatteFlowPipeline(pipe.model, pipe.processor, None, pipe.scheduler).save_pretrained(tmp_path)
    modular = ModularPipeline.from_pretrained(tmp_path)
    modular.load_components()
    assert modular.vae is None
    modular.set_progress_bar_config(disable=True)
    assert generate(modular, height=64, width=64).shape == (1, 4, 2, 2)
    with pytest.raises(ValueError, match="output_type must be 'latent'"):
        modular(prompt="a")


class Recorder(ModularPipelineBlocks):
    """A block that a user inserts into the loop."""

    model_name = "latte-flow"
    description = "Records the expert of each step."
    inputs = [InputParam("latents", required=True)]

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, components, block_state, i, t):
        self.seen.append((i, block_state.experts[i], block_state.velocity.shape))
        return components, block_state


def test_blocks_can_be_added_and_taken_out(pipe, pipeline):
    blocks = LatteFlowBlocks()
    recorder = Recorder()
    blocks.sub_blocks["denoise"].sub_blocks.insert("recorder", recorder, 1)
    blocks.sub_blocks.pop("decode")
    modular = blocks.init_pipeline(pipeline)
    modular.load_components(["model", "processor", "scheduler", "vae"])
    modular.set_progress_bar_config(disable=True)
    state = modular(prompt="a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state.get("latents"), latents_of(pipe, guidance_scale=4.0))
    recorded = modular._blocks.sub_blocks["denoise"].sub_blocks["recorder"].seen
    assert [entry[:2] for entry in recorded] == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_one_block_alone_decodes(pipe, vae):
    decode = LatteFlowBlocks().sub_blocks["decode"].init_pipeline()
    decode.update_components(vae=vae)
    latents = latents_of(pipe)
    images = decode(latents=latents, output_type="pt", output="images")
    assert torch.equal(images, pipe.decode_latents(latents, "pt"))


def test_adapters(own_pipe, tmp_path):
    peft = pytest.importorskip("peft")
    from latte_flow_hf.training import expert_lora_config

    plain = latents_of(own_pipe, guidance_scale=4.0)
    model = copy.deepcopy(own_pipe.model)
    config = expert_lora_config(model, [1], r=2, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    modular = LatteFlowModularPipeline(LatteFlowBlocks())
    modular.update_components(**own_pipe.components)
    modular.set_progress_bar_config(disable=True)
    modular.load_lora_weights(tmp_path, adapter_name="a")
    adapted = generate(modular)
    assert torch.equal(adapted, latents_of(own_pipe, guidance_scale=4.0)) and not torch.allclose(adapted, plain)
    guided = generate(modular, AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig([1, 2])))
    modular.unload_lora_weights()
    assert not torch.equal(generate(modular), guided)
    assert torch.equal(latents_of(own_pipe, guidance_scale=4.0), plain)


def test_expert_offload(own_pipe):
    expected = latents_of(own_pipe, guidance_scale=4.0)
    own_pipe.enable_expert_offload("cpu")
    modular = LatteFlowModularPipeline(LatteFlowBlocks())
    modular.update_components(**own_pipe.components)
    modular.set_progress_bar_config(disable=True)
    assert torch.equal(generate(modular), expected)
    with pytest.raises(ValueError, match="AutoGuidance cannot be used with off-loading"):
        generate(modular, AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig([0, 2])))
