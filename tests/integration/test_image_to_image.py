# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image-to-image and inpainting on the embedded checkpoint: right images, by the oracle of the tiny world."""

import numpy as np
import pytest
import torch
from PIL import Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, tiny_checkpoint
from latte_flow_hf.checkpoints import few_step_checkpoint
from latte_flow_hf.tinyworld.oracle import shows
from latte_flow_hf.tinyworld.shapes import Scene, SceneObject, draw_scene


ONE = draw_scene(Scene((SceneObject("red", "circle"),)), [(32, 32, 14)])
PAIR = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), "left of")
TWO = draw_scene(PAIR, [(17, 32, 10), (47, 32, 10)])


@pytest.fixture(scope="module")
def img2img() -> LatteFlowImg2ImgPipeline:
    pipe = LatteFlowImg2ImgPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inpaint(img2img) -> LatteFlowInpaintPipeline:
    pipe = LatteFlowInpaintPipeline.from_pipe(img2img)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def box_mask(*box: int) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, box)
    return mask


def images_of(pipe, prompt: str, source: Image.Image, **arguments) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    return pipe([prompt] * 8, source, generator=generators, **arguments).images


def count_right(pipe, **arguments) -> int:
    """Of 32 images: the four prompts and eight seeds of the guide's table."""
    prompts = [f"a {name}" for name in ("blue square", "green cross", "yellow triangle", "white circle")]
    return sum(shows(image, prompt) for prompt in prompts for image in images_of(pipe, prompt, ONE, **arguments))


missed = pytest.mark.xfail(strict=True, reason="missed: squares are what the embedded checkpoint draws worst")


@pytest.mark.parametrize(("strength", "least"), [(0.6, 6), pytest.param(0.95, 7, marks=missed)])
def test_a_circle_is_painted_over(img2img, inpaint, strength, least):
    """6 or 7 of 8 seeds are right, others mostly rectangles; the guide has a table with more prompts."""
    found = images_of(inpaint, "a blue square", ONE, mask_image=box_mask(8, 8, 56, 56), strength=strength)
    assert sum(shows(image, "a blue square") for image in found) >= least
    found = images_of(img2img, "a blue square", ONE, strength=strength)
    assert sum(shows(image, "a blue square") for image in found) >= least


@pytest.mark.parametrize(("strength", "least"), [(0.6, 24), (0.95, 28)])
def test_the_prompts_of_the_guide(img2img, inpaint, strength, least):
    """The same shares of the guide's four prompts; the others have wrong outlines."""
    assert count_right(inpaint, mask_image=box_mask(8, 8, 56, 56), strength=strength) >= least
    assert count_right(img2img, strength=strength) >= least


def test_the_source_stays_at_a_small_strength(img2img):
    assert all(shows(image, "a red circle") for image in images_of(img2img, "a red circle", ONE, strength=0.3))
    assert not any(shows(image, "a green cross") for image in images_of(img2img, "a green cross", ONE, strength=0.3))


def test_one_of_two_objects_is_exchanged(inpaint):
    prompt, mask = "a red circle left of a green cross", box_mask(32, 0, 64, 64)
    found = images_of(inpaint, prompt, TWO, mask_image=mask)
    assert sum(shows(image, prompt) for image in found) >= 7
    # The circle stays in its place.
    with torch.no_grad():
        reconstruction = inpaint.decode_latents(inpaint.encode_images(TWO), "np")[0]
    for image in found:
        difference = np.abs(np.asarray(image) / 255 - reconstruction)[:, :24]
        assert difference.mean() < 0.01


def test_a_part_of_a_large_image(inpaint):
    photo, mask = Image.new("RGB", (256, 160), (20, 20, 24)), Image.new("L", (256, 160))
    photo.paste(ONE, (120, 60))
    mask.paste(255, (124, 64, 180, 120))
    prompt = "a blue square"
    found = images_of(inpaint, prompt, photo, mask_image=mask, strength=0.9, padding_mask_crop=4)
    assert all(image.size == photo.size for image in found)
    assert sum(shows(image.crop((120, 60, 184, 124)), prompt) for image in found) >= 7


def test_a_distilled_model_starts_at_its_steps():
    pipe = LatteFlowInpaintPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(few_step_checkpoint())
    mask = box_mask(8, 8, 56, 56)
    assert count_right(pipe, mask_image=mask, strength=1.0) >= 24 and pipe.num_timesteps == 4
    found = images_of(pipe, "a yellow triangle", ONE, mask_image=mask)
    assert pipe.num_timesteps == 3 and sum(shows(image, "a yellow triangle") for image in found) >= 6
    with pytest.raises(ValueError, match=r"strength must be one of 0\.25, 0\.5, 0\.75, 1: expert 0 was distilled"):
        pipe("a blue square", ONE, mask, 0.8)


@missed
def test_squares_of_a_distilled_model():
    pipe = LatteFlowInpaintPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(few_step_checkpoint())
    found = images_of(pipe, "a blue square", ONE, mask_image=box_mask(8, 8, 56, 56), strength=1.0)
    assert sum(shows(image, "a blue square") for image in found) >= 6
