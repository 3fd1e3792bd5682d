# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Inpainting with random weights. The oracles: diffusers' loop written out, image-to-image, and the source itself."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, LatteFlowScheduler


PROMPT = "a red circle"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# Latents of 8 x 8 pixels: the mask covers rows 2 to 4 and columns 1 to 5.
BOX, ROWS, COLUMNS = (8, 17, 47, 39), slice(2, 5), slice(1, 6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe, *arguments, **keywords) -> torch.Tensor:
    keywords = {"num_inference_steps": 8, "generator": seeded(), "output_type": "latent", **keywords}
    return pipe(*arguments, **keywords).images


def box_mask(size: tuple[int, int] = (64, 64), box=BOX) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


@pytest.fixture
def inpaint(pipe) -> LatteFlowInpaintPipeline:
    inpaint = LatteFlowInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    return inpaint


@pytest.fixture
def img2img(pipe) -> LatteFlowImg2ImgPipeline:
    img2img = LatteFlowImg2ImgPipeline.from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)
    return img2img


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    return box_mask()


def test_the_call_takes_the_arguments_of_image_to_image():
    own = inspect.signature(LatteFlowInpaintPipeline.__call__).parameters
    other = inspect.signature(LatteFlowImg2ImgPipeline.__call__).parameters
    assert own.keys() - other.keys() == {"mask_image", "padding_mask_crop"} and other.keys() <= own.keys()
    assert all(own[name].default == other[name].default for name in other)
    assert list(own)[:5] == ["self", "prompt", "image", "mask_image", "strength"]
    assert LatteFlowInpaintPipeline.generate is LatteFlowInpaintPipeline.__call__


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_run_equals_the_loop_written_out(inpaint, model, encode, picture, mask, strength):
    """The loop of diffusers' flow-matching inpainting (of models without mask channels), with diffusers' scheduler."""
    steps = 8
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    first = int(max(steps - steps * strength, 0))
    stock.set_begin_index(first)
    timesteps = stock.timesteps[first:]
    clean, noise = inpaint.encode_images(picture), torch.randn(1, 4, 8, 8, generator=seeded())
    inside = torch.zeros(1, 1, 8, 8)
    inside[..., ROWS, COLUMNS] = 1
    context = model.encode_context(**encode(PROMPT))
    sample = stock.scale_noise(clean, timesteps[:1], noise)
    for i, timestep in enumerate(timesteps):
        sample = stock.step(model.predict_velocity(sample, timestep, context), timestep, sample).prev_sample
        known = clean
        if i + 1 < len(timesteps):
            known = stock.scale_noise(clean, timesteps[i + 1 : i + 2], noise)
        sample = (1 - inside) * known + inside * sample
    found = generate(inpaint, PROMPT, picture, mask, strength, guidance_scale=1.0)
    torch.testing.assert_close(found, sample, rtol=1e-3, atol=1e-4)


SCHEDULERS = [
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0]),
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], new_noise=1.0),
    LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], solver="heun"),
    FlowMatchHeunDiscreteScheduler(),
    UniPCMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_what_is_outside_of_the_mask_is_the_source(inpaint, img2img, picture, mask, scheduler):
    inpaint.scheduler = img2img.scheduler = scheduler
    found, clean = generate(inpaint, PROMPT, picture, mask), inpaint.encode_images(picture)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[ROWS, COLUMNS] = False
    assert torch.equal(found[..., outside], clean[..., outside])
    assert (found != clean)[..., ~outside].all()
    # All white is image-to-image, bit for bit.
    white = Image.new("L", (64, 64), 255)
    assert torch.equal(generate(inpaint, PROMPT, picture, white, 0.6), generate(img2img, PROMPT, picture, 0.6))


def test_at_each_step_the_known_part_has_the_noise_of_the_next_sigma(inpaint, picture, mask):
    clean, noise = inpaint.encode_images(picture), torch.randn(1, 4, 8, 8, generator=seeded())
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"][..., 0, 0])

    generate(inpaint, PROMPT, picture, mask, 0.5, callback_on_step_end=look)
    expected = [((1 - sigma) * clean + sigma * noise)[..., 0, 0] for sigma in (0.375, 0.25, 0.125, 0)]
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected))


def test_experts_above_the_start_never_run(inpaint, model, picture, mask, count_layers):
    with count_layers(model) as calls:
        generate(inpaint, PROMPT, picture, mask, 0.5)
    assert calls == {2: 4, 3: 4}


