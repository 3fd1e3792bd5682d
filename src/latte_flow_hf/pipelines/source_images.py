# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The images that image-to-image and inpainting start from, and the masks of what is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import nn

from ..modeling.flow_matching import interpolate
from ..modeling.images import Background, load_rgb_images


@dataclass(frozen=True)
class SourceImages:
    """The start of image-to-image and inpainting.

    Args:
        images (`list[PIL.Image.Image]`): RGB, one for all prompts, or one for each.
        masks (`list[PIL.Image.Image]`, *optional*):
            Mode `L`, black and white, one for all images, or one for each, as large as its image; white is generated.
        strength (`float`, *optional*): the share of the steps to take, in (0, 1]; by default that of the model.
    """

    images: list[Image.Image]
    masks: list[Image.Image] | None
    strength: float | None

    def __len__(self) -> int:
        return max(len(self.images), len(self.masks or ()))


@dataclass(frozen=True)
class KnownRegion:
    """The part of the latents that is not generated.

    Args:
        latents (`torch.Tensor`): (batch, channels, height / f, width / f), of the source images.
        noise (`torch.Tensor`): of the same shape, the noise that the call starts with.
        mask (`torch.Tensor`): (batch, 1, height / f, width / f), bool, true where latents are generated.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor

    def restore(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Put the source, with the noise of `sigma`, in place of what is known; at sigma 0, the source itself."""
        known = self.latents if sigma == 0 else interpolate(self.latents, self.noise, sigma)
        return torch.where(self.mask, latents, known)


def load_sources(images: Any, strength: float | None, background: Background) -> SourceImages:
    """Read the images of image-to-image.

    Args:
        images: an image, a list of them, or a batch; see [`load_rgb_image`].
        strength (`float`, *optional*): the share of the steps to take.
        background (`str` or `tuple[int, int, int]`): the colour behind transparent images.

    Raises:
        `ValueError`: if `strength` is not in (0, 1], or an image is missing or cannot be read.
    """
    if strength is not None:
        check_strength(strength)
        strength = float(strength)
    return SourceImages(_load("image", images, background), None, strength)


def load_masked_sources(images: Any, masks: Any, strength: float | None, background: Background) -> SourceImages:
    """Read the images and the masks of inpainting.

    Args:
        images, strength, background: see `load_sources`.
        masks: a mask, a list of them, or a batch. Only lightness counts, transparent parts are black.

    Raises:
        `ValueError`: same as `load_sources`; if a mask has another size than its image or marks nothing; or if there
            are neither one mask nor as many as images.
    """
    source = load_sources(images, strength, background)
    loaded = source.images
    for mask in masks if isinstance(masks, (list, tuple)) else [masks]:
        _check_mask_axes(mask)
    loaded_masks = [_black_or_white(mask) for mask in _load("mask_image", masks, "black")]
    if 1 not in (len(loaded), len(loaded_masks)) and len(loaded) != len(loaded_masks):
        raise ValueError(f"mask_image must be one, or one for each of {len(loaded)} images, got {len(loaded_masks)}.")
    source = SourceImages(loaded, loaded_masks, source.strength)
    for image, mask in _pairs(source):
        if image.size != mask.size:
            raise ValueError(f"mask_image must be as large as its image, {image.size}, got {mask.size}.")
    for index, mask in enumerate(loaded_masks):
        _check_mask(mask.getbbox() is not None, index, len(loaded_masks))
    return source


def check_strength(strength: Any) -> None:
    """
    Raises:
        `ValueError`: if it is no number in (0, 1].
    """
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < float(strength) <= 1:
        raise ValueError(f"strength must be a number above 0 (nothing changes) up to 1 (all steps), got {strength!r}.")


