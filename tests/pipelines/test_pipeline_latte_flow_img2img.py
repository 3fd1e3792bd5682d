# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image-to-image with random weights. The oracles: the loop written out, and the pipeline without a source."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowPipeline, LatteFlowScheduler


PROMPT = "a red circle"
PROMPTS = ["a red circle", "a small blue square above a handwritten seven", "a cross"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe, *arguments, **keywords) -> torch.Tensor:
    keywords = {"num_inference_steps": 8, "generator": seeded(), "output_type": "latent", **keywords}
    return pipe(*arguments, **keywords).images


@pytest.fixture
def img2img(pipe) -> LatteFlowImg2ImgPipeline:
    img2img = LatteFlowImg2ImgPipeline.from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)
    return img2img


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(6)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


def test_the_call_takes_the_arguments_of_the_other_pipeline():
    own = inspect.signature(LatteFlowImg2ImgPipeline.__call__).parameters
    other = inspect.signature(LatteFlowPipeline.__call__).parameters
    assert own.keys() - other.keys() == {"strength", "context_image"} and other.keys() <= own.keys()
    shared = other.keys() - {"image"}
    assert all(own[name].default == other[name].default for name in shared)
    assert list(own)[:4] == ["self", "prompt", "image", "strength"]
    assert LatteFlowImg2ImgPipeline.generate is LatteFlowImg2ImgPipeline.__call__


@torch.no_grad()
@pytest.mark.parametrize(("strength", "num_taken"), [(0.5, 4), (0.55, 5), (0.01, 1)])
def test_a_run_equals_the_loop_written_out(img2img, model, encode, picture, strength, num_taken):
    """The loop of diffusers' flow-matching image-to-image pipelines, with diffusers' scheduler."""
    steps, scale = 8, 3.0
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    first = int(max(steps - steps * strength, 0))
    assert steps - first == num_taken
    stock.set_begin_index(first)
    timesteps = stock.timesteps[first:]
    clean = img2img.encode_images(picture)
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    sample = stock.scale_noise(clean, timesteps[:1], noise)
    context, empty = model.encode_context(**encode(PROMPT)), model.encode_context(**encode(""))
    for timestep in timesteps:
        unconditional = model.predict_velocity(sample, timestep, empty)
        velocity = unconditional + scale * (model.predict_velocity(sample, timestep, context) - unconditional)
        sample = stock.step(velocity, timestep, sample).prev_sample
    found = generate(img2img, PROMPT, picture, strength, guidance_scale=scale)
    torch.testing.assert_close(found, sample, rtol=1e-3, atol=1e-4)
    assert img2img.num_timesteps == num_taken


SCHEDULERS = [
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], shift=2.0),
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], new_noise=0.5),
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], solver="heun"),
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchHeunDiscreteScheduler(),
    FlowMatchLCMScheduler(),
    UniPCMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    DEISMultistepScheduler(**FLOW),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_strength_1_is_generation_without_a_source(pipe, img2img, picture, scheduler):
    """Bit for bit: the noise is drawn first, and the autoencoder draws none."""
    pipe.scheduler = img2img.scheduler = scheduler
    assert torch.equal(generate(img2img, PROMPT, picture, 1.0), generate(pipe, PROMPT))


@torch.no_grad()
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_every_solver_starts_at_its_step(img2img, model, picture, scheduler, monkeypatch):
    """The oracle: a velocity that always points at the same data leads there from every start."""
    img2img.scheduler = scheduler
    target, calls = torch.full((1, 4, 8, 8), 0.5), []

    def predict(latents, timestep, context, expert, **arguments):
        calls.append((float(timestep) / 1000, expert, latents))
        return (latents - target) / (timestep / 1000)

    monkeypatch.setattr(model, "predict_velocity", predict, raising=False)
    found = generate(img2img, PROMPT, picture, 0.5, guidance_scale=1.0)
    torch.testing.assert_close(found, target, rtol=0, atol=1e-2)
    sigma, _, start = calls[0]
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    torch.testing.assert_close(start, (1 - sigma) * img2img.encode_images(picture) + sigma * noise)
    assert img2img.num_timesteps == len(calls) == (7 if scheduler.order == 2 else 4)
    for sigma, expert, _ in calls:
        assert expert == (0 if sigma > 0.5 + 1e-5 else 1) or scheduler.order == 2


