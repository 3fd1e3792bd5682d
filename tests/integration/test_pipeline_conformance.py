# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What diffusers tests of every pipeline (`PipelineTesterMixin`), as far as tests/pipelines does not."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from latte_flow_hf import LatteFlowPipeline, LatteFlowPipelineOutput
from latte_flow_hf.modeling.context import LatteFlowContext


PROMPT = "a red circle"
PROMPTS = ["a red circle", "a small blue square above a handwritten seven"]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe, prompt=PROMPT, **arguments) -> torch.Tensor:
    """Latents after a few steps: what differs anywhere differs here."""
    arguments = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe(prompt, **arguments).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prefills(model):
    """The number of prompts in each prefill."""
    rows: list[int] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
    yield rows
    hook.remove()


@pytest.fixture
def batches(model):
    """The number of images in each run of the tower."""
    rows: list[int] = []
    hook = model.tower.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    yield rows
    hook.remove()


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
    generate(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="generating", ncols=60)
    generate(pipe)
    assert "4/4" in capsys.readouterr().err


def test_image_batches_of_every_size_equal_one_by_one(pipe):
    for count in (1, 2, 3):
        generators = [seeded(s) for s in range(2 * count)]
        start = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
        found = generate(pipe, PROMPTS, num_images_per_prompt=count, latents=start, generator=None, output_type="np")
        assert found.shape == (2 * count, 64, 64, 3)
        for row in range(2 * count):
            alone = generate(
                pipe, PROMPTS[row // count], latents=start[row : row + 1], generator=None, output_type="np"
            )
            assert np.abs(found[row] - alone[0]).max() < 1e-4


def test_one_generator_draws_for_the_whole_batch(pipe):
    together = generate(pipe, PROMPTS, generator=seeded(5))
    start = torch.randn(2, 4, 8, 8, generator=seeded(5))
    assert torch.equal(generate(pipe, PROMPTS, generator=None, latents=start), together)
    # The generator has moved on: the second image is another one.
    generator = seeded(5)
    assert not torch.equal(generate(pipe, generator=generator), generate(pipe, generator=generator))


# Guidance.


def test_guidance_may_change_while_it_runs(pipe):
    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    found = generate(pipe, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 6.0
    assert (found - generate(pipe, guidance_scale=2.0)).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_may_end_while_it_runs(pipe, batches, scale):
    # As diffusers' own cut-off callbacks do it: what is left is the conditional branch, and costs one.
    def cut(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = scale
        return tensors

    found = generate(pipe, callback_on_step_end=cut)
    assert batches == [2, 2, 1, 1]
    half = []
    generate(pipe, callback_on_step_end=lambda _, step, t, tensors: half.append(tensors["latents"]))
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
    assert (generate(pipe, callback_on_step_end=last) == 0).all()
    both = MultiPipelineCallbacks([Cutoff(cutoff_step_ratio=None, cutoff_step_index=0), last])
    assert (generate(pipe, callback_on_step_end=both) == 0).all()
    prefills.clear()
    with pytest.raises(ValueError, match=r"must be among \['latents'\], got \['prompt_embeds'\]"):
        generate(pipe, callback_on_step_end=Asking(cutoff_step_ratio=None, cutoff_step_index=0))
    assert prefills == []


@pytest.mark.parametrize("last", [0, 2])
def test_callback_stops_the_run_where_it_likes(pipe, batches, last):
    kept = []

    def stop(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = step == last

    found = generate(pipe, callback_on_step_end=stop, output_type="pt")
    assert len(batches) == len(kept) == last + 1
    # What there is, is decoded.
    assert torch.equal(found, pipe.decode_latents(kept[-1], "pt"))


def test_what_a_callback_changes_is_what_is_decoded(pipe):
    def erase(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    found = generate(pipe, callback_on_step_end=erase, output_type="pt")
    assert torch.equal(found, pipe.decode_latents(torch.zeros(1, 4, 8, 8), "pt"))


@pytest.mark.parametrize("asked", [["velocity"], ["latents", "context"], "latents"])
def test_callback_tensors_are_checked(pipe, prefills, asked):
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs must be among"):
        generate(pipe, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=asked)
    assert prefills == []


def test_callback_tensors_may_be_none(pipe):
    seen = []
    generate(pipe, callback_on_step_end=lambda *given: seen.append(given[3]), callback_on_step_end_tensor_inputs=None)
    assert seen == [{}] * 4


def test_generators_are_checked_one_by_one(pipe, prefills):
    with pytest.raises(ValueError, match="one for each of 2 images, got None"):
        generate(pipe, PROMPTS, generator=[seeded(), None])
    assert prefills == []


# Prompts encoded before.


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_encoding_apart_gives_the_same_image(pipe, prefills, guidance_scale):
    guided = guidance_scale > 1
    arguments = {"guidance_scale": guidance_scale, "generator": seeded()}
    expected = generate(pipe, PROMPTS, **arguments)
    context, negative = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=guided)
    prefills.clear()
    found = generate(pipe, None, context=context, negative_context=negative, **{**arguments, "generator": seeded()})
    assert torch.equal(found, expected) and prefills == []
    # The negative one may be left to the pipeline (which then encodes it in another batch), and one can serve all.
    alone = generate(pipe, None, context=context, **{**arguments, "generator": seeded()})
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    if guided:
        one = negative.select(torch.tensor([0]))
        alone = generate(pipe, None, context=context, negative_context=one, **{**arguments, "generator": seeded()})
        assert torch.equal(alone, expected)


def test_several_images_of_a_context(pipe):
    context, negative = pipe.encode_prompt(PROMPTS)
    found = generate(pipe, None, context=context, negative_context=negative, num_images_per_prompt=2)
    assert torch.equal(found, generate(pipe, PROMPTS, num_images_per_prompt=2))


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
        (
            {"context": context, "negative_context": three},
            "negative_context must be one, or one for each of 2 prompts, got 3",
        ),
        (
            {"context": context, "negative_context": negative, "negative_prompt": "x"},
            "give either `negative_prompt` or `negative_context`",
        ),
        ({"context": context, "generator": [seeded()]}, "one for each of 2 images, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    assert prefills == []


# Components that are left out.


def test_without_an_autoencoder_there_are_latents(pipe, model, processor, vae, picture, prefills, tmp_path):
    start = torch.randn(1, 4, 8, 8, generator=seeded())
    expected = generate(pipe)
    bare = quiet(LatteFlowPipeline(model, processor, None, pipe.scheduler))
    # The scale of DC-AE f32, the paper's, stands in for what cannot be known.
    assert torch.equal(generate(bare, height=256, width=256), expected)
    prefills.clear()
    for kind in ("pil", "np", "pt"):
        with pytest.raises(ValueError, match=f"output_type must be 'latent' as long as vae is None, got '{kind}'"):
            generate(bare, output_type=kind)
    for refused in (lambda: bare.decode_latents(start), lambda: bare.encode_images(picture)):
        with pytest.raises(ValueError, match="vae is None"):
            refused()
    assert prefills == []
    bare.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    assert not (tmp_path / "vae").exists()
    for load_with in (LatteFlowPipeline, DiffusionPipeline):
        loaded = quiet(load_with.from_pretrained(tmp_path))
        assert loaded.vae is None
        assert torch.equal(generate(loaded, height=256, width=256), expected)
    # Given later, it counts as if it had been there from the start.
    loaded.register_modules(vae=vae)
    assert loaded.vae_scale_factor == 8
    assert torch.equal(generate(loaded, output_type="pt"), generate(pipe, output_type="pt"))
    assert torch.equal(loaded.encode_images(picture), pipe.encode_images(picture))


def test_without_a_processor_there_are_contexts(pipe, model, vae, prefills, tmp_path):
    context, negative = pipe.encode_prompt(PROMPT)
    expected = generate(pipe)
    bare = quiet(LatteFlowPipeline(model, None, vae, pipe.scheduler))
    bare.save_pretrained(tmp_path)
    loaded = quiet(LatteFlowPipeline.from_pretrained(tmp_path))
    assert loaded.processor is None
    prefills.clear()
    for each in (bare, loaded):
        assert torch.equal(generate(each, None, context=context, negative_context=negative), expected)
        unguided = generate(each, None, context=context, guidance_scale=1.0)
        assert torch.equal(
            unguided, generate(each, None, context=context, negative_context=negative, guidance_scale=1.0)
        )
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


# Components that change between calls.


def exchange_model(pipe, make_model):
    pipe.model = make_model()
    for parameter in pipe.model.vlm.parameters():
        parameter.data.mul_(0.5)


def change_template(pipe, make_model):
    pipe.processor.chat_template = pipe.processor.chat_template.replace("assistant", "painter")


def change_dtype(pipe, make_model):
    pipe.to(torch.bfloat16)


def load_weights(pipe, make_model):
    pipe.model.vlm.load_state_dict({name: 0.5 * tensor for name, tensor in pipe.model.vlm.state_dict().items()})


@pytest.mark.parametrize("change", [exchange_model, change_template, change_dtype, load_weights])
def test_nothing_of_a_call_is_used_in_the_next(own_pipe, make_model, change):
    before = generate(own_pipe)
    change(own_pipe, make_model)
    found = generate(own_pipe)
    fresh = quiet(LatteFlowPipeline(**own_pipe.components))
    assert torch.equal(found, generate(fresh))
    assert not torch.equal(found.float(), before)


# Components in several pipelines.


@pytest.mark.parametrize("load_with", ["components", "from_pipe", "deepcopy"])
def test_components_serve_a_second_pipeline(pipe, load_with):
    expected = generate(pipe, output_type="pt")
    second = {
        "components": lambda: LatteFlowPipeline(**pipe.components),
        "from_pipe": lambda: LatteFlowPipeline.from_pipe(pipe),
        "deepcopy": lambda: copy.deepcopy(pipe),
    }[load_with]()
    assert type(second) is LatteFlowPipeline
    assert (second.model is pipe.model) is (load_with != "deepcopy")
    quiet(second)
    assert torch.equal(generate(second, output_type="pt"), expected)
    # Neither disturbs the other.
    generate(second, "a cross", num_inference_steps=7)
    assert torch.equal(generate(pipe, output_type="pt"), expected)


def test_components_keep_their_dtype_in_another_pipeline(own_pipe):
    """They are shared: a conversion, which diffusers makes, would change the first pipeline."""
    own_pipe.model.to(torch.bfloat16)
    LatteFlowPipeline.from_pipe(own_pipe)
    assert own_pipe.model.dtype == torch.bfloat16 and own_pipe.vae.dtype == torch.float32
    assert LatteFlowPipeline.from_pipe(own_pipe, dtype=torch.float16).model.dtype == torch.float16
    other = LatteFlowPipeline.from_pipe(own_pipe, vae=None)
    assert other.vae is None and other.model is own_pipe.model


def test_exchanged_autoencoder_sets_the_size(pipe, picture):
    generate(pipe)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    pipe.vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4).eval()
    assert pipe.vae_scale_factor == 4 and pipe.default_size == 32
    assert pipe.image_processor.config.vae_scale_factor == 4
    assert generate(pipe, output_type="pil")[0].size == (32, 32)
    assert pipe.encode_images(picture).shape == (1, 4, 16, 16)
    # Another class than the annotated one is handed on as well.
    assert LatteFlowPipeline.from_pipe(pipe).vae is pipe.vae


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_diffusers_own_scheduler_takes_the_same_steps(pipe, guidance_scale):
    expected = generate(pipe, guidance_scale=guidance_scale)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(generate(pipe, guidance_scale=guidance_scale), expected)


def test_diffusers_own_heun_scheduler(pipe, batches):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    assert torch.isfinite(generate(pipe)).all()
    assert len(batches) == pipe.num_timesteps == 7


def test_steps_per_expert_need_our_scheduler(pipe, prefills):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    message = "scheduler FlowMatchEulerDiscreteScheduler takes no steps_per_expert; use a LatteFlowScheduler"
    with pytest.raises(ValueError, match=message):
        generate(pipe, steps_per_expert=[1, 1])
    assert prefills == []


# Dtypes, saving and loading.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_is_close(own_pipe, pipe, dtype, tolerance):
    expected = generate(pipe, PROMPTS, output_type="pt", guidance_scale=2.0)
    assert own_pipe.to(dtype) is own_pipe
    assert own_pipe.model.dtype == own_pipe.vae.dtype == own_pipe.dtype == dtype
    found = generate(own_pipe, PROMPTS, output_type="pt", guidance_scale=2.0)
    assert torch.isfinite(found).all()
    assert (found.float() - expected).abs().mean() < tolerance * expected.std()
    assert generate(own_pipe, PROMPTS).dtype == dtype
    assert own_pipe(PROMPT, num_inference_steps=2).images[0].size == (64, 64)


def test_dtype_by_component(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path, dtype={"model": torch.bfloat16, "default": torch.float16})
    assert loaded.model.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float16
    assert torch.isfinite(generate(quiet(loaded), output_type="pt")).all()


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
    torch.testing.assert_close(generate(loaded, output_type="pt"), generate(own_pipe, output_type="pt"), **tolerance)


def test_hooks_are_freed_at_the_end(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    for output_type in ("pil", "latent"):
        generate(pipe, output_type=output_type)
    assert freed == [1, 1]
