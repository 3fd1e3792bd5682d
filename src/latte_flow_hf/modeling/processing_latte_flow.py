# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The processor of any backbone, as transformers has it, without videos.

What is unusual here: classes are made when they are needed. An adapter is a subclass of the backbone's own processor
class, which decides how images become tokens; without its video processor, which would need torchvision.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import math
import threading
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig, BatchFeature, PaliGemmaProcessor, PreTrainedConfig, Qwen2VLProcessor
from transformers.image_utils import SizeDict, make_flat_list_of_images
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

# `ProcessorMixin` must be visible here: diffusers looks for the known base class in the module of a component.
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available
from transformers.utils.import_utils import DummyObject, requires_backends

from ..files import component_subfolder, read_json
from .images import Background, check_background, load_rgb_image, load_rgb_images
from .processing_pixtral import PixtralProcessor


# The size of an image in a message, as in Qwen's own messages.
SIZE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# The keys of the image in a part of a message.
IMAGE_KEYS = ("image", "url", "path", "base64")

# The characters that transformers puts around control tokens in text.
CONTROL_TOKEN_MARKS = ("\U000f0000", "\U000f0001")

# Where a processor_config.json names the stock class, if its `processor_class` is ours.
STOCK_CLASS = "stock_processor_class"

# A call sets the padding of the tokenizer, which no other thread may then be using ("Already borrowed").
_TOKENIZER_LOCK = threading.Lock()


