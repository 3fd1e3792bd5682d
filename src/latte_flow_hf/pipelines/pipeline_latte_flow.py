# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Prompts to images: encode the prompts once, denoise with one expert at each step, decode.

Unlike other diffusers pipelines there is no text encoder beside the model. The model's frozen backbone encodes the
prompts, their encoding is the backbone's key-value cache, and the same backbone answers in `chat`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..modeling.context import LatteFlowContext, warn_of_unknown_words
from ..modeling.flow_matching import interpolate
from ..modeling.images import load_rgb_images
from ..modeling.processing_latte_flow import adapt, check_processor
from ..modeling.sampling import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_STEPS, experts_with_guidance, guides_any
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler, check_num_inference_steps
from ..schedulers.steps import MIN_FIRST_SIGMA
from .calls import LatteFlowCallsMixin, one_thread_at_a_time, own_call
from .check_inputs import (
    OUTPUT_TYPES,
    check_finite,
    check_generator,
    check_guidance,
    check_prompt_arguments,
    check_size,
    count_prompts,
    is_whole,
    refuses_foreign_arguments,
)
from .denoising import DenoisingSteps, LatteFlowDenoisingMixin
from .loading import LatteFlowLoadingMixin, check_autoencoder_of
from .lora import LatteFlowLoraMixin
from .offloading import LatteFlowOffloadingMixin, check_hooks
from .pipeline_output import LatteFlowPipelineOutput
from .source_images import KnownRegion, SourceImages, latent_mask, repeat_for_batch


logger = logging.get_logger(__name__)