def test_experts_above_the_start_never_run(img2img, model, picture, count_layers):
    with count_layers(model) as calls:
        generate(img2img, PROMPT, picture, 0.5)
    assert calls == {2: 4, 3: 4}
    with count_layers(model) as calls:
        generate(img2img, PROMPT, picture, 0.75)
    assert calls == {0: 2, 1: 2, 2: 4, 3: 4}


def test_experts_above_the_start_are_not_fetched(own_pipe, pipe, picture, img2img):
    expected = generate(img2img, PROMPT, picture, 0.5)
    offloaded = LatteFlowImg2ImgPipeline.from_pipe(own_pipe)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_expert_offload("cpu")
    assert torch.equal(generate(offloaded, PROMPT, picture, 0.5), expected)


def test_only_all_steps_start_from_pure_noise(img2img, model, picture, monkeypatch):
    """The second of 500 steps, at sigma 0.998, keeps 0.2% of the source."""
    starts, predict = [], model.predict_velocity

    def recorded(latents, *arguments, **keywords):
        starts.append(latents)
        return predict(latents, *arguments, **keywords)

    monkeypatch.setattr(model, "predict_velocity", recorded, raising=False)
    stop = lambda pipe, *_: setattr(pipe, "_interrupt", True)  # noqa: E731
    call = {"num_inference_steps": 500, "guidance_scale": 1.0, "callback_on_step_end": stop}
    for strength in (1.0, 0.998):
        generate(img2img, PROMPT, picture, strength, **call)
    noise, clean = torch.randn(1, 4, 8, 8, generator=seeded()), img2img.encode_images(picture)
    assert torch.equal(starts[0], noise)
    torch.testing.assert_close(starts[1], 0.002 * clean + 0.998 * noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [{"steps_per_expert": [2, 6]}, {"sigmas": [0.9, 0.6, 0.4, 0.2]}])
def test_strength_is_a_share_of_the_given_steps(img2img, picture, call):
    times = []
    generate(
        img2img,
        PROMPT,
        picture,
        0.5,
        num_inference_steps=None,
        callback_on_step_end=lambda pipe, step, timestep, _: times.append((step, round(float(timestep)))),
        **call,
    )
    last = [333, 250, 167, 83] if "steps_per_expert" in call else [400, 200]
    assert times == list(enumerate(last))


def test_given_steps_may_start_below_the_noise(img2img, picture):
    clean, noise = img2img.encode_images(picture), torch.randn(1, 4, 8, 8, generator=seeded(3))
    call = {"timesteps": [600.0, 300.0], "num_inference_steps": None}
    expected = generate(LatteFlowPipeline.from_pipe(img2img), PROMPT, latents=(1 - 0.6) * clean + 0.6 * noise, **call)
    found = generate(img2img, PROMPT, picture, 1.0, latents=noise, **call)
    torch.testing.assert_close(found, expected)


