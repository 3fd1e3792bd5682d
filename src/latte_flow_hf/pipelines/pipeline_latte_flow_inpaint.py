# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Inpainting: a masked part of an image is generated anew.

The model knows nothing of masks. After each step, the latents outside of the mask are replaced by those of the source
with the noise of the next sigma, and after the last step by those of the source. (Same as diffusers' inpainting with
models that have no mask channels.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from .calls import own_call
from .check_inputs import check_padding, check_size, refuses_foreign_arguments
from .pipeline_latte_flow import LatteFlowPipeline
from .pipeline_output import LatteFlowPipelineOutput
from .source_images import crop_to_masks, load_masked_sources, paste_into_sources


class LatteFlowInpaintPipeline(LatteFlowPipeline):
    """Generates a part of an image anew. Same components and methods as [`LatteFlowPipeline`]; pipelines can share
    them: `LatteFlowInpaintPipeline.from_pipe(pipe)`."""

    _context_image_argument = "context_image"

    @own_call
    @refuses_foreign_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
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
        padding_mask_crop: int | None = None,
    ) -> LatteFlowPipelineOutput | tuple:
        """Generate the masked parts of images. Arguments that are not listed are those of
        [`LatteFlowImg2ImgPipeline`].

        Args:
            prompt (`str` or `list[str]`, *optional*): what the whole image shows, not only its masked part.
            image: the source image, a list of them, or a batch; see [`LatteFlowImg2ImgPipeline`].
            mask_image:
                A mask as large as its image, a list of them, or a batch: one for all images, or one for each; several
                also with one image. White (255, 1.0 or `True`; from half on) is generated, black and transparent parts
                are kept. Colours count by their lightness. A latent (f x f pixels) is generated if any of its pixels
                is white. All other latents are those of the source at the end, bit for bit; as the autoencoder is not
                exact, pixels are restored by `padding_mask_crop`, or by `pipe.image_processor.apply_overlay`.
            strength (`float`, *optional*):
                The share of the steps to take, in (0, 1]; defaults to 0.8, see [`LatteFlowImg2ImgPipeline`].
            padding_mask_crop (`int`, *optional*):
                Generate only the surroundings of the mask, with this many pixels around it, at `height` x `width`,
                and paste them into the source, whose size the result has. For masks that are small in a large image.
                The prompt then describes these surroundings. With `output_type="pil"` only.

        Returns:
            [`LatteFlowPipelineOutput`], or a tuple of the images.

        Raises:
            `ValueError`: if an argument is invalid, before any heavy work.
        """
        self._require("vae")
        source = load_masked_sources(image, mask_image, strength, getattr(self.processor, "background", "white"))
        regions, whole_source = None, source
        if padding_mask_crop is not None:
            check_padding(padding_mask_crop, output_type)
            height = self.default_size if height is None else height
            width = self.default_size if width is None else width
            check_size(height, width, multiple=self._size_multiple)
            source, regions = crop_to_masks(source, int(padding_mask_crop), height, width, self.image_processor)
        with self._scaled_adapters(attention_kwargs):
            (images,) = self._generate(
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
                return_dict=False,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                context=context,
                negative_context=negative_context,
                source=source,
            )
        if regions is not None:
            images = paste_into_sources(images, whole_source, regions, self.image_processor)
        return LatteFlowPipelineOutput(images=images) if return_dict else (images,)

    generate = __call__  # type: ignore[assignment]
