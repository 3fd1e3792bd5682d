# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The backbone's image processor, tokenizer and chat template as one processor.

What is unusual here: there is no video processor. `Qwen2VLProcessor` has one, and so fails without torchvision.
"""

import math
import threading
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

# `ProcessorMixin` must be visible here: diffusers looks for the known base class in the module of a component.
from transformers.processing_utils import ProcessorMixin

from ..files import component_subfolder
from .images import Background, check_background, load_rgb_image, load_rgb_images


# The size of an image in a message, as in Qwen's own messages.
SIZE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")


# A call sets the padding of the tokenizer, which no other thread may then be using ("Already borrowed").
_TOKENIZER_LOCK = threading.Lock()


class LatteFlowProcessor(ProcessorMixin):
    """Turns text, images and conversations into the inputs of [`LatteFlowForConditionalGeneration`].

    Args:
        image_processor: the backbone's image processor (such as `Qwen2VLImageProcessor`).
        tokenizer: the backbone's tokenizer.
        chat_template (`str`, *optional*): the backbone's chat template; the tokenizer's own if not given.
        background (`str` or `tuple[int, int, int]`, defaults to `"white"`):
            The colour behind transparent images: a name or RGB from 0 to 255.
        sanitize_control_tokens (`bool`, defaults to `True`):
            Whether control tokens in the text of messages and prompts, such as `<|im_end|>`, are encoded as plain
            text. `False` encodes them as control tokens. (Chosen: because a prompt or caption could otherwise start a
            turn of its own, or contain an image token without an image.)

    Raises:
        `ValueError`: if `background` is no colour.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        background: Background = "white",
        sanitize_control_tokens: bool = True,
    ):
        check_background(background)
        self.background = background
        self.sanitize_control_tokens = sanitize_control_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if chat_template is None:
            chat_template = tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """Same as `ProcessorMixin.from_pretrained`, and the folder or hub id may be that of a whole pipeline."""
        if not kwargs.get("subfolder"):
            kwargs["subfolder"] = component_subfolder(pretrained_model_name_or_path, "processor", **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Same as `ProcessorMixin.__call__`, for text and images alone.

        Raises:
            `ValueError`: if `videos` or `audio` are given.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must not be given: {type(self).__name__} takes text and images alone.")
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholder tokens of one image, one for each merged patch."""
        num_patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (num_patches // self.image_processor.merge_size**2)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    def prepare_inputs_layout(self, images: Any = None, **kwargs: Any):
        """Same as `ProcessorMixin.prepare_inputs_layout`, but images are loaded by [`load_rgb_image`]."""

        def load(nested: Any) -> Any:
            if nested is None or isinstance(nested, (list, tuple)):
                return nested and [load(item) for item in nested]
            loaded = load_rgb_images(nested, self.background)
            return loaded if getattr(nested, "ndim", None) == 4 else loaded[0]

        return super().prepare_inputs_layout(images=load(images), **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """Same as `ProcessorMixin._process_images`, but images with `SIZE_OPTIONS` are processed one by one."""
        images = make_flat_list_of_images(images)
        options = [image.info.get("size_options", {}) if isinstance(image, Image.Image) else {} for image in images]
        if not any(options):
            return super()._process_images(images, **kwargs)
        processed = [self._process_image(image, given, kwargs) for image, given in zip(images, options)]
        merged = {name: torch.cat([one[name] for one in processed]) for name in processed[0]}
        return merged, [self.replace_image_token(merged, index) for index in range(len(images))]

    def _process_image(self, image: Image.Image, options: dict[str, int], kwargs: dict) -> BatchFeature:
        processor = self.image_processor
        kwargs = {**kwargs, "return_tensors": "pt"}
        if "resized_height" in options:
            factor = processor.patch_size * processor.merge_size
            height, width = (max(1, round(options[name] / factor)) * factor for name in SIZE_OPTIONS[2:])
            return processor(image.resize((width, height), processor.resample), **{**kwargs, "do_resize": False})
        if options:
            limits = dict(processor.size)
            shortest = options.get("min_pixels", min(limits["shortest_edge"], options.get("max_pixels", math.inf)))
            longest = options.get("max_pixels", max(limits["longest_edge"], shortest))
            kwargs["size"] = {"shortest_edge": shortest, "longest_edge": longest}
        return processor(image, **kwargs)

    def conversation(self, messages: str | list[dict], images: Any = None) -> list[dict]:
        """A conversation in the chat-template form, with its images loaded.

        A part of a message is `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}` (`url`, `path` and
        `base64` are other names of the key, and `{"type": "image_url", "image_url": {"url": ...}}` another form). The
        size of an image can be given beside it: `min_pixels` and `max_pixels`, or `resized_height` and
        `resized_width`, which are rounded to multiples of the size of a merged patch.

        Args:
            messages (`str` or `list[dict]`): the words of the user, or a conversation in the chat-template form.
            images (*optional*): an image or a list of them that precede the words; only with a string. See
                [`load_rgb_image`] for what an image may be.

        Raises:
            `ValueError`: if `messages` is empty or has another form, is a conversation and `images` are given, or an
                image cannot be read.
        """
        if isinstance(messages, str):
            content = [{"type": "image", "image": image} for image in load_rgb_images(images, self.background)]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": messages}]}]
        elif images is not None:
            raise ValueError("images can only be given with a string; put them into the content of the messages.")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"messages must be a string or a non-empty list of messages, got {messages!r}.")
        return [self._checked_message(message) for message in messages]

    def training_conversation(self, messages: list[dict]) -> list[dict]:
        """Same as [`~LatteFlowProcessor.conversation`], but with `sanitize_control_tokens` it refuses control
        tokens in text: transformers cannot encode them as text and mark the tokens of the assistant.

        Raises:
            `ValueError`: with the control tokens, and for the reasons of `conversation`.
        """
        checked = self.conversation(messages)
        self._refuse_control_tokens(checked)
        return checked

    def _refuse_control_tokens(self, messages: list[dict]) -> None:
        if not self.sanitize_control_tokens:
            return
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            found = sorted({token for token in self.tokenizer.all_special_tokens for part in parts if token in part})
            if found:
                raise ValueError(
                    f"the text of a message to train on contains the control tokens {found}; remove them, or set "
                    "sanitize_control_tokens=False to train on them as control tokens."
                )

    def _checked_message(self, message: dict) -> dict:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message must be a dict with `role` and `content`, got {message!r}.")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not role.strip():
            raise ValueError(f"the role of a message must be a string such as 'user', got {role!r}.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
            raise ValueError(f"the content of a message must be a string or a list of parts, got {content!r}.")
        return {**message, "content": [self._checked_part(part) for part in content]}

    def _checked_part(self, part: dict) -> dict:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            check_text(part["text"])
            return part
        if part.get("type") == "image_url":
            url = part.get("image_url")
            source = url.get("url") if isinstance(url, dict) else url
        elif part.get("type") == "image":
            source = next((part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None), None)
        else:
            raise ValueError(f"a part of a message must be text or an image, got {part!r}.")
        image = load_rgb_image(source, self.background)
        options = {name: part[name] for name in SIZE_OPTIONS if part.get(name) is not None}
        if options:
            check_size_options(options)
            options = {name: int(value) for name, value in options.items()}
            if not hasattr(self.image_processor, "merge_size"):
                raise ValueError(
                    f"{', '.join(options)} of an image need an image processor like Qwen2-VL's, not "
                    f"{type(self.image_processor).__name__}; leave them out."
                )
            # `info` goes with the image through transformers' own functions, up to `_process_images`.
            image.info["size_options"] = options
        return {"type": "image", "image": image, **options}

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Same as `ProcessorMixin.apply_chat_template`, but parts of messages are those of
        [`~LatteFlowProcessor.conversation`], and `sanitize_control_tokens` defaults to that of the processor. With
        `return_assistant_tokens_mask=True`, which transformers cannot combine with it, control tokens are refused."""
        if kwargs.get("tokenize"):

            def checked(message: Any) -> Any:
                has_parts = isinstance(message, dict) and isinstance(message.get("content"), (list, tuple))
                return self._checked_message(message) if has_parts else message

            is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
            batch = [
                [checked(message) for message in messages]
                for messages in (conversation if is_batch else [conversation])
            ]
            conversation = batch if is_batch else batch[0]
            if kwargs.get("return_assistant_tokens_mask"):
                for messages in batch:
                    self._refuse_control_tokens(messages)
            else:
                kwargs.setdefault("sanitize_control_tokens", self.sanitize_control_tokens)
        return super().apply_chat_template(conversation, chat_template, **kwargs)

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

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Same as `ProcessorMixin.post_process_multimodal_output`, with the mode `"image"` too.

        Args:
            generated_outputs: the output of `model.generate`: tokens, or images (batch, 3, height, width) from 0 to 1.
            skip_special_tokens (`bool`, defaults to `True`): whether to leave out control tokens of text.
            generation_mode (`str`, *optional*): `"text"` (the default) or `"image"`.

        Returns:
            `list[str]` or `list[PIL.Image.Image]`.
        """
        if generation_mode == "image":
            return load_rgb_images(generated_outputs)
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )


def check_text(text: str) -> None:
    """
    Raises:
        `ValueError`: if `text` contains half of a surrogate pair, which no tokenizer can encode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {text[:60]!r} contains half of a surrogate pair at position {error.start}, which is no character; "
            "remove it."
        ) from error


def check_size_options(options: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: if one of `SIZE_OPTIONS` is not a positive integer, or they do not go together.
    """
    for name, value in options.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} of an image must be a positive integer, got {value!r}.")
    if options.get("min_pixels", 0) > options.get("max_pixels", math.inf):
        raise ValueError(
            f"min_pixels of an image must not exceed its max_pixels, got {options['min_pixels']} and "
            f"{options['max_pixels']}."
        )
    if not options.keys() <= {"min_pixels", "max_pixels"} and options.keys() != {"resized_height", "resized_width"}:
        raise ValueError(
            "the size of an image is given by min_pixels and max_pixels, or by both resized_height and resized_width, "
            f"got {options}."
        )
