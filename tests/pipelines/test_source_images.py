# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Masks in latents, and the surroundings of masks, cut out and pasted back."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from latte_flow_hf.pipelines.source_images import (
    KnownRegion,
    SourceImages,
    crop_to_masks,
    latent_mask,
    load_masked_sources,
    paste_into_sources,
)


def box_mask(size, box) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def test_a_latent_is_generated_if_any_of_its_pixels_is():
    mask = box_mask((64, 64), (7, 8, 8, 8))
    found = latent_mask([mask, Image.new("L", (64, 64), 255)], 64, 64, 8)
    assert found.shape == (2, 1, 8, 8) and found.dtype == torch.bool
    assert found[0, 0].nonzero().tolist() == [[1, 0], [1, 1]] and found[1].all()


def test_what_is_known_has_the_noise_of_sigma():
    latents, noise = torch.full((1, 2, 2, 2), 3.0), torch.full((1, 2, 2, 2), -1.0)
    known = KnownRegion(latents, noise, torch.tensor([[[[True, False], [False, False]]]]))
    found = known.restore(torch.zeros(1, 2, 2, 2), 0.25)
    assert found[0, 0].tolist() == [[0.0, 2.0], [2.0, 2.0]]
    # At 0 the source counts alone, whatever the noise is.
    broken = KnownRegion(latents, noise * float("inf"), known.mask)
    assert broken.restore(torch.zeros(1, 2, 2, 2), 0.0)[0, 1].tolist() == [[0.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((320, 200), (100, 60, 149, 99)),
        ((320, 200), (0, 0, 39, 19)),
        ((320, 200), (290, 190, 319, 199)),
        # A region as wide as the image is not as high: it is filled.
        ((320, 100), (5, 0, 300, 99)),
        ((60, 200), (0, 5, 59, 195)),
    ],
)
def test_what_is_cut_out_is_pasted_where_it_was(size, box):
    """The oracle: cut-outs that are not changed give the source again, up to resizing."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([x % 256, y, (x + y) % 200], -1).astype(np.uint8))
    mask, processor = box_mask(size, box), VaeImageProcessor(vae_scale_factor=8)
    source = SourceImages([image], [mask], 1.0)
    cut, regions = crop_to_masks(source, 6, 128, 128, processor)
    assert [part.size for part in (*cut.images, *cut.masks)] == [(128, 128)] * 2
    left, top, right, bottom = regions[0]
    assert left <= box[0] and top <= box[1] and right > box[2] and bottom > box[3]
    (found,) = paste_into_sources(cut.images, source, regions, processor)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(image))
    outside = np.asarray(mask) == 0
    assert not difference[outside].any() and np.median(difference[~outside]) <= 3


def test_several_images_of_several_sources():
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    source = load_masked_sources(images, box_mask((64, 64), (16, 16, 31, 31)), 0.5, "white")
    processor = VaeImageProcessor(vae_scale_factor=8)
    _, regions = crop_to_masks(source, 0, 64, 64, processor)
    generated = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "lime", "yellow")]
    found = paste_into_sources(generated, source, regions, processor)
    assert [image.getpixel((20, 20)) for image in found] == [image.getpixel((0, 0)) for image in generated]
    assert [image.getpixel((2, 2)) for image in found] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