def latent_mask(masks: Sequence[Image.Image], height: int, width: int, scale: int) -> torch.Tensor:
    """Masks in pixels -> masks of latents, (n, 1, height / f, width / f), bool.

    They are resized and cropped at the centre, same as their images, and then black or white, same as in diffusers. A
    latent is generated if any of its pixels is white. (Chosen: diffusers takes the pixel at its corner, with which a
    thin mask is lost.)

    Raises:
        `ValueError`: if a mask marks nothing in what is left of its image.
    """
    processor = VaeImageProcessor(
        vae_scale_factor=scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    fitted = [ImageOps.fit(mask, (width, height), Image.Resampling.LANCZOS) for mask in masks]
    latents = nn.functional.max_pool2d(processor.preprocess(fitted), scale) > 0
    for index, mask in enumerate(latents):
        _check_mask(bool(mask.any()), index, len(masks))
    return latents


def repeat_for_batch(tensor: torch.Tensor, num_items: int, num_images_per_prompt: int) -> torch.Tensor:
    """One row, or one for each of `num_items` prompts -> one for each image; those of a prompt stand together."""
    if len(tensor) == 1:
        return tensor.expand(num_items * num_images_per_prompt, *tensor.shape[1:])
    return tensor.repeat_interleave(num_images_per_prompt, dim=0)


Region = tuple[int, int, int, int]


def crop_to_masks(
    source: SourceImages, padding: int, height: int, width: int, processor: VaeImageProcessor
) -> tuple[SourceImages, list[Region]]:
    """Cut out the surroundings of each mask and resize them to `height` x `width`.

    Same as diffusers: each region is widened to the aspect ratio of `height` and `width`, and what is outside of the
    image is filled.

    Args:
        source ([`SourceImages`]): images and masks.
        padding (`int`): pixels around the mask.
        height, width (`int`): in pixels.
        processor (`VaeImageProcessor`): resizes images.

    Returns:
        The cut-out images and masks, as many of both as of the larger number, and the region of each,
        (left, top, right, bottom).
    """
    pairs = _pairs(source)
    regions = [VaeImageProcessor.get_crop_region(mask, width, height, pad=padding) for _, mask in pairs]

    def cut(image: Image.Image, region: Region) -> Image.Image:
        return processor.resize(image.crop(region), height, width, resize_mode="fill")

    images = [cut(image, region) for (image, _), region in zip(pairs, regions)]
    masks = [_black_or_white(cut(mask.convert("RGB"), region)) for (_, mask), region in zip(pairs, regions)]
    return SourceImages(images, masks, source.strength), regions


def paste_into_sources(
    generated: Sequence[Image.Image], source: SourceImages, regions: Sequence[Region], processor: VaeImageProcessor
) -> list[Image.Image]:
    """Paste the masked parts of generated images into their sources. Several images may belong to a source, and those
    stand together. `regions` are those of `crop_to_masks`, `source` is what was given to it."""
    pairs = _pairs(source)
    num_images = len(generated) // len(pairs)
    return [
        processor.apply_overlay(pairs[i // num_images][1], pairs[i // num_images][0], image, regions[i // num_images])
        for i, image in enumerate(generated)
    ]


def _pairs(source: SourceImages) -> list[tuple[Image.Image, Image.Image]]:
    """Each image with its mask."""
    assert source.masks is not None
    return [(source.images[i % len(source.images)], source.masks[i % len(source.masks)]) for i in range(len(source))]


def _black_or_white(mask: Image.Image) -> Image.Image:
    return mask.convert("L").point(lambda lightness: 255 if lightness >= 128 else 0)


def _load(name: str, sources: Any, background: Background) -> list[Image.Image]:
    try:
        loaded = load_rgb_images(sources, background)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not loaded:
        raise ValueError(f"{name} must be given: an image, a list of them, or a batch; got {sources!r}.")
    return loaded


def _check_mask_axes(mask: Any) -> None:
    """Three axes are several masks in diffusers, but channels and one image for `load_rgb_image`."""
    is_array = isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 3
    if is_array and mask.shape[0] != 1 and mask.shape[-1] not in range(1, 5):
        raise ValueError(
            f"mask_image of shape {tuple(mask.shape)} may be several masks or several channels; give (n, 1, height, "
            "width) for masks, or one channel."
        )


def _check_mask(marks_something: bool, index: int, num_masks: int) -> None:
    if not marks_something:
        which = "mask_image" if num_masks == 1 else f"mask_image {index}"
        raise ValueError(
            f"{which} marks nothing: white (255, 1.0 or True) is generated, black is kept, and none of it is white."
        )