def test_masks_of_all_kinds_are_equal(inpaint, picture, mask):
    expected = generate(inpaint, PROMPT, picture, mask)
    array = np.asarray(mask)
    transparent = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    transparent.paste((255, 255, 255, 255), (8, 17, 48, 40))
    kinds = [
        mask.convert("1"),
        mask.convert("RGB"),
        [mask],
        array,
        array[..., None],
        array > 0,
        (array > 0).astype(np.float32)[None, ..., None],
        torch.from_numpy(array > 0)[None],
        torch.from_numpy(array / 255)[None, None],
        transparent,
        # From half on it is white.
        mask.point(lambda value: 200 if value else 100),
    ]
    for kind in kinds:
        assert torch.equal(generate(inpaint, PROMPT, picture, kind), expected)


def test_masks_sources_and_prompts_are_broadcast(inpaint, picture, mask):
    other = box_mask(box=(0, 0, 15, 15))
    pictures = [picture, picture.rotate(90)]
    alone = [
        generate(inpaint, PROMPT, source, shape, generator=[seeded(5)])
        for source, shape in ((pictures[0], mask), (pictures[0], other), (pictures[1], mask), (pictures[1], other))
    ]
    close = {"rtol": 1e-3, "atol": 1e-4}
    for sources, masks, expected in (
        (picture, [mask, other], alone[:2]),
        (pictures, mask, alone[::2]),
        (pictures, [mask, other], alone[::3]),
        (pictures, np.stack([mask, other])[..., None], alone[::3]),
    ):
        found = generate(inpaint, PROMPT, sources, masks, generator=[seeded(5), seeded(5)])
        torch.testing.assert_close(found, torch.cat(expected), **close)
    generators = [seeded(seed) for seed in (1, 2, 3, 5)]
    found = generate(inpaint, ["x", PROMPT], pictures, [mask, other], num_images_per_prompt=2, generator=generators)
    torch.testing.assert_close(found[3:], alone[3], **close)


def test_a_mask_is_resized_with_its_image(inpaint, picture):
    """A wide image loses its sides; the mask must lose the same."""
    wide, mask = Image.new("RGB", (256, 128)), box_mask((256, 128), (64, 0, 79, 127))
    wide.paste(picture.resize((128, 128)), (64, 0))
    found, clean = generate(inpaint, PROMPT, wide, mask), inpaint.encode_images(wide, 64, 64)
    assert ((found != clean).any(1)[0]).nonzero()[:, 1].unique().tolist() == [0]


def test_thin_masks_are_not_lost(inpaint, picture):
    mask = box_mask(box=(12, 12, 12, 50))
    found, clean = generate(inpaint, PROMPT, picture, mask), inpaint.encode_images(picture)
    changed = (found != clean).any(1)[0]
    assert changed.nonzero().tolist() == [[row, 1] for row in range(1, 7)]


# The surroundings of the mask alone.


def test_padding_mask_crop_keeps_pixels_and_size(inpaint, picture):
    large, mask = picture.resize((320, 200), Image.Resampling.NEAREST), box_mask((320, 200), (100, 60, 149, 99))
    pictures = inpaint(
        [PROMPT, "x"],
        large,
        mask,
        padding_mask_crop=10,
        num_images_per_prompt=2,
        num_inference_steps=4,
        generator=seeded(),
    ).images
    assert len(pictures) == 4
    outside = np.asarray(mask) == 0
    for image in pictures:
        assert image.size == (320, 200)
        before, after = np.asarray(large), np.asarray(image)
        assert np.array_equal(before[outside], after[outside])
        assert (before[~outside] != after[~outside]).any(axis=-1).mean() > 0.9
    # The model saw the surroundings: 70 x 70 pixels around the mask, at its own size.
    cut = large.crop((90, 45, 160, 115)).resize((64, 64), Image.Resampling.LANCZOS)
    cut_mask = mask.crop((90, 45, 160, 115)).resize((64, 64), Image.Resampling.LANCZOS)
    call = {"num_inference_steps": 4, "generator": seeded()}
    expected = inpaint(PROMPT, cut, cut_mask, **call).images[0].resize((70, 70), Image.Resampling.LANCZOS)
    found = inpaint(PROMPT, large, mask, padding_mask_crop=10, **{**call, "generator": seeded()}).images[0]
    inner = (slice(60, 100), slice(100, 150))
    assert np.array_equal(np.asarray(found)[inner], np.asarray(expected)[15:55, 10:60])


