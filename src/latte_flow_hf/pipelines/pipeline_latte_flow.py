# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Prompt -> picture: encode once, denoise with one expert a step, decode.

What is unusual here: the text encoder is the model itself (its frozen backbone), so one component both answers and
paints, and a prompt's encoding is the backbone's key-value cache.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..modeling.modeling_latte_flow import LatteFlowContext, LatteFlowForConditionalGeneration, check_files
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler, check_num_inference_steps
from .pipeline_output import LatteFlowPipelineOutput


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# What a component's folder must hold. (The model checks its own weights; they may be in shards.)
_COMPONENT_FILES = {
    "model": ("config.json",),
    "processor": ("processor_config.json|preprocessor_config.json", "tokenizer.json|vocab.json"),
    "scheduler": ("scheduler_config.json",),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors|diffusion_pytorch_model*"),
}


class LatteFlowPipeline(DiffusionPipeline):
    """Paints from a prompt or a conversation, and chats, with one LaTtE-Flow model.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the frozen backbone and the generation tower.
        processor ([`LatteFlowProcessor`]): the backbone's tokenizer, image processor and chat template.
        vae (`AutoencoderDC`): the autoencoder; any with the same calls will do.
        scheduler ([`LatteFlowScheduler`]): sigmas, and which expert runs at which step.

    Raises:
        `ValueError`: if the autoencoder's latent channels or the scheduler's boundaries are not the model's.
    """

    model_cpu_offload_seq = "model->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        model: LatteFlowForConditionalGeneration,
        processor: LatteFlowProcessor,
        vae: torch.nn.Module,
        scheduler: LatteFlowScheduler,
    ):
        super().__init__()
        self.register_modules(model=model, processor=processor, vae=vae, scheduler=scheduler)
        self._check_components()
        self.vae_scale_factor = _spatial_compression(vae) if vae is not None else 32
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._unconditional: tuple[tuple, LatteFlowContext] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "LatteFlowPipeline":
        """As of `DiffusionPipeline`; a local folder is first checked for files that are missing or cut off.

        Raises:
            `OSError`: with the path of such a file.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_files(folder, "model_index.json")
            for component, names in _COMPONENT_FILES.items():
                if component not in kwargs:
                    check_files(folder / component, *names)
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    def _check_components(self) -> None:
        """What does not fit together must not paint."""
        if self.model is None:
            return
        if self.vae is not None and self.vae.config.latent_channels != self.model.config.latent_channels:
            raise ValueError(
                f"vae has {self.vae.config.latent_channels} latent channels, the model paints with "
                f"{self.model.config.latent_channels}: give the autoencoder that the model was trained with."
            )
        boundaries = getattr(getattr(self.scheduler, "config", None), "expert_boundaries", None)
        if boundaries is not None and list(boundaries) != list(self.model.config.expert_boundaries):
            raise ValueError(
                f"scheduler's expert_boundaries {list(boundaries)} are not the model's "
                f"{list(self.model.config.expert_boundaries)}; "
                "LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries) would do."
            )

    @property
    def default_size(self) -> int:
        """Side of a picture in pixels when none is asked for: 8x8 latent tokens, as in the paper."""
        return 8 * self.model.config.latent_patch_size * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """Of the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call computes the unconditional branch."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        image: Any,
        messages: list | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuse what cannot be right, before any heavy work.

        Raises:
            `ValueError`: with the name and the value of the first such argument.
        """
        if (prompt is None) == (messages is None):
            raise ValueError("give either `prompt` or `messages`.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            given = [value] if isinstance(value, str) else value
            if given is not None and not (
                isinstance(given, (list, tuple)) and given and all(isinstance(item, str) for item in given)
            ):
                raise ValueError(f"{name} must be a string or a non-empty list of strings, got {value!r}.")
        if messages is not None and image is not None:
            raise ValueError("`image` goes with `prompt`; in a conversation, put it into the messages' content.")
        if messages is not None and (not isinstance(messages, (list, tuple)) or not messages):
            raise ValueError(f"messages must be a non-empty list of messages or of conversations, got {messages!r}.")
        step = self.vae_scale_factor * self.model.config.latent_patch_size
        for name, pixels in (("height", height), ("width", width)):
            if not isinstance(pixels, int) or pixels < step or pixels % step:
                raise ValueError(f"{name} must be a positive multiple of {step}, got {pixels!r}.")
        check_num_inference_steps(num_inference_steps)
        if not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a positive integer, got {num_images_per_prompt!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        prompts = _num_prompts(prompt, messages)
        generators = (
            generator if isinstance(generator, (list, tuple)) else [generator] * prompts * num_images_per_prompt
        )
        if len(generators) != prompts * num_images_per_prompt or not all(
            item is None or isinstance(item, torch.Generator) for item in generators
        ):
            raise ValueError(
                f"generator must be one, or one for each of {prompts * num_images_per_prompt} pictures, got "
                f"{len(generator) if isinstance(generator, (list, tuple)) else repr(generator)}."
            )
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) not in (1, prompts):
            raise ValueError(f"negative_prompt must be one, or one for each of {prompts}, got {len(negative_prompt)}.")

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        messages: list | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[LatteFlowContext, LatteFlowContext | None]:
        """Prefill each prompt once; the unconditional one (an empty prompt) once a pipeline.

        Args:
            prompt, image, messages, negative_prompt, num_images_per_prompt: as of the call.
            do_classifier_free_guidance (`bool`, defaults to `True`): whether to give the unconditional branch too.

        Returns:
            The contexts of all pictures, and those of their unconditional branch (`None` without guidance).

        Raises:
            `ValueError`: if a picture is none, or their number is not that of the prompts.
        """
        positive = self._encode(self._conversations(prompt, image, messages))
        num_prompts = len(positive)
        negative = None
        if do_classifier_free_guidance:
            if negative_prompt is None:
                negative = self._unconditional_context()
            else:
                negative = self._encode(self._conversations(negative_prompt, None, None))
            negative = _repeat(negative, num_prompts // len(negative), interleave=False)
            negative = _repeat(negative, num_images_per_prompt)
        return _repeat(positive, num_images_per_prompt), negative

    def _conversations(self, prompt: str | list[str] | None, image: Any, messages: list | None) -> list[list[dict]]:
        if messages is not None:
            several = messages if isinstance(messages[0], (list, tuple)) else [messages]
            return [self.processor.conversation(conversation) for conversation in several]
        if isinstance(prompt, str):
            return [self.processor.conversation(prompt, image)]
        assert prompt is not None
        images = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompt)
        if len(images) != len(prompt):
            raise ValueError(f"image must be one, or one for each of {len(prompt)} prompts, got {len(images)}.")
        return [self.processor.conversation(words, picture) for words, picture in zip(prompt, images)]

    def _encode(self, conversations: list[list[dict]]) -> LatteFlowContext:
        inputs = self.processor.encode_conversations(conversations).to(self._execution_device)
        return self.model.encode_context(**inputs)

    def _unconditional_context(self) -> LatteFlowContext:
        key = (id(self.model), self.model.dtype, self._execution_device)
        if self._unconditional is None or self._unconditional[0] != key:
            self._unconditional = (key, self._encode([self.processor.conversation("")]))
        return self._unconditional[1]

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
            `ValueError`: if `latents` has another shape.
        """
        scale = self.vae_scale_factor
        shape = (batch_size, self.model.config.latent_channels, height // scale, width // scale)
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be of shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        messages: list | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 40,
        steps_per_expert: list[int] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LatteFlowPipelineOutput | tuple:
        """Paint.

        Args:
            prompt (`str` or `list[str]`, *optional*): what to paint.
            image (*optional*):
                Visual context that goes before the words: with a string, a picture or a list of pictures; with a list
                of prompts, one for all, or one entry for each.
            messages (`list`, *optional*):
                In place of `prompt`: a conversation in the chat-template form (or a list of them), pictures included.
            negative_prompt (`str` or `list[str]`, *optional*): what guidance leads away from; an empty prompt if not
                given.
            height, width (`int`, *optional*): in pixels; 8x8 latent tokens if not given, as in the paper.
            num_inference_steps (`int`, defaults to 40): as in the paper.
            steps_per_expert (`list[int]`, *optional*): in place of `num_inference_steps`: steps of each expert.
            guidance_scale (`float`, defaults to 4.0):
                w of v_uncond + w * (v_cond - v_uncond); up to 1 the unconditional branch is not computed. (Paper: its
                FID is flat from about 4 up.)
            num_images_per_prompt (`int`, defaults to 1): they share one prefill.
            generator (`torch.Generator` or a list of them, *optional*): one, or one for each picture.
            latents (`torch.Tensor`, *optional*): the starting noise, (batch, channels, height / f, width / f).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): a [`LatteFlowPipelineOutput`] or a tuple.
            callback_on_step_end (*optional*): called as (pipe, step, timestep, tensors) after each step; may return
                changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`): which tensors it gets; `latents`.

        Returns:
            [`LatteFlowPipelineOutput`], or a tuple of the pictures.

        Raises:
            `ValueError`: if an argument cannot be right; before any heavy work.
        """
        # 1. Check everything
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        self.check_inputs(
            prompt,
            image,
            messages,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            generator,
            output_type,
            list(callback_on_step_end_tensor_inputs),
        )
        self._check_components()
        self._guidance_scale = float(guidance_scale)
        self._interrupt = False
        device = self._execution_device

        # 2. Choose the steps (the scheduler checks `steps_per_expert`) and the noise
        if steps_per_expert is None:
            # Evenly spaced down to one step above the data, as diffusers' flow-matching pipelines have it.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps_per_expert=steps_per_expert, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        experts = [self.model.expert_of(timestep) for timestep in timesteps.tolist()]
        batch_size = _num_prompts(prompt, messages) * num_images_per_prompt
        latents = self.prepare_latents(batch_size, height, width, self.model.dtype, device, generator, latents)

        # 3. Encode the prompts
        context, negative = self.encode_prompt(
            prompt, image, messages, negative_prompt, num_images_per_prompt, self.do_classifier_free_guidance
        )
        if negative is not None:
            context = LatteFlowContext.cat([negative, context])

        # 4. Denoise
        with self.progress_bar(total=len(timesteps)) as progress:
            for step, (timestep, expert) in enumerate(zip(timesteps, experts)):
                if self._interrupt:
                    continue
                progress.set_description(f"expert {expert} of {self.model.config.num_experts}")
                model_input = latents if negative is None else torch.cat([latents, latents])
                velocity = self.model.predict_velocity(model_input, timestep, context, expert=expert)
                if negative is not None:
                    unconditional, conditional = velocity.chunk(2)
                    velocity = unconditional + self.guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).pop("latents", latents)
                progress.update()

        # 5. Decode
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return LatteFlowPipelineOutput(images=images) if return_dict else (images,)

    # The name that the field's readers of the paper look for.
    generate = __call__

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Scaled latents (batch, channels, height, width) -> pictures of `output_type`."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        latents = latents + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def encode_images(self, images: Image.Image | list[Image.Image]) -> torch.Tensor:
        """Pictures -> clean latents (batch, channels, height, width), scaled as the model is trained on them."""
        pixels = self.image_processor.preprocess(images).to(self._execution_device, self.vae.dtype)
        return encode_pixels(self.vae, pixels)

    def chat(self, messages: str | list[dict], images: Any = None, **kwargs: Any) -> str:
        """Ask the same model, also about what was painted; as [`LatteFlowForConditionalGeneration.chat`]."""
        answer = self.model.chat(self.processor, messages, images=images, device=self._execution_device, **kwargs)
        self.maybe_free_model_hooks()
        return answer

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        **kwargs: Any,
    ) -> None:
        """As of `DiffusionPipeline`, whose blocks of an autoencoder would wait for a `forward` that `decode` is not.

        Raises:
            `ValueError`: for `offload_to_disk_path` with `"leaf_level"` and a language head that is tied to the
                embedding: diffusers would write the second of the two after it has dropped the weights of both.
        """
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        if offload_type == "leaf_level" and kwargs.get("offload_to_disk_path") is not None and tied:
            raise ValueError(
                "offload_type 'leaf_level' cannot go to disk: the language head is tied to the embedding, and "
                "diffusers would lose its weights; 'block_level' or no `offload_to_disk_path` would do."
            )
        if getattr(self.vae, "_group_offload_block_modules", None) is None:
            self.vae._group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv"]
        super().enable_group_offload(onload_device, offload_device, offload_type, **kwargs)


def encode_pixels(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (batch, 3, height, width) in [-1, 1] -> scaled latents: (z - shift) * scale; a variational one's mode."""
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _spatial_compression(vae: torch.nn.Module) -> int:
    """f: how many pixels make one latent pixel, along a side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    widths = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)


def _num_prompts(prompt: str | list[str] | None, messages: list | None) -> int:
    if messages is not None:
        return len(messages) if isinstance(messages[0], (list, tuple)) else 1
    return 1 if isinstance(prompt, str) else len(prompt or [])


def _repeat(context: LatteFlowContext, times: int, interleave: bool = True) -> LatteFlowContext:
    if times == 1:
        return context
    index = torch.arange(len(context), device=context.next_position.device)
    return context.rows(index.repeat_interleave(times) if interleave else index.repeat(times))
