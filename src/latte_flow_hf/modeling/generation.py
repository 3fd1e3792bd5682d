# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Text and images by transformers' own contract: `generate` with a mode, and conversations."""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.utils import can_return_tuple

from ..files import component_subfolder
from .configuration_latte_flow import LatteFlowConfig
from .context import warn_of_long_prompts, warn_of_unknown_words
from .processing_latte_flow import adapt, check_processor


# What the processors of transformers return for text and images.
PROCESSOR_OUTPUTS = (
    *("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "pixel_values", "pixel_attention_mask"),
    *("image_grid_thw", "image_sizes", "batch_num_images"),
)


class FiniteLogits(LogitsProcessor):
    """Passes logits through unchanged.

    Raises:
        `ValueError`: when called, if the largest logit of a row is not finite. An answer would then be empty.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # The largest of a row, since logits of forbidden tokens are -inf. NaN counts as the largest.
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise ValueError(
                f"the backbone's logits are not finite in dtype {scores.dtype}. Use dtype=torch.float32 or "
                "torch.bfloat16; if that does not help, the weights are damaged."
            )
        return scores


class LatteFlowGenerationMixin:
    """`generate` and `chat` of [`LatteFlowForConditionalGeneration`]."""

    config: LatteFlowConfig
    generation_config: GenerationConfig
    vlm: Any
    device: Any
    name_or_path: str
    pipeline_class: Any
    encode_context: Any
    _hf_peft_config_loaded: bool

    @property
    def trained_words(self) -> list[str] | None:
        """The words that the model knows, if it is one of a small world. An adapter may have taught it others."""
        return None if self._hf_peft_config_loaded else self.config.trained_words

    @can_return_tuple
    def get_image_features(self, *args: Any, **kwargs: Any):
        return self.vlm.get_image_features(*args, **kwargs)

    @apply_forward_hook
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generation_mode: str = "text",
        **kwargs: Any,
    ):
        """Text, as the backbone's own `generate`: same arguments, same tokens. Or images.

        Args:
            inputs (`torch.Tensor`, *optional*): (batch, length), another name of `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                What it leaves open is taken from the checkpoint's. Arguments come before both.
            generation_mode (`str`, defaults to `"text"`):
                `"image"` generates images with the other components of the pipeline that the model was loaded from.
            kwargs: the processor's output, and arguments of the backbone's `generate`, or, with `"image"`, of
                [`LatteFlowPipeline`], such as `guidance_scale`. Arguments that are for text alone then have no effect.

        Returns:
            Tokens, or images (batch, 3, height, width) with values from 0 to 1; see
            [`~LatteFlowProcessor.post_process_multimodal_output`].

        Raises:
            `ValueError`: if there is no such mode, the model was loaded without a pipeline, or `generation_config` is
                no `GenerationConfig`.
        """
        if generation_mode == "image":
            return self._generate_images(inputs, **kwargs)
        if generation_mode != "text":
            raise ValueError(f"generation_mode must be 'text' or 'image', got {generation_mode!r}.")
        check_generation_config(generation_config)
        # transformers checks for the types of Python.
        kwargs = {name: value.item() if isinstance(value, np.generic) else value for name, value in kwargs.items()}
        # As in `GenerationMixin`. Merged here, because the backbone has another generation config than the model.
        merged = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if generation_config is not None:
            merged.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        kwargs = merged.update(**kwargs)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None:
            warn_of_long_prompts(input_ids, kwargs.get("mm_token_type_ids"), self.config.text_config)
        return self.vlm.generate(inputs, generation_config=merged, **kwargs)

    def _generate_images(self, inputs: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        if getattr(self, "_image_pipeline", None) is None:
            checkpoint = self.name_or_path
            if not component_subfolder(checkpoint, "model"):
                checkpoint = str(Path(checkpoint).parent)
            if not checkpoint or self.pipeline_class is None or not component_subfolder(checkpoint, "model"):
                raise ValueError(
                    "generation_mode='image' needs the other components of a pipeline: load the model from the folder "
                    f"of a pipeline, or use LatteFlowPipeline; this one was loaded from {self.name_or_path!r}."
                )
            self._image_pipeline = self.pipeline_class.from_pretrained(checkpoint, model=self)
            self._image_pipeline.set_progress_bar_config(disable=True)
        encoded = {name: kwargs.pop(name) for name in PROCESSOR_OUTPUTS if name in kwargs}
        if inputs is not None:
            encoded["input_ids"] = inputs
        num_images = kwargs.pop("num_return_sequences", None)
        if num_images is not None:
            kwargs["num_images_per_prompt"] = num_images
        arguments = inspect.signature(self.pipeline_class.__call__).parameters
        only_text = {*vars(GenerationConfig()), "tokenizer", "streamer", "logits_processor", "stopping_criteria"}
        kwargs = {name: value for name, value in kwargs.items() if name in arguments or name not in only_text}
        return self._image_pipeline(context=self.encode_context(**encoded), output_type="pt", **kwargs).images

    def chat(
        self,
        processor: Any,
        messages: str | list[dict],
        images: Any = None,
        streamer: Any = None,
        device: torch.device | None = None,
        generation_config: GenerationConfig | None = None,
        **generate_kwargs: Any,
    ) -> str:
        """Answer a question or continue a conversation.

        The length of the answer is that of `generate_kwargs`, else of `generation_config`, else of the checkpoint's
        generation config, else at most 256 tokens.

        Args:
            processor (`ProcessorMixin`): the processor of the model: a [`LatteFlowProcessor`] or the backbone's own.
            messages (`str` or `list[dict]`): a question, or a conversation in the chat-template form.
            images (*optional*): an image or a list of them that precede the question, only with a string; see
                [`load_rgb_image`].
            streamer (*optional*): a transformers streamer that receives the tokens while they are generated.
            device (`torch.device`, *optional*): where the model runs, if that differs from `model.device` because of
                off-loading.
            generation_config (`GenerationConfig`, *optional*): as for `generate`.
            generate_kwargs: arguments of `generate`.

        Returns:
            `str`: the answer.

        Raises:
            `ValueError`: if `messages` is empty, an image cannot be read, several answers or an image are asked for,
                `generation_config` is no `GenerationConfig`, the processor is that of another backbone, or the
                backbone's logits are not finite.
        """
        mode = generate_kwargs.pop("generation_mode", "text")
        if mode != "text":
            raise ValueError(f"generation_mode must be 'text' in chat, got {mode!r}; use generate for images.")
        check_generation_config(generation_config)
        levels = [generate_kwargs]
        levels += [config.to_dict() for config in (generation_config, self.generation_config) if config is not None]
        num_answers = next((level["num_return_sequences"] for level in levels if level.get("num_return_sequences")), 1)
        if num_answers != 1:
            raise ValueError(f"num_return_sequences must be 1 in chat, got {num_answers}; use generate instead.")
        generate_kwargs |= {name: None if value is None else int(value) for name, value in _length(levels).items()}
        processor = adapt(processor)
        check_processor(processor, self.config.vlm_config, self.vlm.get_input_embeddings().num_embeddings)
        conversation = processor.conversation(messages, images)
        warn_of_unknown_words([conversation], self.trained_words)
        inputs = processor.encode_conversations([conversation]).to(self.device if device is None else device)
        generate_kwargs["logits_processor"] = LogitsProcessorList(
            [*(generate_kwargs.get("logits_processor") or []), FiniteLogits()]
        )
        output = self.generate(**inputs, streamer=streamer, generation_config=generation_config, **generate_kwargs)
        tokens = getattr(output, "sequences", output)  # with `return_dict_in_generate`
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def check_generation_config(generation_config: Any) -> None:
    """
    Raises:
        `ValueError`: if it is neither a `GenerationConfig` nor `None`.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"generation_config must be a GenerationConfig, got {generation_config!r}; arguments take single values."
        )


def _length(levels: list[dict[str, Any]]) -> dict[str, Any]:
    """The limit of the length of an answer, as the first of `levels` that has one gives it."""
    for level in levels:
        limits = {name: level.get(name) for name in ("max_new_tokens", "max_length")}
        if any(limit is not None for limit in limits.values()):
            return limits
    # Chosen: as transformers' pipelines do.
    return {"max_new_tokens": 256}
