# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Checks of the arguments of a pipeline's call, before any heavy work. All raise a `ValueError` that names the
argument and its value."""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch

from ..modeling.context import LatteFlowContext


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_prompt_arguments(
    prompt: str | list[str] | None,
    image: Any,
    messages: list | None,
    negative_prompt: str | list[str] | None,
    context: LatteFlowContext | None,
    negative_context: LatteFlowContext | None,
    image_argument: str = "image",
) -> None:
    if sum(given is not None for given in (prompt, messages, context)) != 1:
        raise ValueError("give either `prompt` or `messages`, or `context` instead of both.")
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if texts is None or isinstance(texts, str):
            continue
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} must be a string or a non-empty list of strings, got {texts!r}.")
    if negative_prompt is not None and negative_context is not None:
        raise ValueError("give either `negative_prompt` or `negative_context`.")
    for name, encoded in (("context", context), ("negative_context", negative_context)):
        if encoded is not None and (not isinstance(encoded, LatteFlowContext) or not len(encoded)):
            raise ValueError(f"{name} must be a LatteFlowContext of one prompt or more, got {type(encoded).__name__}.")
    if context is not None and image is not None:
        raise ValueError(f"`{image_argument}` goes with `prompt`; a context already contains its images.")
    if messages is not None and image is not None:
        raise ValueError(
            f"`{image_argument}` goes with `prompt`; in a conversation, put it into the messages' content."
        )
    if messages is not None and (not isinstance(messages, (list, tuple)) or not messages):
        raise ValueError(f"messages must be a non-empty list of messages or of conversations, got {messages!r}.")


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer, of numpy too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_size(height: int, width: int, multiple: int) -> None:
    for name, size in (("height", height), ("width", width)):
        if not is_whole(size) or size < multiple or size % multiple:
            raise ValueError(f"{name} must be a positive multiple of {multiple}, got {size!r}.")


def check_guidance(
    guidance_scale: float | list[float], guidance_interval: tuple[float, float] | None, num_experts: int
) -> None:
    scales = list(guidance_scale) if isinstance(guidance_scale, (list, tuple)) else [guidance_scale] * num_experts
    are_finite = all(isinstance(scale, Real) and math.isfinite(scale) for scale in scales)
    if not are_finite or len(scales) != num_experts:
        raise ValueError(
            f"guidance_scale must be a finite number, or one for each of {num_experts} experts, got "
            f"{guidance_scale!r}."
        )
    if guidance_interval is not None and not (
        isinstance(guidance_interval, (list, tuple))
        and len(guidance_interval) == 2
        and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
    ):
        raise ValueError(
            f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {guidance_interval!r}."
        )


def check_generator(generator: torch.Generator | list[torch.Generator] | None, num_images: int) -> None:
    if generator is None or isinstance(generator, torch.Generator):
        return
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    invalid = [item for item in generators if not isinstance(item, torch.Generator)]
    if invalid or len(generators) != num_images:
        found = repr(invalid[0]) if invalid else len(generators)
        raise ValueError(f"generator must be one, or one for each of {num_images} images, got {found}.")


def check_finite(tensor: torch.Tensor, module: torch.nn.Module) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{type(module).__name__} returned values that are not finite in dtype {module.dtype}. Use "
            "dtype=torch.float32 or torch.bfloat16; if that does not help, the weights are damaged."
        )


def count_prompts(prompt: str | list[str] | None, messages: list | None, context: LatteFlowContext | None) -> int:
    if context is not None:
        return len(context)
    if messages is not None:
        return len(messages) if isinstance(messages[0], (list, tuple)) else 1
    return 1 if isinstance(prompt, str) else len(prompt or [])


def check_padding(padding_mask_crop: int, output_type: str) -> None:
    if not is_whole(padding_mask_crop) or padding_mask_crop < 0:
        raise ValueError(f"padding_mask_crop must be a whole number of pixels from 0, got {padding_mask_crop!r}.")
    if output_type != "pil":
        raise ValueError(f"output_type must be 'pil' with padding_mask_crop, got {output_type!r}.")


# Arguments of other pipelines of diffusers, and what takes their place here.
_FOREIGN_ARGUMENTS = {
    "prompt_embeds": "context, from `encode_prompt`: the tower attends to the keys and values of all layers",
    "negative_prompt_embeds": "negative_context, from `encode_prompt`",
    "prompt_embeds_mask": "context, which contains its mask",
    "pooled_prompt_embeds": "context, from `encode_prompt`",
    "negative_pooled_prompt_embeds": "negative_context, from `encode_prompt`",
    "joint_attention_kwargs": "attention_kwargs",
    "cross_attention_kwargs": "attention_kwargs",
    "true_cfg_scale": "guidance_scale",
    "guidance_rescale": "guidance_interval, or a guidance_scale for each expert",
    "ip_adapter_image": "images that the model sees: image, or context_image in image-to-image",
    "strength": "LatteFlowImg2ImgPipeline.from_pipe(pipe)",
    "mask_image": "LatteFlowInpaintPipeline.from_pipe(pipe)",
    "masked_image_latents": "image and mask_image of LatteFlowInpaintPipeline",
    "context_image": "image",
    "eta": "LatteFlowScheduler(new_noise=...)",
}


def refuses_foreign_arguments(method: Callable) -> Callable:
    """Refuse arguments of other pipelines with a `ValueError` that names what takes their place. `None` is ignored,
    for programs that give all arguments of all pipelines."""
    foreign_arguments = _FOREIGN_ARGUMENTS.keys() - inspect.signature(method).parameters.keys()

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() & foreign_arguments:
            if kwargs.pop(name) is not None:
                raise ValueError(f"{name} is not supported; use {_FOREIGN_ARGUMENTS[name]}, instead.")
        return method(self, *args, **kwargs)

    return wrapped
