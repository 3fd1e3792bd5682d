# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What diffusers asks of every pipeline (`PipelineTesterMixin`), and tests/pipelines does not."""

import copy
import gc
import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from latte_flow_hf import LatteFlowPipeline, LatteFlowPipelineOutput, LatteFlowScheduler
from latte_flow_hf.modeling.context import LatteFlowContext


PROMPT = "a red circle"
PROMPTS = ["a red circle", "a small blue square above a handwritten seven"]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paint(pipe, prompt=PROMPT, **arguments) -> torch.Tensor:
    """Latents after a few steps: what differs anywhere differs here."""
    arguments = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe(prompt, **arguments).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prefills(model):
    """The number of prompts in each prefill, as they come."""
    rows: list[int] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
    yield rows
    hook.remove()


@pytest.fixture
def batches(model):
    """The number of pictures in each run of the tower, as they come."""
    rows: list[int] = []
    hook = model.tower.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    yield rows
    hook.remove()


@pytest.fixture
def own_pipe(make_model, processor, vae):
    """A pipeline whose components a test may change."""
    model = make_model()
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    return quiet(LatteFlowPipeline(model, copy.deepcopy(processor), copy.deepcopy(vae), scheduler))


# What a pipeline looks like from outside.


def test_conventions(pipe, model, processor, vae):
    assert set(pipe.components) == {"model", "processor", "vae", "scheduler"}
    assert pipe.components["model"] is model and pipe.components["vae"] is vae
    assert pipe.model_cpu_offload_seq.split("->") == ["model", "vae"]
    assert pipe._callback_tensor_inputs == ["latents"] and set(pipe._optional_components) == {"processor", "vae"}
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    accepted = inspect.signature(pipe.__call__).parameters
    # What `PipelineTesterMixin` asks of a text-to-image pipeline.
    required = "num_inference_steps num_images_per_prompt generator latents output_type return_dict"
    assert set(required.split()) <= set(accepted)
    assert {"prompt", "height", "width", "guidance_scale", "negative_prompt"} <= set(accepted)
    assert {"callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= set(accepted)
    assert {name for name, p in accepted.items() if p.default is inspect.Parameter.empty} == set()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_dict_and_tuple_are_equal(pipe, output_type):
    arguments = {"num_inference_steps": 2, "output_type": output_type}
    record = pipe(PROMPTS, **arguments, generator=seeded())
    found = pipe(PROMPTS, **arguments, generator=seeded(), return_dict=False)
    assert isinstance(record, LatteFlowPipelineOutput) and isinstance(found, tuple) and len(found) == 1
    assert record[0] is record.images and record.to_tuple() == (record.images,) and list(record) == ["images"]
    for one, other in zip(record.images, found[0], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_progress_bar_may_be_configured(pipe, capsys):
    paint(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="painting", ncols=60)
    paint(pipe)
    assert "4/4" in capsys.readouterr().err


def test_image_batches_of_every_size_equal_one_by_one(pipe):
    for count in (1, 2, 3):
        generators = [seeded(s) for s in range(2 * count)]
        start = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        found = paint(pipe, PROMPTS, num_images_per_prompt=count, latents=start, generator=None, output_type="np")
        assert found.shape == (2 * count, 64, 64, 3)
        for row in range(2 * count):
            alone = paint(pipe, PROMPTS[row // count], latents=start[row : row + 1], generator=None, output_type="np")
            assert np.abs(found[row] - alone[0]).max() < 1e-4


def test_one_generator_draws_for_the_whole_batch(pipe):
    together = paint(pipe, PROMPTS, generator=seeded(5))
    start = torch.randn(2, 4, 8, 8, generator=seeded(5))
    assert torch.equal(paint(pipe, PROMPTS, generator=None, latents=start), together)
    # The generator goes on: the second picture of a seed is another one.
    generator = seeded(5)
    assert not torch.equal(paint(pipe, generator=generator), paint(pipe, generator=generator))


# Guidance.


def test_guidance_may_change_while_it_runs(pipe):
    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    found = paint(pipe, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 6.0
    assert (found - paint(pipe, guidance_scale=2.0)).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_may_end_while_it_runs(pipe, batches, scale):
    # As diffusers' own cut-off callbacks do it: what is left is the conditional branch, and costs one.
    def cut(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = scale
        return tensors

    found = paint(pipe, callback_on_step_end=cut)
    assert batches == [2, 2, 1, 1]
    half = []
    paint(pipe, callback_on_step_end=lambda _, step, t, tensors: half.append(tensors["latents"]))
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    latents, context = half[1], pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0]
    pipe.scheduler.set_begin_index(2)
    for timestep in pipe.scheduler.timesteps[2:]:
        with torch.no_grad():
            velocity = pipe.model.predict_velocity(latents, timestep, context)
        latents = pipe.scheduler.step(velocity, timestep, latents).prev_sample
    torch.testing.assert_close(found, latents, **CLOSE)


# Callbacks.


class Cutoff(PipelineCallback):
    """An official callback: it names its own tensors."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
        return callback_kwargs


class Asking(Cutoff):
    tensor_inputs = ["prompt_embeds"]


def test_callback_objects_bring_their_own_tensors(pipe, prefills):
    last = Cutoff(cutoff_step_ratio=None, cutoff_step_index=3)
    assert (paint(pipe, callback_on_step_end=last) == 0).all()
    both = MultiPipelineCallbacks([Cutoff(cutoff_step_ratio=None, cutoff_step_index=0), last])
    assert (paint(pipe, callback_on_step_end=both) == 0).all()
    prefills.clear()
    with pytest.raises(ValueError, match=r"must be among \['latents'\], got \['prompt_embeds'\]"):
        paint(pipe, callback_on_step_end=Asking(cutoff_step_ratio=None, cutoff_step_index=0))
    assert prefills == []


@pytest.mark.parametrize("last", [0, 2])
def test_callback_stops_the_run_where_it_likes(pipe, batches, last):
    kept = []

    def stop(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = step == last

    found = paint(pipe, callback_on_step_end=stop, output_type="pt")
    assert len(batches) == len(kept) == last + 1
    # What there is, is decoded.
    assert torch.equal(found, pipe.decode_latents(kept[-1], "pt"))


def test_what_a_callback_changes_is_what_is_decoded(pipe):
    def erase(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    found = paint(pipe, callback_on_step_end=erase, output_type="pt")
    assert torch.equal(found, pipe.decode_latents(torch.zeros(1, 4, 8, 8), "pt"))


@pytest.mark.parametrize("asked", [["velocity"], ["latents", "context"], "latents"])
def test_callback_tensors_are_checked(pipe, prefills, asked):
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs must be among"):
        paint(pipe, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=asked)
    assert prefills == []


def test_callback_tensors_may_be_none(pipe):
    seen = []
    paint(pipe, callback_on_step_end=lambda *given: seen.append(given[3]), callback_on_step_end_tensor_inputs=None)
    assert seen == [{}] * 4


def test_generators_are_checked_one_by_one(pipe, prefills):
    with pytest.raises(ValueError, match="one for each of 2 pictures, got None"):
        paint(pipe, PROMPTS, generator=[seeded(), None])
    assert prefills == []


# Prompts encoded before.


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_encoding_apart_gives_the_same_picture(pipe, prefills, guidance_scale):
    guided = guidance_scale > 1
    arguments = {"guidance_scale": guidance_scale, "generator": seeded()}
    expected = paint(pipe, PROMPTS, **arguments)
    context, negative = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=guided)
    prefills.clear()
    found = paint(pipe, None, context=context, negative_context=negative, **{**arguments, "generator": seeded()})
    assert torch.equal(found, expected) and prefills == []
    # The unconditional one alone may be left to the pipeline, and one will do for all.
    alone = paint(pipe, None, context=context, **{**arguments, "generator": seeded()})
    assert torch.equal(alone, expected)
    if guided:
        one = negative.select(torch.tensor([0]))
        alone = paint(pipe, None, context=context, negative_context=one, **{**arguments, "generator": seeded()})
        assert torch.equal(alone, expected)


def test_several_images_of_a_context(pipe):
    context, negative = pipe.encode_prompt(PROMPTS)
    found = paint(pipe, None, context=context, negative_context=negative, num_images_per_prompt=2)
    assert torch.equal(found, paint(pipe, PROMPTS, num_images_per_prompt=2))


def test_contexts_are_checked(pipe, prefills):
    context, negative = pipe.encode_prompt(PROMPTS)
    none = context.select(torch.tensor([], dtype=torch.long))
    three = LatteFlowContext.cat([negative, negative.select(torch.tensor([0]))])
    prefills.clear()
    for arguments, message in (
        ({"prompt": PROMPT, "context": context}, "give either `prompt` or `messages`, or `context`"),
        ({"context": context, "image": object()}, "`image` goes with `prompt`"),
        ({"context": "a red circle"}, "context must be a LatteFlowContext of one prompt or more, got str"),
        ({"context": none}, "context must be a LatteFlowContext of one prompt or more"),
        ({"context": context, "negative_context": three}, "negative_context must be one, or one for each of 2, got 3"),
        (
            {"context": context, "negative_context": negative, "negative_prompt": "x"},
            "give either `negative_prompt` or `negative_context`",
        ),
        ({"context": context, "generator": [seeded()]}, "one for each of 2 pictures, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    assert prefills == []


# Components that are left out.


def test_without_an_autoencoder_there_are_latents(pipe, model, processor, vae, picture, prefills, tmp_path):
    start = torch.randn(1, 4, 8, 8, generator=seeded())
    expected = paint(pipe)
    bare = quiet(LatteFlowPipeline(model, processor, None, pipe.scheduler))
    # The scale of DC-AE f32, the paper's, stands in for what cannot be known.
    assert torch.equal(paint(bare, height=256, width=256), expected)
    prefills.clear()
    for kind in ("pil", "np", "pt"):
        with pytest.raises(ValueError, match=f"output_type must be 'latent' as long as vae is None, got '{kind}'"):
            paint(bare, output_type=kind)
    for refused in (lambda: bare.decode_latents(start), lambda: bare.encode_images(picture)):
        with pytest.raises(ValueError, match="vae is None"):
            refused()
    assert prefills == []
    bare.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    assert not (tmp_path / "vae").exists()
    for door in (LatteFlowPipeline, DiffusionPipeline):
        loaded = quiet(door.from_pretrained(tmp_path))
        assert loaded.vae is None
        assert torch.equal(paint(loaded, height=256, width=256), expected)
    # Given later, it counts as if it had been there from the start.
    loaded.register_modules(vae=vae)
    assert loaded.vae_scale_factor == 8
    assert torch.equal(paint(loaded, output_type="pt"), paint(pipe, output_type="pt"))
    assert torch.equal(loaded.encode_images(picture), pipe.encode_images(picture))


def test_without_a_processor_there_are_contexts(pipe, model, vae, prefills, tmp_path):
    context, negative = pipe.encode_prompt(PROMPT)
    expected = paint(pipe)
    bare = quiet(LatteFlowPipeline(model, None, vae, pipe.scheduler))
    bare.save_pretrained(tmp_path)
    loaded = quiet(LatteFlowPipeline.from_pretrained(tmp_path))
    assert loaded.processor is None
    prefills.clear()
    for each in (bare, loaded):
        assert torch.equal(paint(each, None, context=context, negative_context=negative), expected)
        unguided = paint(each, None, context=context, guidance_scale=1.0)
        assert torch.equal(unguided, paint(each, None, context=context, negative_context=negative, guidance_scale=1.0))
        for arguments in (
            {"prompt": PROMPT},
            {"messages": [{"role": "user", "content": PROMPT}]},
            {"context": context},
        ):
            with pytest.raises(ValueError, match="processor is None: give `context`"):
                each(**arguments)
        for refused in (lambda: each.chat("what is this?"), lambda: each.encode_prompt(PROMPT)):  # noqa: B023
            with pytest.raises(ValueError, match="processor is None"):
                refused()
    assert prefills == []


@pytest.mark.parametrize("component", ["vae", "processor"])
def test_optional_components_may_be_left_out_on_loading(pipe, tmp_path, component):
    pipe.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path, **{component: None})
    assert getattr(loaded, component) is None and loaded.model is not None


# The unconditional context that is kept between calls.


def exchange_model(pipe, make_model):
    other = make_model()
    for parameter in other.vlm.parameters():
        parameter.data.mul_(0.5)
    pipe.model = other
    gc.collect()


def exchange_processor(pipe, make_model):
    other = copy.deepcopy(pipe.processor)
    other.chat_template = other.chat_template.replace("assistant", "painter")
    pipe.processor = other


def change_template(pipe, make_model):
    pipe.processor.chat_template = pipe.processor.chat_template.replace("assistant", "painter")


def change_dtype(pipe, make_model):
    pipe.to(torch.bfloat16)


def load_weights(pipe, make_model):
    pipe.model.vlm.load_state_dict({name: 0.5 * tensor for name, tensor in pipe.model.vlm.state_dict().items()})


def exchange_backbone(pipe, make_model):
    other = make_model().vlm
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    pipe.model.vlm = other


CHANGES = [exchange_model, exchange_processor, change_template, change_dtype, load_weights, exchange_backbone]


@pytest.mark.parametrize("change", CHANGES)
def test_kept_context_is_never_stale(own_pipe, make_model, change):
    before = paint(own_pipe)
    change(own_pipe, make_model)
    found = paint(own_pipe)
    fresh = quiet(LatteFlowPipeline(**own_pipe.components))
    assert torch.equal(found, paint(fresh))
    assert not torch.equal(found.float(), before)


def test_kept_context_is_kept(pipe, prefills):
    paint(pipe)
    pipe.to("cpu")
    pipe.vae = copy.deepcopy(pipe.vae)
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config)
    paint(pipe)
    assert prefills == [1, 1, 1]


# Components in several pipelines.


@pytest.mark.parametrize("door", ["components", "from_pipe", "deepcopy"])
def test_components_serve_a_second_pipeline(pipe, door):
    expected = paint(pipe, output_type="pt")
    second = {
        "components": lambda: LatteFlowPipeline(**pipe.components),
        "from_pipe": lambda: LatteFlowPipeline.from_pipe(pipe),
        "deepcopy": lambda: copy.deepcopy(pipe),
    }[door]()
    assert type(second) is LatteFlowPipeline
    assert (second.model is pipe.model) is (door != "deepcopy")
    quiet(second)
    assert torch.equal(paint(second, output_type="pt"), expected)
    # Neither disturbs the other.
    paint(second, "a cross", num_inference_steps=7)
    assert torch.equal(paint(pipe, output_type="pt"), expected)


def test_exchanged_autoencoder_sets_the_size(pipe, picture):
    paint(pipe)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    pipe.vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4).eval()
    assert pipe.vae_scale_factor == 4 and pipe.default_size == 32
    assert pipe.image_processor.config.vae_scale_factor == 4
    assert paint(pipe, output_type="pil")[0].size == (32, 32)
    assert pipe.encode_images(picture).shape == (1, 4, 16, 16)
    # Another class than the annotated one is handed on as well.
    assert LatteFlowPipeline.from_pipe(pipe).vae is pipe.vae


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_diffusers_own_scheduler_paints_the_same(pipe, guidance_scale):
    expected = paint(pipe, guidance_scale=guidance_scale)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(paint(pipe, guidance_scale=guidance_scale), expected)
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(paint(pipe, guidance_scale=guidance_scale), expected)


def test_scheduler_that_cannot_is_named(pipe, prefills):
    for stock, arguments, wanted in (
        (FlowMatchEulerDiscreteScheduler(), {"steps_per_expert": [1, 1]}, "steps_per_expert"),
        (FlowMatchHeunDiscreteScheduler(), {}, "sigmas"),
    ):
        pipe.scheduler = stock
        with pytest.raises(
            ValueError, match=f"scheduler {type(stock).__name__} takes no {wanted}; a LatteFlowSchedule"
        ):
            paint(pipe, **arguments)
    assert prefills == []


# Dtypes, saving and loading.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_is_close(own_pipe, pipe, dtype, tolerance):
    expected = paint(pipe, PROMPTS, output_type="pt", guidance_scale=2.0)
    assert own_pipe.to(dtype) is own_pipe
    assert own_pipe.model.dtype == own_pipe.vae.dtype == own_pipe.dtype == dtype
    found = paint(own_pipe, PROMPTS, output_type="pt", guidance_scale=2.0)
    assert torch.isfinite(found).all()
    assert (found.float() - expected).abs().mean() < tolerance * expected.std()
    assert paint(own_pipe, PROMPTS).dtype == dtype
    assert own_pipe(PROMPT, num_inference_steps=2).images[0].size == (64, 64)


def test_dtype_by_component(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path, dtype={"model": torch.bfloat16, "default": torch.float16})
    assert loaded.model.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float16
    assert torch.isfinite(paint(quiet(loaded), output_type="pt")).all()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_locally(own_pipe, tmp_path, safe, dtype):
    own_pipe.to(dtype)
    own_pipe.save_pretrained(tmp_path, safe_serialization=safe)
    assert bool(list(tmp_path.rglob("diffusion_pytorch_model.bin"))) is not safe
    loaded = quiet(LatteFlowPipeline.from_pretrained(tmp_path, dtype=dtype, local_files_only=True))
    assert loaded.dtype == dtype
    # Moving to another dtype also rounds the rotary frequencies, which loading leaves alone.
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(paint(loaded, output_type="pt"), paint(own_pipe, output_type="pt"), **tolerance)


def test_components_are_let_go_at_the_end(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    for output_type in ("pil", "latent"):
        paint(pipe, output_type=output_type)
    assert freed == [1, 1]