def test_sources_and_prompts_are_broadcast(img2img, pictures):
    generators = [seeded(seed) for seed in range(3)]
    alone = {
        (prompt, index): generate(img2img, prompt, pictures[index], 0.6, generator=[seeded(index)])
        for prompt, index in [(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[2], 2), (PROMPTS[0], 1), (PROMPTS[0], 2)]
    }
    close = {"rtol": 1e-3, "atol": 1e-4}
    both = generate(img2img, PROMPTS, pictures, 0.6, generator=generators)
    torch.testing.assert_close(both, torch.cat([alone[PROMPTS[i], i] for i in range(3)]), **close)
    one_prompt = generate(img2img, PROMPT, pictures, 0.6, generator=[seeded(seed) for seed in range(3)])
    torch.testing.assert_close(one_prompt, torch.cat([alone[PROMPT, i] for i in range(3)]), **close)
    one_source = generate(img2img, PROMPTS, pictures[0], 0.6, generator=[seeded(0) for _ in range(3)])
    torch.testing.assert_close(one_source[:1], alone[PROMPT, 0], **close)
    # The images of a prompt stand together, each with its source.
    several = generate(
        img2img, PROMPTS[:2], pictures[:2], 0.6, num_images_per_prompt=2, generator=[seeded(i) for i in (0, 7, 7, 1)]
    )
    torch.testing.assert_close(several[:1], alone[PROMPTS[0], 0], **close)
    torch.testing.assert_close(several[3:], alone[PROMPTS[1], 1], **close)


def test_sources_come_from_anywhere_through_the_one_loader(img2img, picture, tmp_path):
    expected = generate(img2img, PROMPT, picture, 0.6)
    picture.save(tmp_path / "picture.png")
    array = np.asarray(picture)
    for source in (tmp_path / "picture.png", [picture], array[None], torch.from_numpy(array / 255).movedim(-1, 0)):
        assert torch.equal(generate(img2img, PROMPT, source, 0.6), expected)
    hidden = picture.convert("RGBA")
    hidden.putalpha(0)
    white = Image.new("RGB", (64, 64), "white")
    assert torch.equal(generate(img2img, PROMPT, hidden, 0.6), generate(img2img, PROMPT, white, 0.6))


def test_the_size_is_the_model_s_or_the_given_one(img2img, picture):
    large = picture.resize((256, 128))
    assert generate(img2img, PROMPT, large, 0.5).shape == (1, 4, 8, 8)
    found = img2img(PROMPT, large, 0.5, height=64, width=128, num_inference_steps=4, generator=seeded()).images[0]
    assert found.size == (128, 64)


def test_context_images_are_those_of_the_prompt(pipe, img2img, picture, pictures):
    found = generate(img2img, PROMPT, picture, 1.0, context_image=pictures[1])
    assert torch.equal(found, generate(pipe, PROMPT, image=pictures[1]))
    assert not torch.equal(found, generate(pipe, PROMPT))
    messages = [{"role": "user", "content": PROMPT}]
    assert torch.equal(
        generate(img2img, None, picture, 0.6, messages=messages), generate(img2img, PROMPT, picture, 0.6)
    )
    context, negative = pipe.encode_prompt(PROMPT)
    encoded = generate(img2img, None, pictures[:2], 0.6, context=context, negative_context=negative)
    assert encoded.shape[0] == 2


def test_a_callback_may_interrupt_and_change(img2img, picture, model, count_layers):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0}

    with count_layers(model) as calls:
        found = generate(img2img, PROMPT, picture, 0.5, callback_on_step_end=stop)
    assert not found.any() and calls == {2: 2, 3: 2}


def test_saved_pipelines_load(img2img, picture, tmp_path):
    expected = generate(img2img, PROMPT, picture, 0.6)
    img2img.save_pretrained(tmp_path)
    for load in (DiffusionPipeline, LatteFlowImg2ImgPipeline):
        loaded = load.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is LatteFlowImg2ImgPipeline
        assert torch.equal(generate(loaded, PROMPT, picture, 0.6), expected)
    assert type(LatteFlowPipeline.from_pretrained(tmp_path)) is LatteFlowPipeline