class LatteFlowProcessorMixin(ProcessorMixin):
    """What this package adds to a stock processor: conversations with images from any source, and plain text that
    cannot contain control tokens. It stands before the stock class, whose videos are left out."""

    # The stock class, and what its `__init__` takes besides the image processor, the tokenizer and the chat template.
    stock_class: type[ProcessorMixin]
    stock_settings: tuple[str, ...] = ()

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        background: Background = "white",
        sanitize_control_tokens: bool = True,
        **stock_settings: Any,
    ):
        check_background(background)
        self.background = background
        self.sanitize_control_tokens = sanitize_control_tokens
        # What the stock class has for videos is kept for the files that it is loaded from, but not used.
        self.video_processor_config = stock_settings.pop("video_processor", None)
        if tokenizer.pad_token is None:
            # Padding is masked: any token serves. (Chosen: as transformers' `generate` does.)
            if tokenizer.eos_token is None:
                raise ValueError("tokenizer has neither a pad_token nor an eos_token to pad with; set its pad_token.")
            tokenizer.pad_token = tokenizer.eos_token
        if "video_processor" in self.stock_class.get_attributes():
            stock_settings["video_processor"] = None
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template if chat_template is None else chat_template,
            **stock_settings,
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """Load the processor of any backbone, or of a pipeline.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): the folder or hub id of a backbone, a processor or a
                pipeline.
            kwargs: same as for `ProcessorMixin.from_pretrained`, and arguments of this class, such as `background`.

        Raises:
            `ValueError`: if the stock processor is not one of transformers, or has other parts than an image
                processor, a tokenizer and a video processor.
        """
        if not kwargs.get("subfolder"):
            kwargs["subfolder"] = component_subfolder(pretrained_model_name_or_path, "processor", **kwargs)
        adapter = adapter_of(stock_class_name(pretrained_model_name_or_path, **kwargs))
        return super(LatteFlowProcessorMixin, adapter).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Same as that of `ProcessorMixin`, with the settings for videos from their own file, if they have one."""
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        settings = _read_if_there(pretrained_model_name_or_path, "video_preprocessor_config.json", kwargs)
        if settings and "video_processor" in cls.stock_class.get_attributes():
            processor_dict = {"video_processor": settings, **processor_dict}
        return processor_dict, unused

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Same as `ProcessorMixin.__call__`, for text and images alone.

        Raises:
            `ValueError`: if `videos` or `audio` are given.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must not be given: {type(self).__name__} takes text and images alone.")
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any):
        names = {"chat_template", "background", "sanitize_control_tokens", "video_processor", *cls.stock_settings}
        given = {**processor_dict, **kwargs}
        return cls(*args, **{name: value for name, value in given.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """Same as that of the stock class, with the settings of this class beside them.

        `AutoProcessor` loads it as the stock class or, because a video processor needs torchvision, as this one if the
        stock class has a video processor. `latte-flow convert extract-backbone` writes files for the stock class.
        """
        stock = {name: getattr(self, name) for name in self.stock_settings if hasattr(self, name)}
        if self.video_processor_config is not None:
            stock["video_processor"] = self.video_processor_config
        stock["processor_class"] = self.stock_class.__name__
        if "video_processor" in self.stock_class.get_attributes():
            stock |= {"processor_class": LatteFlowProcessor.__name__, STOCK_CLASS: self.stock_class.__name__}
        return {**super().to_dict(), **copy.deepcopy(stock)}

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
        flat = make_flat_list_of_images(images)
        options = [image.info.get("size_options", {}) if isinstance(image, Image.Image) else {} for image in flat]
        if not any(options):
            return super()._process_images(images, **kwargs)
        processed = [self._process_image(image, given, kwargs) for image, given in zip(flat, options)]
        merged = {name: torch.cat([one[name] for one in processed]) for name in processed[0]}
        return merged, [self.replace_image_token(merged, index) for index in range(len(flat))]

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
        texts = list(_strings(messages))
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        found = sorted(token for token in special if any(token in text for text in texts))
        if found:
            raise ValueError(
                f"the text of a message contains the control tokens {found}, which cannot be encoded as text here; "
                "remove them, or set sanitize_control_tokens=False to encode them as control tokens."
            )

    def _checked_message(self, message: dict) -> dict:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message must be a dict with `role` and `content`, got {message!r}.")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not role.strip():
            raise ValueError(f"the role of a message must be a string such as 'user', got {role!r}.")
        check_text(role)
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
            source = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
        else:
            raise ValueError(f"a part of a message must be text or an image, got {part!r}.")
        _check_image_part(part)
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
        `return_assistant_tokens_mask=True`, which transformers cannot combine with it, control tokens are refused.

        Raises:
            `ValueError`: if the template refuses the conversation, or control tokens cannot be encoded as text.
        """
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
        found = []
        if kwargs.get("sanitize_control_tokens"):
            # Only where there are some: not every processor and tokenizer can encode them as text.
            found = self._added_tokens_in([conversation, kwargs])
            kwargs["sanitize_control_tokens"] = bool(found)
        try:
            # Not that of the stock class, which would only add settings for videos.
            return ProcessorMixin.apply_chat_template(self, conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        except (NotImplementedError, ValueError) as error:
            if not found:
                raise
            raise ValueError(
                f"the control tokens {found} cannot be encoded as text by {self.stock_class.__name__} ({error}); "
                "remove them from the messages."
            ) from error

    def _added_tokens_in(self, values: Any) -> list[str]:
        """The tokens in the strings of `values` that the tokenizer does not split, but for white space."""
        texts = list(_strings(values))
        added = [token for token in self.tokenizer.get_added_vocab() if not token.isspace()]
        return sorted(token for token in added if any(token in text for text in texts))

    def encode_conversations(self, conversations: list[list[dict]]) -> BatchFeature:
        """Conversations, as returned by [`~LatteFlowProcessor.conversation`], to model inputs, padded on the left.

        Each ends with the start of the assistant's turn, after which an answer or an image is generated. Without a
        chat template, as that of PaliGemma, a conversation can only be one message of the user: its text, in which an
        image is the image token of the processor.

        Raises:
            `ValueError`: if the processor or its chat template refuses a conversation.
        """
        with _TOKENIZER_LOCK:
            if self.chat_template is not None:
                inputs = self.apply_chat_template(
                    conversations,
                    tokenize=True,
                    add_generation_prompt=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"padding": True, "padding_side": "left"},
                )
            else:
                inputs = self._encode_plain_prompts(conversations)
        return inputs

    def _encode_plain_prompts(self, conversations: list[list[dict]]) -> BatchFeature:
        """Each alone, since stock PaliGemma mixes up prompts with and without images."""
        encoded = []
        for messages in conversations:
            if len(messages) != 1 or messages[0]["role"] != "user":
                raise ValueError(
                    f"{self.stock_class.__name__} has no chat template: give one message of the user, got the roles "
                    f"{[message['role'] for message in messages]}; or set processor.chat_template."
                )
            parts = messages[0]["content"]
            if self.sanitize_control_tokens:
                self._refuse_control_tokens(messages)
            text = "".join(self.image_token if part["type"] == "image" else part["text"] for part in parts)
            images = [part["image"] for part in parts if part["type"] == "image"]
            if not images and issubclass(self.stock_class, PaliGemmaProcessor):
                # The form of a prompt with images, without them, which the stock class refuses.
                text = f"{self.tokenizer.bos_token}{text}\n"
                encoded.append(self.tokenizer([text], return_token_type_ids=True))
            else:
                encoded.append(self(text=[text], images=[images] if images else None))
        # PaliGemma's `labels` are for training on suffixes.
        names = [name for name in encoded[0] if name in self.tokenizer.model_input_names or name == "token_type_ids"]
        rows = [{name: list(inputs[name][0]) for name in names} for inputs in encoded]
        inputs = self.tokenizer.pad(rows, padding=True, padding_side="left", return_tensors="pt")
        visual = [name for name in self.image_processor.model_input_names if any(name in one for one in encoded)]
        for name in visual:
            inputs[name] = torch.cat([torch.as_tensor(np.asarray(one[name])) for one in encoded if name in one])
        return BatchFeature(dict(inputs))

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