def test_the_overlay_of_diffusers_restores_pixels(inpaint, picture, mask):
    image = inpaint(PROMPT, picture, mask, num_inference_steps=4, generator=seeded()).images[0]
    restored = np.asarray(inpaint.image_processor.apply_overlay(mask, picture, image))
    outside = np.asarray(mask) == 0
    assert np.array_equal(restored[outside], np.asarray(picture)[outside])
    assert np.array_equal(restored[~outside], np.asarray(image)[~outside])


def test_saved_pipelines_load(inpaint, picture, mask, tmp_path):
    expected = generate(inpaint, PROMPT, picture, mask)
    inpaint.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LatteFlowInpaintPipeline
    assert torch.equal(generate(loaded, PROMPT, picture, mask), expected)
    assert inpaint(PROMPT, picture, mask, num_inference_steps=2, return_dict=False)[0][0].size == (64, 64)


BAD_CALLS = [
    ({"mask_image": None}, "mask_image must be given: an image, a list of them, or a batch; got None."),
    ({"mask_image": Image.new("L", (64, 64))}, "mask_image marks nothing: white (255, 1.0 or True) is generated"),
    ({"mask_image": Image.new("L", (64, 64), 127)}, "mask_image marks nothing"),
    ({"mask_image": np.ones((64, 64), np.uint8)}, "mask_image marks nothing: white (255, 1.0 or True)"),
    ({"mask_image": [box_mask(), Image.new("L", (64, 64))]}, "mask_image 1 marks nothing"),
    ({"mask_image": box_mask((64, 32))}, "mask_image must be as large as its image, (64, 64), got (64, 32)."),
    ({"mask_image": np.full((64, 64), math.nan)}, "mask_image: image of float64, (64, 64), cannot be used: float"),
    (
        {"mask_image": torch.ones(2, 64, 64)},
        "mask_image of shape (2, 64, 64) may be several masks or several channels",
    ),
    ({"mask_image": [np.ones((3, 64, 64))]}, "mask_image of shape (3, 64, 64) may be several masks"),
    ({"mask_image": np.full((64, 64), 255.0)}, "float values must be from 0 to 1, got 255 to 255"),
    ({"mask_image": np.ones((64, 64), np.int64)}, "mask_image: an image must be a PIL image"),
    ({"mask_image": "no/mask.png"}, "mask_image: image 'no/mask.png' cannot be read"),
    ({"strength": 0}, "strength must be a number above 0 (nothing changes) up to 1 (all steps), got 0."),
    ({"strength": 1.0001}, "up to 1 (all steps), got 1.0001."),
    ({"strength": "0.5"}, "up to 1 (all steps), got '0.5'."),
    ({"strength": True}, "up to 1 (all steps), got True."),
    ({"image": None}, "image must be given"),
    ({"prompt": ["a", "b", "c"], "mask_image": [box_mask()] * 2}, "must be one, or one for each of 3 prompts, got 2."),
    ({"padding_mask_crop": -1}, "padding_mask_crop must be a whole number of pixels from 0, got -1."),
    ({"padding_mask_crop": 1.5}, "padding_mask_crop must be a whole number of pixels from 0, got 1.5."),
    ({"padding_mask_crop": 4, "output_type": "np"}, "output_type must be 'pil' with padding_mask_crop, got 'np'."),
    ({"padding_mask_crop": 4, "height": 60}, "height must be a positive multiple of 8, got 60."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_named_before_any_heavy_work(inpaint, picture, arguments, message):
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_: ran.append(1))
        for module in (inpaint.model.get_decoder(), inpaint.vae.encoder)
    ]
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            inpaint(**{"prompt": PROMPT, "image": picture, "mask_image": box_mask(), **arguments})
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == []


def test_masks_and_images_must_be_as_many(inpaint, picture):
    with pytest.raises(ValueError, match=re.escape("mask_image must be one, or one for each of 2 images, got 3.")):
        inpaint(PROMPT, [picture] * 2, [box_mask()] * 3)


def test_a_mask_outside_of_what_is_left_of_the_image_is_named(inpaint):
    with pytest.raises(ValueError, match="mask_image marks nothing"):
        inpaint(PROMPT, Image.new("RGB", (256, 128)), box_mask((256, 128), (0, 0, 20, 127)))