def test_a_distilled_model_starts_where_a_step_does(own_pipe, picture):
    own_pipe.model.config.sampling = {
        "steps_per_expert": [2, 1],
        "guidance_scale": 1.0,
        "distilled_experts": [0, 1],
    }
    img2img = LatteFlowImg2ImgPipeline.from_pipe(own_pipe)
    img2img.set_progress_bar_config(disable=True)
    own_steps = {"num_inference_steps": None}
    for strength, times in [(1, [1000, 750, 500]), (2 / 3, [750, 500]), (0.667, [750, 500]), (1 / 3, [500])]:
        seen = []
        note = lambda pipe, step, timestep, _, seen=seen: seen.append(float(timestep))  # noqa: E731
        generate(img2img, PROMPT, picture, strength, callback_on_step_end=note, **own_steps)
        assert seen == times
    assert torch.equal(
        generate(img2img, PROMPT, picture, **own_steps), generate(img2img, PROMPT, picture, 2 / 3, **own_steps)
    )
    message = "strength must be one of 0.3333, 0.6667, 1: expert 0 was distilled to steps_per_expert=[2, 1]"
    for strength in (0.5, 0.9):
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(img2img, PROMPT, picture, strength, **own_steps)
    with pytest.raises(ValueError, match=r"strength must be one of .* expert 1"):
        generate(img2img, PROMPT, picture, 0.1, **own_steps)


STRENGTHS = "strength must be a number above 0 (nothing changes) up to 1 (all steps)"
BAD_CALLS = [
    *(
        ({"strength": strength}, f"{STRENGTHS}, got {strength!r}.")
        for strength in (0, -0.1, 1.0001, "0.5", True, math.nan, math.inf, [0.5], 1j)
    ),
    ({"image": None}, "image must be given: an image, a list of them, or a batch; got None."),
    ({"image": []}, "image must be given"),
    ({"image": "no/such/file.png"}, "image: image 'no/such/file.png' cannot be read"),
    ({"image": np.full((64, 64, 3), math.nan)}, "float values must be from 0 to 1, got nan"),
    ({"image": np.full((64, 64, 3), -1.0)}, "float values must be from 0 to 1, got -1"),
    ({"prompt": PROMPTS, "image": "two"}, "image and mask_image must be one, or one for each of 3 prompts, got 2."),
    ({"prompt": None}, "give either `prompt` or `messages`"),
    ({"prompt": None, "messages": [{"role": "user", "content": "x"}], "context_image": "one"}, "`context_image` goes"),
    ({"prompt": PROMPTS, "context_image": ["one"]}, "context_image must be one, or one for each of 3 prompts, got 1."),
    ({"image": "two", "generator": [seeded()]}, "generator must be one, or one for each of 2 images, got 1."),
    ({"mask_image": "one"}, "mask_image is not supported; use LatteFlowInpaintPipeline.from_pipe(pipe)"),
    ({"height": 60}, "height must be a positive multiple of 8, got 60."),
    ({"latents": torch.zeros(1, 4, 8, 9)}, "latents must be of shape (1, 4, 8, 8), got (1, 4, 8, 9)."),
    ({"prompt_embeds": torch.zeros(1, 4, 8)}, "prompt_embeds is not supported; use context, from `encode_prompt`"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_named_before_any_heavy_work(img2img, pictures, arguments, message, count_layers):
    named = {"one": pictures[0], "two": pictures[:2]}
    arguments = {"prompt": PROMPT, "image": "one", **arguments}
    for name in ("image", "context_image"):
        if isinstance(arguments.get(name), str):
            arguments[name] = named.get(arguments[name], arguments[name])
        elif isinstance(arguments.get(name), list):
            arguments[name] = [named[item] for item in arguments[name]]
    prefills = []
    hook = img2img.model.get_decoder().register_forward_hook(lambda *_: prefills.append(1))
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            img2img(**arguments)
    finally:
        hook.remove()
    assert prefills == []


def test_without_an_autoencoder_there_is_no_source(model, processor, picture):
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    with pytest.raises(ValueError, match="vae is None"):
        LatteFlowImg2ImgPipeline(model, processor, None, scheduler)(PROMPT, picture, output_type="latent")
