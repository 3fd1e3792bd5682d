# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images from an image and a prompt: the source with noise takes the place of pure noise, and only the experts below
its sigma run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from .calls import own_call
from .check_inputs import refuses_foreign_arguments
from .pipeline_latte_flow import LatteFlowPipeline
from .pipeline_output import LatteFlowPipelineOutput
from .source_images import load_sources


class LatteFlowImg2ImgPipeline(LatteFlowPipeline):
    """Changes images by a prompt. Same components and methods as [`LatteFlowPipeline`]; pipelines can share them:
    `LatteFlowImg2ImgPipeline.from_pipe(pipe)`."""

    _context_image_argument = "context_image"

    @own_call
    @refuses_foreign_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float | None = None,
        context_image: Any = None,
        messages: list | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        steps_per_expert: list[int] | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        guidance_scale: float | list[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        context: LatteFlowContext | None = None,
        negative_context: LatteFlowContext | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> LatteFlowPipelineOutput | tuple:
        """Generate images from images. Arguments that are not listed are those of [`LatteFlowPipeline`].

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts.
            image:
                The source image, a list of them, or a batch, from any source that [`load_rgb_image`] reads: one for
                all prompts, or one for each prompt; several also with one prompt. Transparent pixels are composited
                on the background of the processor. Images of another size than `height` and `width` are resized and
                cropped at the centre.
            strength (`float`, *optional*):
                The share of the steps to take, in (0, 1], rounded up to whole steps (same as in diffusers). With
                evenly spaced steps it is also the sigma of the noise that the source gets. 1 starts from pure noise:
                same image as without a source. A distilled model starts where one of its steps does: with four steps,
                0.25, 0.5, 0.75 or 1. Defaults to 0.8, or the step of a distilled model below it, 0.75 with four.
                (Chosen: at 0.8 most prompts win over the source, see the guide.)
            context_image (*optional*):
                Images shown to the model before the prompt, which are `image` in [`LatteFlowPipeline`].
            sigmas, timesteps (`list[float]`, *optional*): all steps, of which `strength` takes the last ones.
            latents (`torch.Tensor`, *optional*):
                The noise that the source gets, (batch, channels, height / f, width / f). It is drawn first, so that a
                generator gives the noise of [`LatteFlowPipeline`].

        Returns:
            [`LatteFlowPipelineOutput`], or a tuple of the images.

        Raises:
            `ValueError`: if an argument is invalid, before any heavy work.
        """
        self._require("vae")
        source = load_sources(image, strength, getattr(self.processor, "background", "white"))
        with self._scaled_adapters(attention_kwargs):
            return self._generate(
                prompt=prompt,
                context_image=context_image,
                messages=messages,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                steps_per_expert=steps_per_expert,
                sigmas=sigmas,
                timesteps=timesteps,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                output_type=output_type,
                return_dict=return_dict,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                context=context,
                negative_context=negative_context,
                source=source,
            )

    generate = __call__  # type: ignore[assignment]
