# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The backbone's image processor, tokenizer and chat template as one processor.

What is unusual here: there is no video processor. `Qwen2VLProcessor` has one, and so fails without torchvision.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import load_image

# `ProcessorMixin` must be visible here: diffusers looks for the known base class in the module of a component.
from transformers.processing_utils import ProcessorMixin


# A call sets the padding of the tokenizer, which no other thread may then be using ("Already borrowed").
_TOKENIZER_LOCK = threading.Lock()


class LatteFlowProcessor(ProcessorMixin):
    """Turns text, images and conversations into the inputs of [`LatteFlowForConditionalGeneration`].

    Args:
        image_processor: the backbone's image processor (such as `Qwen2VLImageProcessor`).
        tokenizer: the backbone's tokenizer.
        chat_template (`str`, *optional*): the backbone's chat template; the tokenizer's own if not given.
    """

    return_mm_token_type_ids = True

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if chat_template is None:
            chat_template = tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholder tokens of one image, one for each merged patch."""
        num_patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (num_patches // self.image_processor.merge_size**2)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    def conversation(self, messages: str | list[dict], images: Any = None) -> list[dict]:
        """A conversation in the chat-template form, with its images loaded.

        Args:
            messages (`str` or `list[dict]`): the words of the user, or a conversation in the chat-template form.
            images (*optional*): an image or a list of them that precede the words; only with a string. An image is a
                PIL image, an array or tensor of uint8 (height, width, 3), a path or a URL.

        Raises:
            `ValueError`: if `messages` is empty or has another form, is a conversation and `images` are given, or an
                image cannot be read.
        """
        if isinstance(messages, str):
            images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
            content = [{"type": "image", "image": image} for image in images]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": messages}]}]
        elif images is not None:
            raise ValueError("images can only be given with a string; put them into the content of the messages.")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"messages must be a string or a non-empty list of messages, got {messages!r}.")
        return [self._checked_message(message) for message in messages]

    def _checked_message(self, message: dict) -> dict:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message must be a dict with `role` and `content`, got {message!r}.")
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
            raise ValueError(f"the content of a message must be a string or a list of parts, got {content!r}.")
        return {**message, "content": [self._checked_part(part) for part in content]}

    @staticmethod
    def _checked_part(part: dict) -> dict:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
        if part.get("type") == "image":
            source = next((part[key] for key in ("image", "url", "path", "base64") if key in part), None)
            return {"type": "image", "image": load_rgb_image(source)}
        raise ValueError(f"a part of a message must be text or an image, got {part!r}.")

    def encode_conversations(self, conversations: list[list[dict]]) -> BatchFeature:
        """Conversations, as returned by [`~LatteFlowProcessor.conversation`], to model inputs, padded on the left.

        Each ends with the start of the assistant's turn, after which an answer or an image is generated.
        """
        with _TOKENIZER_LOCK:
            return self.apply_chat_template(
                conversations,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )


def load_rgb_image(source: Any) -> Image.Image:
    """Load an image as an RGB PIL image.

    Args:
        source: a PIL image, an array or tensor of uint8 (height, width, 3), a path or a URL.

    Raises:
        `ValueError`: if `source` is something else, or a file that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, (str, Path)):
        try:
            return load_image(str(source)).convert("RGB")
        except (OSError, ValueError) as error:
            raise ValueError(f"image {str(source)!r} cannot be read: {error}") from error
    shape, dtype = tuple(getattr(source, "shape", ())), str(getattr(source, "dtype", "")).removeprefix("torch.")
    if len(shape) == 3 and shape[2] == 3 and 0 not in shape and dtype == "uint8":
        return Image.fromarray(np.asarray(source))
    raise ValueError(
        "an image must be a PIL image, a path, a URL, or uint8 of shape (height, width, 3), got "
        f"{type(source).__name__}" + (f" of {dtype}, {shape}." if dtype else ".")
    )