class LatteFlowProcessor(LatteFlowProcessorMixin, Qwen2VLProcessor):
    """Turns text, images and conversations into the inputs of [`LatteFlowForConditionalGeneration`].

    This class is the processor of Qwen2-VL, without videos and torchvision. For other backbones `from_pretrained`
    returns an adapter of their own processor class, with the same methods. Pipelines, models and collators also take
    stock processors and adapt them.

    Args:
        image_processor: the backbone's image processor (such as `Qwen2VLImageProcessor`).
        tokenizer: the backbone's tokenizer. Without a `pad_token` it pads with its `eos_token`.
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

    stock_class = Qwen2VLProcessor


def _restore(stock_class_name: str, state: dict[str, Any]) -> ProcessorMixin:
    adapter = adapter_of(stock_class_name)
    processor = adapter.__new__(adapter)
    processor.__dict__.update(state)
    return processor


@functools.cache
def adapter_of(stock_class_name: str) -> type[LatteFlowProcessorMixin]:
    """The subclass of a processor class of transformers with the methods of [`LatteFlowProcessor`].

    Raises:
        `ValueError`: if there is no such class, or it has other parts than an image processor, a tokenizer and a
            video processor.
        `ImportError`: if a package that it needs is missing.
    """
    if stock_class_name == Qwen2VLProcessor.__name__:
        return LatteFlowProcessor
    stock_class: Any = getattr(transformers, stock_class_name, None)
    if stock_class_name == PixtralProcessor.__name__ and not is_torchvision_available():
        stock_class = PixtralProcessor
    if isinstance(stock_class, DummyObject):
        requires_backends(stock_class, stock_class._backends)
    if ProcessorMixin not in getattr(stock_class, "__mro__", ()):
        raise ValueError(
            f"processor class {stock_class_name!r} is not one of transformers {transformers.__version__}; processors "
            "that are code of a checkpoint are not supported."
        )
    parts = stock_class.get_attributes()
    if set(parts) - {"video_processor"} != {"image_processor", "tokenizer"}:
        raise ValueError(
            f"processor class {stock_class_name} consists of {parts}, but the processor of a backbone must consist of "
            "an image_processor and a tokenizer, and may have a video_processor."
        )
    parameters = inspect.signature(stock_class.__init__).parameters.values()
    return type(
        LatteFlowProcessor.__name__,
        (LatteFlowProcessorMixin, stock_class),
        {
            "__module__": __name__,
            "__doc__": f"The adapter of `{stock_class_name}`, see [`LatteFlowProcessor`].",
            # The class has no name by which `pickle` could find it.
            "__reduce__": lambda self: (_restore, (stock_class_name, self.__dict__)),
            "stock_class": stock_class,
            "stock_settings": tuple(
                parameter.name
                for parameter in parameters
                if parameter.kind is not parameter.VAR_KEYWORD
                and parameter.name not in ("self", "chat_template", *parts)
            ),
        },
    )


def adapt(processor: ProcessorMixin) -> LatteFlowProcessorMixin:
    """A stock processor with the methods of [`LatteFlowProcessor`], made of the same parts; one that has them already
    is returned as it is.

    Raises:
        `ValueError`: as `adapter_of`.
    """
    # Not `isinstance`: a checkpoint that carries its code defines our classes a second time.
    if hasattr(processor, "encode_conversations"):
        return processor
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            "processor must be the processor of the backbone, as AutoProcessor loads it, got "
            f"{type(processor).__name__}."
        )
    adapter = adapter_of(type(processor).__name__)
    settings = {name: getattr(processor, name) for name in adapter.stock_settings if hasattr(processor, name)}
    if getattr(processor, "video_processor", None) is not None:
        settings["video_processor"] = processor.video_processor.to_dict()
    return adapter(processor.image_processor, processor.tokenizer, processor.chat_template, **settings)


def check_processor(processor: Any, config: PreTrainedConfig, vocab_size: int) -> None:
    """Refuse the processor of another backbone.

    Args:
        processor ([`LatteFlowProcessor`]): the processor.
        config (`PreTrainedConfig`): the configuration of the backbone.
        vocab_size (`int`): the number of tokens that the backbone embeds.

    Raises:
        `ValueError`: naming what differs: the image token, the number of tokens, or the size of images or patches.
    """
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    vision_config = getattr(config, "vision_config", None)
    differences = []
    if len(tokenizer) > vocab_size:
        differences.append(f"the tokenizer has {len(tokenizer)} tokens, the model embeds {vocab_size}")
    image_token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    owners = [owner for owner in (processor, tokenizer) if getattr(owner, "image_token_id", None) is not None]
    known = {int(owner.image_token_id) for owner in owners}
    # The tokens that Janus and Ovis2 put for an image are no attribute of their processors.
    names = [name for name in (getattr(processor, "image_token", None), "<IMG_ATOM>") if name is not None]
    known |= {tokenizer.convert_tokens_to_ids(name) for name in names} - {tokenizer.unk_token_id, None}
    if image_token_id is not None and image_token_id not in known:
        differences.append(f"the processor's image token is one of {sorted(known)}, the model's is {image_token_id}")
    for owner, name, other, other_name in (
        (image_processor, "patch_size", vision_config, "patch_size"),
        (image_processor, "temporal_patch_size", vision_config, "temporal_patch_size"),
        (image_processor, "merge_size", vision_config, "spatial_merge_size"),
        (processor, "patch_size", vision_config, "patch_size"),
        (processor, "spatial_merge_size", config, "spatial_merge_size"),
    ):
        found, expected = _side(getattr(owner, name, None)), _side(getattr(other, other_name, None))
        if None not in (found, expected) and found != expected:
            differences.append(f"{name} of {type(owner).__name__} is {found}, {other_name} of the model is {expected}")
    # Of the parts of an image, where it is split; after cropping; after resizing to a square.
    sizes = (("max_image_size", "longest_edge"), ("crop_size", "height"), ("size", "height"))
    sides = [_side(getattr(image_processor, name, None), key) for name, key in sizes]
    found = next((side for side in sides if side is not None), None)
    expected = _side(getattr(vision_config, "image_size", None))
    if None not in (found, expected) and found != expected:
        differences.append(f"images of the processor have {found} pixels a side, those of the model {expected}")
    if differences:
        raise ValueError(
            f"processor ({processor.stock_class.__name__}) is not the processor of this {config.model_type} model: "
            f"{'; '.join(differences)}. Use the processor of the backbone."
        )


def _side(size: Any, key: str = "height") -> int | None:
    """A size that is given as a number, a pair, or a dict with `key`; `None` if the dict has no such key."""
    if isinstance(size, (list, tuple)):
        return size[0]
    if isinstance(size, (dict, SizeDict)):
        return size.get(key)
    return size


def stock_class_name(source: Any, **kwargs: Any) -> str:
    """The name of the processor class that a checkpoint names, or else that of its model, or else that of Qwen2-VL.

    Args:
        source (`str` or `Path`): folder or hub id.
        kwargs: arguments of `from_pretrained`; those for the hub and `subfolder` are used.
    """
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = _read_if_there(source, file, kwargs)
        name = content.get(STOCK_CLASS) or content.get("processor_class")
        if name is not None:
            return LatteFlowProcessor.stock_class.__name__ if name == LatteFlowProcessor.__name__ else name
    model_type = None
    with contextlib.suppress(OSError):  # There may be no model beside the processor.
        model_type = AutoConfig.from_pretrained(source, **_hub_arguments(kwargs)).model_type
    return PROCESSOR_MAPPING_NAMES.get(model_type) or LatteFlowProcessor.stock_class.__name__


def _read_if_there(source: Any, file: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    path = cached_file(
        str(source),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_hub_arguments(kwargs),
    )
    return {} if path is None else read_json(Path(path))


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _strings(values: Any) -> Iterator[str]:
    """All strings in nested lists and dicts."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _strings(value)


def check_text(text: str) -> None:
    """
    Raises:
        `ValueError`: if `text` contains half of a surrogate pair, which no tokenizer can encode, or a character that
            transformers marks control tokens with, which would hide an image token behind it.
    """
    marks = [f"U+{ord(mark):X}" for mark in CONTROL_TOKEN_MARKS if mark in text]
    if marks:
        raise ValueError(f"text {text[:60]!r} contains {', '.join(marks)}, a private character; remove it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {text[:60]!r} contains half of a surrogate pair at position {error.start}, which is no character; "
            "remove it."
        ) from error


def _check_image_part(part: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: if a part has several images, or a misspelt size, which would have no effect. Other keys are
            ignored, same as in transformers: datasets have some of their own.
    """
    keys = [key for key, value in part.items() if value is not None]
    images = [key for key in keys if key in IMAGE_KEYS]
    if len(images) > 1:
        raise ValueError(f"a part of a message must have one image, got {images}; use a part for each.")
    for key in keys:
        nearest = difflib.get_close_matches(key, SIZE_OPTIONS, n=1, cutoff=0.8)
        if nearest and key not in SIZE_OPTIONS:
            raise ValueError(f"a part of a message has the unknown size {key!r}; did you mean {nearest[0]!r}?")


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