class LatteFlowPipeline(
    LatteFlowCallsMixin,
    LatteFlowLoadingMixin,
    LatteFlowOffloadingMixin,
    LatteFlowLoraMixin,
    LatteFlowDenoisingMixin,
    DiffusionPipeline,
):
    """Generates images from prompts or conversations, and chats, with one LaTtE-Flow model.

    Several threads may use one pipeline at the same time: a call has its own state, and its own copy of the scheduler.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the frozen backbone and the generation tower.
        processor ([`LatteFlowProcessor`] or the backbone's own `ProcessorMixin`, *optional*):
            The backbone's tokenizer, image processor and chat template. Without it, the pipeline takes encoded prompts
            only (`context`).
        vae (`AutoencoderDC`, *optional*):
            The autoencoder, or another one with the same methods. Without it, the pipeline returns latents only.
        scheduler ([`LatteFlowScheduler`]):
            The sigmas, and one solver step; or a flow-matching scheduler of diffusers. A call uses a copy of it.

    Raises:
        `ValueError`: if the latent channels of the autoencoder or the boundaries of the scheduler are not the model's,
            or the processor is that of another backbone.
        `OSError`: if the autoencoder was loaded from a folder that lacks some of its tensors.
    """

    model_cpu_offload_seq = "model->vae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["processor", "vae"]
    # The argument for images that the model sees with the prompt; `image` is the source in image-to-image.
    _context_image_argument = "image"

    # diffusers compares components with these annotations. They are base classes because a checkpoint that carries its
    # code defines each of our classes twice: in the pipeline's file and in the component's.
    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | None,
        vae: torch.nn.Module | None,
        scheduler: LatteFlowScheduler,
    ):
        super().__init__()
        self.register_modules(model=model, processor=processor, vae=vae, scheduler=scheduler)
        self._check_components()
        if vae is not None:
            check_autoencoder_of(vae)

    def _check_components(self) -> None:
        if self.processor is not None and adapt(self.processor) is not self.processor:
            self.register_modules(processor=adapt(self.processor))
        if self.model is None:
            return
        if self.processor is not None:
            vocab_size = self.model.get_input_embeddings().num_embeddings
            check_processor(self.processor, self.model.config.vlm_config, vocab_size)
        if self.vae is not None and self.vae.config.latent_channels != self.model.config.latent_channels:
            raise ValueError(
                f"vae has {self.vae.config.latent_channels} latent channels, the model has "
                f"{self.model.config.latent_channels}; use the autoencoder that the model was trained with."
            )
        boundaries = getattr(getattr(self.scheduler, "config", None), "expert_boundaries", None)
        if boundaries is not None and list(boundaries) != list(self.model.config.expert_boundaries):
            raise ValueError(
                f"scheduler's expert_boundaries {list(boundaries)} are not the model's "
                f"{list(self.model.config.expert_boundaries)}; "
                "use LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)."
            )

    def _require(self, name: str) -> None:
        if getattr(self, name) is None:
            raise ValueError(f"{name} is None, but is needed here; set it by pipe.register_modules({name}=...).")

    # Properties, because components may be exchanged after the pipeline is made.
    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel along a side; 32 without an autoencoder (Paper: DC-AE f32)."""
        return 32 if self.vae is None else spatial_compression(self.vae)

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Converts between images and the autoencoder's pixels."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def default_size(self) -> int:
        """The default height and width in pixels: the model's `sample_size`, which counts latent pixels."""
        return self.model.config.sample_size * self.vae_scale_factor

    @property
    def _size_multiple(self) -> int:
        """Pixels per token along a side."""
        return self.vae_scale_factor * self.model.config.latent_patch_size

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        image: Any,
        messages: list | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float | list[float],
        guidance_interval: tuple[float, float] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        context: LatteFlowContext | None = None,
        negative_context: LatteFlowContext | None = None,
        num_sources: int = 1,
    ) -> None:
        """Check the arguments of the call before any heavy work. `image` are those that the model sees with the
        prompt, `num_sources` is the number of source images of image-to-image.

        Raises:
            `ValueError`: with the name and the value of the first invalid argument.
        """
        check_prompt_arguments(
            prompt, image, messages, negative_prompt, context, negative_context, self._context_image_argument
        )
        check_size(height, width, multiple=self._size_multiple)
        check_num_inference_steps(num_inference_steps)
        check_guidance(guidance_scale, guidance_interval, self.model.config.num_experts)
        if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a positive integer, got {num_images_per_prompt!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"output_type must be 'latent' as long as vae is None, got {output_type!r}.")
        is_guided = max(guidance_scale) > 1 if isinstance(guidance_scale, (list, tuple)) else guidance_scale > 1
        if self.processor is None and (context is None or (is_guided and negative_context is None)):
            raise ValueError(
                "processor is None: give `context` instead of a prompt and, with a guidance_scale above 1, "
                "`negative_context`."
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        num_prompts = count_prompts(prompt, messages, context)
        if num_sources > 1 and num_prompts > 1 and num_sources != num_prompts:
            raise ValueError(
                f"image and mask_image must be one, or one for each of {num_prompts} prompts, got {num_sources}."
            )
        num_images = max(num_prompts, num_sources) * num_images_per_prompt
        check_generator(generator, num_images)
        for name, negative in (("negative_prompt", negative_prompt), ("negative_context", negative_context)):
            if negative is not None and not isinstance(negative, str) and len(negative) not in (1, num_prompts):
                raise ValueError(f"{name} must be one, or one for each of {num_prompts} prompts, got {len(negative)}.")
        self._check_memory(height, width, num_images, is_guided)

    def _check_memory(self, height: int, width: int, num_images: int, is_guided: bool) -> None:
        """Refuse a call whose pixels and attention maps alone cannot fit into the memory of the device."""
        config = self.model.config
        required = num_images * 3 * height * width * 4
        if config.residual_attention is not None or config._attn_implementation == "eager":
            # The scores of one layer and those of the layer before, of latents to latents.
            num_tokens = height * width // (self.vae_scale_factor * config.latent_patch_size) ** 2
            num_heads = config.vlm_config.get_text_config().num_attention_heads
            num_rows = num_images * (2 if is_guided else 1)
            required += 2 * num_rows * num_heads * num_tokens**2 * self.model.dtype.itemsize
        if required < 2**30:
            return  # Every device has that, and finding the device takes longer than a step of a small model.
        device = self._execution_device
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        elif device.type == "cpu" and hasattr(os, "sysconf"):
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            return
        if required > memory:
            raise ValueError(
                f"{num_images} image(s) of height {height} and width {width} need at least {required / 1e9:,.1f} GB, "
                f"but {device} has {memory / 1e9:,.1f} GB; use a smaller size or fewer images at once."
            )

    def _sampling_arguments(
        self,
        sampling: dict[str, Any],
        num_inference_steps: int | None,
        steps_per_expert: list[int] | None,
        guidance_scale: float | list[float] | None,
        has_sigmas: bool,
    ) -> tuple[int, list[int] | None, float | list[float]]:
        """The arguments of a call, with those of the model in place of `None`. `has_sigmas` tells whether the call
        gives its steps as sigmas or timesteps."""
        own_steps: list[int] | None = sampling.get("steps_per_expert")
        distilled_experts: list[int] = sampling.get("distilled_experts") or []
        if guidance_scale is None:
            guidance_scale = sampling.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
        else:
            check_guidance(guidance_scale, None, self.model.config.num_experts)
            guided_experts = experts_with_guidance(sampling, self.model.config.num_experts)
            if guides_any(guidance_scale, guided_experts):
                logger.warning(
                    f"guidance_scale {guidance_scale} guides experts {guided_experts} a second time: guidance was "
                    "trained or distilled into their weights. Leave guidance_scale out, or use 1 for them."
                )
        means_own_steps = num_inference_steps is None or (
            bool(distilled_experts) and num_inference_steps == sum(own_steps or [])
        )
        if steps_per_expert is None and not has_sigmas and means_own_steps:
            steps_per_expert = own_steps
        if num_inference_steps is None:
            num_inference_steps = sampling.get("num_inference_steps", DEFAULT_NUM_STEPS)
        return num_inference_steps, steps_per_expert, guidance_scale

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        messages: list | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        context: LatteFlowContext | None = None,
        negative_context: LatteFlowContext | None = None,
        device: torch.device | None = None,
    ) -> tuple[LatteFlowContext, LatteFlowContext | None]:
        """Encode the prompts and, for guidance, the negative prompts, in one prefill.

        Args:
            prompt, image, messages, negative_prompt, context, negative_context: same as in the call.
            do_classifier_free_guidance (`bool`, defaults to `True`): whether to encode negative prompts.
            device (`torch.device`, *optional*): where the backbone runs; found from off-loading hooks if not given.

        Returns:
            The contexts of all prompts (the images of a prompt share one), and as many negative ones (`None` without
            guidance).

        Raises:
            `ValueError`: if an image cannot be read, or the number of images is not that of the prompts.
        """
        conversations, negatives = [], []
        if context is None:
            conversations = self._conversations(prompt, image, messages)
        if do_classifier_free_guidance and negative_context is None:
            negatives = self._conversations("" if negative_prompt is None else negative_prompt)
        warn_of_unknown_words([*conversations, *negatives], self.model.trained_words)
        if conversations or negatives:
            device = self._execution_device if device is None else device
            inputs = self.processor.encode_conversations([*negatives, *conversations]).to(device)
            encoded = self.model.encode_context(**inputs)
            index = torch.arange(len(encoded), device=encoded.next_position.device)
            if negatives:
                negative_context = encoded.select(index[: len(negatives)])
            if conversations:
                context = encoded.select(index[len(negatives) :])
        assert context is not None
        if not do_classifier_free_guidance:
            return context, None
        assert negative_context is not None
        if len(negative_context) < len(context):
            negative_context = negative_context.select(negative_context.next_position.new_zeros(len(context)))
        return context, negative_context

    def _conversations(
        self, prompt: str | list[str] | None, image: Any = None, messages: list | None = None
    ) -> list[list[dict]]:
        """The conversation of each prompt, in the chat-template form."""
        self._require("processor")
        if messages is not None:
            conversations = messages if isinstance(messages[0], (list, tuple)) else [messages]
            return [self.processor.conversation(conversation) for conversation in conversations]
        if isinstance(prompt, str):
            return [self.processor.conversation(prompt, image)]
        assert prompt is not None
        images = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompt)
        if len(images) != len(prompt):
            name = self._context_image_argument
            raise ValueError(f"{name} must be one, or one for each of {len(prompt)} prompts, got {len(images)}.")
        return [self.processor.conversation(text, image) for text, image in zip(prompt, images)]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of shape (batch, channels, height / f, width / f), or the given latents on the right device.

        Raises:
            `ValueError`: if `latents` has another shape or is no tensor.
        """
        scale = self.vae_scale_factor
        shape = (batch_size, self.model.config.latent_channels, height // scale, width // scale)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents must be a tensor of shape {shape}, got {type(latents).__name__}.")
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be of shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=dtype)

    @own_call
    @refuses_foreign_arguments
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
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
        """Generate images.

        Args:
            prompt (`str` or `list[str]`, *optional*): the prompt or prompts.
            image (*optional*):
                Images shown to the model before the prompt, from any source that [`load_rgb_image`] reads: with one
                prompt, an image or a list of images; with a list of prompts, one for all of them, or one entry for
                each.
            messages (`list`, *optional*):
                A conversation in the chat-template form, images included, or a list of conversations. Instead of
                `prompt`.
            negative_prompt (`str` or `list[str]`, *optional*): what to guide away from; defaults to an empty prompt.
            height, width (`int`, *optional*): in pixels; default to the model's `sample_size` in latent pixels.
            num_inference_steps (`int`, *optional*): the number of denoising steps. If none of these four is given, the
                steps are those of `model.sampling`, which checkpoints and adapters distilled to few steps have, or
                else 40 (Paper: 40). With a distilled model, the number of its steps means exactly those.
            steps_per_expert (`list[int]`, *optional*): the number of steps of each expert. Instead of
                `num_inference_steps`.
            sigmas (`list[float]`, *optional*):
                Falling sigmas in (0, 1], which the scheduler shifts. Instead of `num_inference_steps`. They may start
                below 1 only with `latents`.
            timesteps (`list[float]`, *optional*):
                Falling timesteps in (0, 1000], used as they are. Instead of `num_inference_steps`.
            guidance_scale (`float` or `list[float]`, *optional*):
                w in v_negative + w * (v_prompt - v_negative), one value or one for each expert. Up to 1, the negative
                prompt is not evaluated. Defaults to that of `model.sampling`, or else 4 (Paper: its FID is flat from
                about 4 up). Distilled experts have it in their weights: guiding them again logs a warning.
            guidance_interval (`tuple[float, float]`, *optional*):
                (low, high) sigmas, from 0 (data) to 1 (noise), between which guidance is used.
            num_images_per_prompt (`int`, defaults to 1): images per prompt; they share the prompt's encoding.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one, or one for each image.
            latents (`torch.Tensor`, *optional*): the initial noise, (batch, channels, height / f, width / f).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): a [`LatteFlowPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*): called as (pipe, step, timestep, tensors) after each step;
                may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`): the tensors that it gets: `latents`.
            context, negative_context ([`LatteFlowContext`], *optional*):
                Encoded prompts from `encode_prompt`. Instead of `prompt` and `negative_prompt`.
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` multiplies the weights of the active adapters during the call, which no other thread may
                share the model with then. After the call, or its error, the weights are those of before.

        Returns:
            [`LatteFlowPipelineOutput`], or a tuple of the images.

        Raises:
            `ValueError`: if an argument is invalid, before any heavy work.
        """
        with self._scaled_adapters(attention_kwargs):
            return self._generate(
                prompt=prompt,
                context_image=image,
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
            )

    # The name that readers of the paper and of transformers look for.
    generate = __call__

    def _generate(
        self,
        *,
        prompt: str | list[str] | None,
        context_image: Any,
        messages: list | None,
        negative_prompt: str | list[str] | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        steps_per_expert: list[int] | None,
        sigmas: list[float] | None,
        timesteps: list[float] | None,
        guidance_scale: float | list[float] | None,
        guidance_interval: tuple[float, float] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        context: LatteFlowContext | None,
        negative_context: LatteFlowContext | None,
        source: SourceImages | None = None,
    ) -> LatteFlowPipelineOutput | tuple:
        """The call of all pipelines. `context_image` are the images that the model sees with the prompt; with a
        `source`, the images start from there."""
        # 1. Check inputs
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_on_step_end_tensor_inputs = list(callback_on_step_end_tensor_inputs or ())
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        sampling = self.model.sampling
        has_sigmas = any(given is not None for given in (sigmas, timesteps))
        num_inference_steps, steps_per_expert, guidance_scale = self._sampling_arguments(
            sampling, num_inference_steps, steps_per_expert, guidance_scale, has_sigmas
        )
        num_sources = 1 if source is None else len(source)
        self.check_inputs(
            prompt,
            context_image,
            messages,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            num_images_per_prompt,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
            context,
            negative_context,
            num_sources,
        )
        self._check_components()
        check_hooks(self.model)
        # Numpy's numbers become Python's.
        height, width, num_images_per_prompt = int(height), int(width), int(num_images_per_prompt)
        default_size = (self.default_size, self.default_size)
        if self.model.trained_words is not None and (height, width) != default_size:
            logger.warning_once(
                f"The model only learned images of {self.default_size}x{self.default_size} pixels: expect a wrong one."
            )
        self._guidance_scale: float | list[float]
        if isinstance(guidance_scale, (list, tuple)):
            self._guidance_scale = [float(scale) for scale in guidance_scale]
        else:
            self._guidance_scale = float(guidance_scale)
        self._current_expert = 0
        self._interrupt = False
        device = self._execution_device

        # 2. Prepare timesteps, the expert of each, and whether it is guided
        steps = self._prepare_steps(
            sampling,
            guidance_interval,
            source,
            starts_from_noise=latents is None and source is None,
            num_inference_steps=num_inference_steps,
            device=device,
            sigmas=sigmas,
            timesteps=timesteps,
            steps_per_expert=steps_per_expert,
        )

        # 3. Prepare latents
        num_items = max(count_prompts(prompt, messages, context), num_sources)
        batch_size = num_items * num_images_per_prompt
        generator = list(generator) if isinstance(generator, tuple) else generator
        latents = self.prepare_latents(batch_size, height, width, self.model.dtype, device, generator, latents)
        known = None
        if source is not None:
            latents, known = self._prepare_source(
                source, latents, steps, height, width, num_items, num_images_per_prompt
            )

        # 4. Encode prompts
        context, negative_context = self.encode_prompt(
            prompt,
            context_image,
            messages,
            negative_prompt,
            any(steps.is_guided),
            context,
            negative_context,
            device,
        )

        # 5. Denoise
        latents = self._denoise(
            latents,
            steps,
            context,
            negative_context,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            known,
        )

        # 6. Decode
        if output_type == "latent":
            check_finite(latents, self.model)
            images = latents
        else:
            images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return LatteFlowPipelineOutput(images=images) if return_dict else (images,)

    def _prepare_source(
        self,
        source: SourceImages,
        noise: torch.Tensor,
        steps: DenoisingSteps,
        height: int,
        width: int,
        num_items: int,
        num_images_per_prompt: int,
    ) -> tuple[torch.Tensor, KnownRegion | None]:
        """The source images as latents with the noise of the first step, (batch, channels, height / f, width / f), and
        what is not generated if there are masks."""
        mask = None
        if source.masks is not None:
            mask = latent_mask(source.masks, height, width, self.vae_scale_factor).to(noise.device)
            mask = repeat_for_batch(mask, num_items, num_images_per_prompt)
        clean = self.encode_images(source.images, height, width)
        check_finite(clean, self.vae)
        clean = repeat_for_batch(clean.to(noise), num_items, num_images_per_prompt)
        sigma = steps.sigmas[0]
        # All steps start from pure noise, as without a source, also those of schedulers that start a little below 1.
        is_pure_noise = steps.first == 0 and sigma >= MIN_FIRST_SIGMA
        latents = noise if is_pure_noise else interpolate(clean, noise, sigma)
        return latents, None if mask is None else KnownRegion(clean, noise, mask)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Scaled latents (batch, channels, height, width) -> images of `output_type`.

        Raises:
            `ValueError`: if there is no autoencoder, or pixels are not finite because of an overflow.
        """
        self._require("vae")
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        scaled = scaled + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(scaled, return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            check_finite(latents, self.model)
            check_finite(pixels, self.vae)
        if (pixels.amax((1, 2, 3)) - pixels.amin((1, 2, 3)) < 2 / 255).any():
            logger.warning("An image has a single colour. Check that the weights belong together.")
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def encode_images(self, images: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Images -> clean latents (batch, channels, height / f, width / f), scaled as for training.

        An image of another size is resized and cropped at the centre, as for training: its aspect ratio is kept.

        Args:
            images: an image, a list of them, or a batch; see [`load_rgb_image`].
            height, width (`int`, *optional*):
                In pixels. Default to the size of the images, which must then be the same for all, less what is not a
                multiple of the pixels per token.

        Raises:
            `ValueError`: if an image cannot be read, a size is not a multiple of the pixels per token, or images
                differ in size and none is given.
        """
        self._require("vae")
        loaded = load_rgb_images(images, getattr(self.processor, "background", "white"))
        sizes = {image.size for image in loaded}
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width, or neither; got {height} and {width}.")
        if height is None or width is None:
            if len(sizes) != 1:
                raise ValueError(
                    f"images must have one size, or height and width be given, got sizes {sorted(sizes)}."
                )
            width, height = (side // self._size_multiple * self._size_multiple for side in loaded[0].size)
            if not width or not height:
                raise ValueError(
                    f"images must have {self._size_multiple} pixels a side or more, got {loaded[0].size}."
                )
        check_size(height, width, multiple=self._size_multiple)
        size = (int(width), int(height))
        fitted = [
            image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in loaded
        ]
        pixels = self.image_processor.preprocess(fitted).to(self._execution_device, self.vae.dtype)
        with one_thread_at_a_time(self.vae):
            return encode_pixels(self.vae, pixels)

    def chat(self, messages: str | list[dict], images: Any = None, **kwargs: Any) -> str:
        """Ask the model about images or anything else. Same as [`~LatteFlowGenerationMixin.chat`], with the
        pipeline's processor and device."""
        self._require("processor")
        with one_thread_at_a_time(self.model, self.vae):
            answer = self.model.chat(self.processor, messages, images=images, device=self._execution_device, **kwargs)
            self.maybe_free_model_hooks()
        return answer

    def compile(self, **kwargs: Any) -> None:
        """Compile the `forward` of the tower's layers; layers with equal shapes share a graph. Call it before any
        off-loading is enabled.

        The numbers of images, prompts and tokens are dynamic: another prompt length, image size, batch size or number
        of steps compiles nothing anew. The first call compiles two graphs, one for the first layer of an expert and
        one for all others; so does the first call of each other kind: one image or several, one prompt or several,
        several images of a prompt, no padding of prompts (with guidance they are padded), other active adapters.
        Kinds after the 64th graph run without compilation, and torch logs it. (Chosen: layers rather than the whole
        model, which would take K times as long to compile and share nothing.)

        Args:
            kwargs: arguments of `torch.compile`, such as `mode="max-autotune"`, or `dynamic=False` for calls that all
                have the same shapes.
        """
        for layer in self.model.tower.layers:
            forward = torch.compile(layer.forward, **{"recompile_limit": 64, **kwargs})
            layer.forward = forward if "dynamic" in kwargs else _with_dynamic_shapes(forward)


def _with_dynamic_shapes(forward: Callable) -> Callable:
    """Mark the dimensions of a layer's inputs that differ between calls: those of images, prompts and tokens.

    `torch.compile(dynamic=True)` would make all dimensions dynamic, and two that are equal at first, such as prompts
    and heads, equal for ever.
    """

    @functools.wraps(forward)
    def marked(
        hidden_states: torch.Tensor,
        timestep_embedding: torch.Tensor | None,
        previous_scores: torch.Tensor | None = None,
        modulation: Any = None,
        **attention_inputs: Any,
    ) -> Any:
        dynamic: list[tuple[Any, list[int]]] = [
            (hidden_states, [0, 1]),
            (timestep_embedding, [0]),
            (previous_scores, [0, 2, 3]),
            (attention_inputs["context_keys"], [0, 2]),
            (attention_inputs["context_values"], [0, 2]),
            (attention_inputs["attention_mask"], [0, 2, 3]),
            *((embedding, [0, 1]) for embedding in attention_inputs["position_embeddings"]),
        ]
        for tensor, dimensions in dynamic:
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, dimensions)
        return forward(hidden_states, timestep_embedding, previous_scores, modulation, **attention_inputs)

    return marked


def encode_pixels(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (batch, 3, height, width) in [-1, 1] -> scaled latents (z - shift) * scale. Of a variational autoencoder,
    z is the mode."""
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def spatial_compression(vae: torch.nn.Module) -> int:
    """f, the number of pixels per latent pixel along a side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    widths = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)
