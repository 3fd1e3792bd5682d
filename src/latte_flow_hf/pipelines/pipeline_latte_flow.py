# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Prompt -> picture: encode once, denoise with one expert a step, decode.

What is unusual here: the text encoder is the model itself (its frozen backbone), so one component both answers and
paints, and a prompt's encoding is the backbone's key-value cache.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging
from diffusers.utils.torch_utils import get_device, randn_tensor
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from ..files import check_files, read_json
from ..modeling.context import LatteFlowContext
from ..modeling.expert_offload import ExpertOffload
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler, check_num_inference_steps
from .lora import LatteFlowLoraMixin
from .pipeline_output import LatteFlowPipelineOutput


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# What a component's folder must hold; weights may be in shards, or of a variant.
_COMPONENT_FILES = {
    "model": ("config.json", "model.safetensors|model.*.safetensors|model.safetensors.index*.json"),
    "processor": ("processor_config.json|preprocessor_config.json", "tokenizer.json|vocab.json"),
    "scheduler": ("scheduler_config.json",),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors|diffusion_pytorch_model*"),
}


class LatteFlowPipeline(LatteFlowLoraMixin, DiffusionPipeline):
    """Paints from a prompt or a conversation, and chats, with one LaTtE-Flow model.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the frozen backbone and the generation tower.
        processor ([`LatteFlowProcessor`] or `None`):
            The backbone's tokenizer, image processor and chat template; without it the call takes `context` only.
        vae (`AutoencoderDC` or `None`):
            The autoencoder; any with the same calls will do. Without it the call gives latents only.
        scheduler ([`LatteFlowScheduler`]): sigmas, and which expert runs at which step.

    Raises:
        `ValueError`: if the autoencoder's latent channels or the scheduler's boundaries are not the model's.
    """

    model_cpu_offload_seq = "model->vae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["processor", "vae"]
    _unconditional: tuple[tuple, LatteFlowContext] | None

    # diffusers compares components with these annotations. A checkpoint that carries its own code has each of its
    # classes twice, once in the pipeline's file and once in the component's, hence the base classes.
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

    def __setattr__(self, name: str, value: Any) -> None:
        """A component may be exchanged at any time: what was worked out from the one before goes with it."""
        super().__setattr__(name, value)
        if name in ("model", "processor"):
            self._unconditional = None
        elif name == "vae":
            self.vae_scale_factor = 32 if value is None else spatial_compression(value)
            self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "LatteFlowPipeline":
        """As of `DiffusionPipeline`; a local folder is first checked for files that are missing or cut off.

        Raises:
            `OSError`: with the path of such a file.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_pipeline_files(folder, given=kwargs)
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LatteFlowPipeline":
        """As of `DiffusionPipeline`, with any autoencoder: it hands on only those whose very class is annotated."""
        return super().from_pipe(pipeline, **{"vae": getattr(pipeline, "vae", None), **kwargs})

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """As of `DiffusionPipeline`, which leaves the model's generation_config.json on the hub."""
        folder = Path(super().download(pretrained_model_name, **kwargs))
        with contextlib.suppress(OSError):  # a model need not have one
            GenerationConfig.from_pretrained(
                pretrained_model_name,
                subfolder="model",
                revision=folder.name,  # the commit
                **{name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if kwargs.get(name)},
            )
        return str(folder)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict:
        """As of `ConfigMixin`; where this package is installed, code that a checkpoint carries does not run: the
        package's own classes take its place."""
        config = super()._dict_from_json_file(json_file)
        if "latte_flow_hf" in LOADABLE_CLASSES and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
            for name, entry in config.items():
                if name in _COMPONENT_FILES and str(entry[1]).startswith("LatteFlow"):
                    config[name] = ["latte_flow_hf", entry[1]]
        return config

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

    def _check_has(self, *names: str) -> None:
        """A component that is left out must be missed by its name."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None, and this needs one: pipe.register_modules({name}=...) would do.")

    @property
    def default_size(self) -> int:
        """Side of a picture in pixels when none is asked for: `sample_size` latent pixels."""
        return self.model.config.sample_size * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """Of the running call, at its current expert."""
        return self._guidance_scale[self._expert] if isinstance(self._guidance_scale, list) else self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call computes the unconditional branch; `_guidance_scale = 1` in a callback ends it."""
        return self.guidance_scale > 1

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
        guidance_scale: float | list[float],
        guidance_interval: tuple[float, float] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        context: LatteFlowContext | None = None,
        negative_context: LatteFlowContext | None = None,
    ) -> None:
        """Refuse what cannot be right, before any heavy work.

        Raises:
            `ValueError`: with the name and the value of the first such argument.
        """
        if sum(given is not None for given in (prompt, messages, context)) != 1:
            raise ValueError("give either `prompt` or `messages`, or `context` in place of both.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            given = [value] if isinstance(value, str) else value
            if given is not None and not (
                isinstance(given, (list, tuple)) and given and all(isinstance(item, str) for item in given)
            ):
                raise ValueError(f"{name} must be a string or a non-empty list of strings, got {value!r}.")
        if negative_prompt is not None and negative_context is not None:
            raise ValueError("give either `negative_prompt` or `negative_context`.")
        for name, encoded in (("context", context), ("negative_context", negative_context)):
            if encoded is not None and (not isinstance(encoded, LatteFlowContext) or not len(encoded)):
                raise ValueError(
                    f"{name} must be a LatteFlowContext of one prompt or more, got {type(encoded).__name__}."
                )
        if context is not None and image is not None:
            raise ValueError("`image` goes with `prompt`; a context already holds its pictures.")
        if messages is not None and image is not None:
            raise ValueError("`image` goes with `prompt`; in a conversation, put it into the messages' content.")
        if messages is not None and (not isinstance(messages, (list, tuple)) or not messages):
            raise ValueError(f"messages must be a non-empty list of messages or of conversations, got {messages!r}.")
        step = self.vae_scale_factor * self.model.config.latent_patch_size
        for name, pixels in (("height", height), ("width", width)):
            if not isinstance(pixels, int) or pixels < step or pixels % step:
                raise ValueError(f"{name} must be a positive multiple of {step}, got {pixels!r}.")
        check_num_inference_steps(num_inference_steps)
        num_experts = self.model.config.num_experts
        scales = list(guidance_scale) if isinstance(guidance_scale, (list, tuple)) else [guidance_scale] * num_experts
        finite = all(isinstance(scale, (int, float)) and math.isfinite(scale) for scale in scales)
        if not finite or len(scales) != num_experts:
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
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a positive integer, got {num_images_per_prompt!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}.")
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"output_type must be 'latent' as long as vae is None, got {output_type!r}.")
        if self.processor is None and (context is None or (max(scales) > 1 and negative_context is None)):
            raise ValueError(
                "processor is None: give `context` in place of words and, with a guidance_scale above 1, "
                "`negative_context`."
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        prompts = _num_prompts(prompt, messages, context)
        pictures = prompts * num_images_per_prompt
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * pictures
        no_generator = [item for item in generators if not isinstance(item, torch.Generator)]
        if len(generators) != pictures or (no_generator and generator is not None):
            found = repr(no_generator[0]) if no_generator else len(generators)
            raise ValueError(f"generator must be one, or one for each of {pictures} pictures, got {found}.")
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) not in (1, prompts):
            raise ValueError(f"negative_prompt must be one, or one for each of {prompts}, got {len(negative_prompt)}.")
        if negative_context is not None and len(negative_context) not in (1, prompts):
            raise ValueError(
                f"negative_context must be one, or one for each of {prompts}, got {len(negative_context)}."
            )

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        messages: list | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        context: LatteFlowContext | None = None,
        negative_context: LatteFlowContext | None = None,
    ) -> tuple[LatteFlowContext, LatteFlowContext | None]:
        """Prefill each prompt once; the unconditional one (an empty prompt) once a pipeline.

        Args:
            prompt, image, messages, negative_prompt, context, negative_context: as of the call.
            do_classifier_free_guidance (`bool`, defaults to `True`): whether to give the unconditional branch too.

        Returns:
            The contexts of all prompts (several pictures of one share it), and of as many for the unconditional branch
            (`None` without guidance).

        Raises:
            `ValueError`: if a picture is none, or their number is not that of the prompts.
        """
        if context is None:
            context = self._encode(self._conversations(prompt, image, messages))
        negative = None
        if do_classifier_free_guidance:
            if negative_context is not None:
                negative = negative_context
            elif negative_prompt is None:
                negative = self._unconditional_context()
            else:
                negative = self._encode(self._conversations(negative_prompt, None, None))
            if len(negative) < len(context):
                negative = negative.select(torch.zeros(len(context), dtype=torch.long, device=self._execution_device))
        return context, negative

    def _conversations(self, prompt: str | list[str] | None, image: Any, messages: list | None) -> list[list[dict]]:
        self._check_has("processor")
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
        # Weights that were loaded or changed in place are other weights: torch counts the changes of each.
        weights = [(id(p), 0 if p.is_inference() else p._version) for p in self.model.vlm.parameters()]
        key = (self.model.dtype, self._execution_device, self.processor.chat_template, weights)
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
        guidance_scale: float | list[float] = 4.0,
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
            height, width (`int`, *optional*): in pixels; the model's `sample_size` in latent pixels if not given.
            num_inference_steps (`int`, defaults to 40): as in the paper.
            steps_per_expert (`list[int]`, *optional*): in place of `num_inference_steps`: steps of each expert.
            guidance_scale (`float` or `list[float]`, defaults to 4.0):
                w of v_uncond + w * (v_cond - v_uncond), one for all or one for each expert; up to 1 the unconditional
                branch is not computed. (Paper: its FID is flat from about 4 up.)
            guidance_interval (`tuple[float, float]`, *optional*):
                (low, high), from 0 (data) to 1 (noise): guide at sigmas in there alone.
            num_images_per_prompt (`int`, defaults to 1): they share one prefill, and its cache without a copy.
            generator (`torch.Generator` or a list of them, *optional*): one, or one for each picture.
            latents (`torch.Tensor`, *optional*): the starting noise, (batch, channels, height / f, width / f).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): a [`LatteFlowPipelineOutput`] or a tuple.
            callback_on_step_end (*optional*): called as (pipe, step, timestep, tensors) after each step; may return
                changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`): which tensors it gets; `latents`.
            context, negative_context ([`LatteFlowContext`], *optional*):
                In place of `prompt` and `negative_prompt`: prompts already encoded, as `encode_prompt` gives them.

        Returns:
            [`LatteFlowPipelineOutput`], or a tuple of the pictures.

        Raises:
            `ValueError`: if an argument cannot be right; before any heavy work.
        """
        # 1. Check everything
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_on_step_end_tensor_inputs = list(callback_on_step_end_tensor_inputs or ())
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
            guidance_interval,
            num_images_per_prompt,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
            context,
            negative_context,
        )
        self._check_components()
        self._guidance_scale: float | list[float]
        if isinstance(guidance_scale, (list, tuple)):
            self._guidance_scale = [float(scale) for scale in guidance_scale]
        else:
            self._guidance_scale = float(guidance_scale)
        self._expert = 0
        self._interrupt = False
        device = self._execution_device

        # 2. Choose the steps (the scheduler checks `steps_per_expert`) and the noise
        wanted = "sigmas" if steps_per_expert is None else "steps_per_expert"
        if wanted not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"scheduler {type(self.scheduler).__name__} takes no {wanted}; a LatteFlowScheduler would do."
            )
        if steps_per_expert is None:
            # Evenly spaced down to one step above the data, as diffusers' flow-matching pipelines have it.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps_per_expert=steps_per_expert, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # Where a solver corrects a step at its end, the scheduler knows whose step it was.
        experts = getattr(self.scheduler, "experts", None)
        if experts is None:
            experts = [self.model.expert_of(timestep) for timestep in timesteps.tolist()]
        scales = self._guidance_scale if isinstance(self._guidance_scale, list) else [self._guidance_scale]
        low, high = (0.0, 1.0) if guidance_interval is None else guidance_interval
        guided = [
            scales[expert % len(scales)] > 1 and low <= timestep / 1000.0 <= high
            for expert, timestep in zip(experts, timesteps.tolist())
        ]
        batch_size = _num_prompts(prompt, messages, context) * num_images_per_prompt
        generator = list(generator) if isinstance(generator, tuple) else generator
        # A step may draw noise as well.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        drawn_from = {"generator": generator} if takes_generator else {}
        latents = self.prepare_latents(batch_size, height, width, self.model.dtype, device, generator, latents)

        # 3. Encode the prompts
        context, negative = self.encode_prompt(
            prompt,
            image,
            messages,
            negative_prompt,
            any(guided),
            context,
            negative_context,
        )
        # Several pictures of a prompt share its context; the steps, what depends on none of them.
        both = None if negative is None else LatteFlowContext.cat([negative, context])
        layout = self.model.latent_layout(latents, context)
        both_layout = None if both is None else self.model.latent_layout(torch.cat([latents, latents]), both)

        # 4. Denoise
        unconditional = conditional = None
        with self.progress_bar(total=len(timesteps)) as progress:
            for step, (timestep, expert) in enumerate(zip(timesteps, experts)):
                if self._interrupt:
                    continue
                progress.set_description(f"expert {expert} of {self.model.config.num_experts}")
                if step == 0 or expert != experts[step - 1]:
                    first_step = step
                    of_expert = [t for t, owner in zip(timesteps, experts) if owner == expert]
                    modulations = self.model.modulate(torch.stack(of_expert), expert)
                self._expert = expert
                modulation = modulations[step - first_step]
                if guided[step] and self.do_classifier_free_guidance:
                    velocity = self.model.predict_velocity(
                        torch.cat([latents, latents]), timestep, both, expert, modulation, both_layout
                    )
                    unconditional, conditional = velocity.chunk(2)
                    velocity = unconditional + self.guidance_scale * (conditional - unconditional)
                else:
                    velocity = self.model.predict_velocity(latents, timestep, context, expert, modulation, layout)
                latents = self.scheduler.step(velocity, timestep, latents, **drawn_from, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).pop("latents", latents)
                progress.update()

        # 5. Decode
        if unconditional is not None and torch.equal(unconditional, conditional):
            logger.warning(
                "The prompt changed nothing against the negative one: the two are the same, or the tower is untrained."
            )
        if output_type == "latent":
            _check_finite(latents, self.model)
            images = latents
        else:
            images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return LatteFlowPipelineOutput(images=images) if return_dict else (images,)

    # The name that the field's readers of the paper look for.
    generate = __call__

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Scaled latents (batch, channels, height, width) -> pictures of `output_type`.

        Raises:
            `ValueError`: if pixels are not finite: the model or the autoencoder left the range of its dtype.
        """
        self._check_has("vae")
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        scaled = scaled + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(scaled, return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            _check_finite(latents, self.model)
            _check_finite(pixels, self.vae)
        if (pixels.amax((1, 2, 3)) - pixels.amin((1, 2, 3)) < 2 / 255).any():
            logger.warning("A picture is of one even colour: weights that do not fit together paint so.")
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def encode_images(self, images: Image.Image | list[Image.Image]) -> torch.Tensor:
        """Pictures -> clean latents (batch, channels, height, width), scaled as the model is trained on them."""
        self._check_has("vae")
        pixels = self.image_processor.preprocess(images).to(self._execution_device, self.vae.dtype)
        return encode_pixels(self.vae, pixels)

    def chat(self, messages: str | list[dict], images: Any = None, **kwargs: Any) -> str:
        """Ask the same model, also about what was painted; as [`LatteFlowForConditionalGeneration.chat`]."""
        self._check_has("processor")
        answer = self.model.chat(self.processor, messages, images=images, device=self._execution_device, **kwargs)
        self.maybe_free_model_hooks()
        return answer

    def compile(self, **kwargs: Any) -> None:
        """Compile what a layer of the tower does to the latents: one graph serves all layers, and experts, alike.

        Shapes are static: another size, batch or prompt length is compiled anew, at its first step. Chosen: layers and
        not whole steps, because K experts would take K times as long, and steps would share nothing.

        Args:
            kwargs: of `torch.compile`, such as `mode="max-autotune"`.
        """
        for layer in self.model.tower.layers:
            layer.update = torch.compile(layer.update, **{"dynamic": False, "fullgraph": True, **kwargs})

    def enable_expert_offload(self, device: torch.device | str | None = None) -> None:
        """Keep one expert of the tower on the accelerator, the others on the CPU.

        The next expert is fetched layer by layer during the last step of the one before it: K transfers of an expert a
        picture, and 1 / K of the tower's weights at a time. Everything else goes to `device` and stays there.

        Args:
            device (*optional*): where it all works; the accelerator if there is one.

        Raises:
            `ValueError`: if some other off-loading is on.
        """
        if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in self.model.modules()):
            raise ValueError("another off-loading is on, and moves the same weights; load the pipeline anew.")
        device = torch.device(get_device() if device is None else device)
        self.disable_expert_offload()
        layers = self.model.tower.layers.to("cpu")
        offload = ExpertOffload(layers, device)
        # With its layers taken out, the rest of the model moves as usual.
        self.model.tower.layers = torch.nn.ModuleList()
        self.to(device)
        self.model.tower.layers = layers
        self.model.tower.expert_offload = offload

    def disable_expert_offload(self) -> None:
        """All experts to where the rest of the tower is."""
        tower = self.model.tower
        if tower.expert_offload is not None:
            tower.expert_offload.release_all()
            tower.expert_offload = None
            tower.layers.to(self.model.device)

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
        if self.vae is not None and getattr(self.vae, "_group_offload_block_modules", None) is None:
            self.vae._group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv"]
        super().enable_group_offload(onload_device, offload_device, offload_type, **kwargs)


def check_pipeline_files(folder: Path, given: Container[str] = ()) -> None:
    """Refuse a local pipeline that is not whole.

    Args:
        folder (`Path`): the pipeline's.
        given (container of `str`): names of components that need no files.

    Raises:
        `OSError`: with the path of the file that is missing or cut off.
    """
    check_files(folder, "model_index.json")
    saved = read_json(folder / "model_index.json")
    for component, names in _COMPONENT_FILES.items():
        if component not in given and saved.get(component) != [None, None]:
            check_files(folder / component, *names)


def _check_finite(result: torch.Tensor, module: torch.nn.Module) -> None:
    if not torch.isfinite(result).all():
        raise ValueError(
            f"{type(module).__name__} gave numbers that are not finite in dtype {module.dtype}: "
            "dtype=torch.float32 or torch.bfloat16 would do; if they do not, its weights are damaged."
        )


def encode_pixels(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (batch, 3, height, width) in [-1, 1] -> scaled latents: (z - shift) * scale; a variational one's mode."""
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def spatial_compression(vae: torch.nn.Module) -> int:
    """f: how many pixels make one latent pixel, along a side."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    widths = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)


def _num_prompts(prompt: str | list[str] | None, messages: list | None, context: LatteFlowContext | None) -> int:
    if context is not None:
        return len(context)
    if messages is not None:
        return len(messages) if isinstance(messages[0], (list, tuple)) else 1
    return 1 if isinstance(prompt, str) else len(prompt or [])
