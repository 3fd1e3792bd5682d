# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The encoded prompt: what one prefill of the frozen backbone leaves for the generation tower.

Shapes: P prompts, G key-value heads, T prompt tokens, d head size.
"""

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .backbone import check_positions, max_positions
from .signatures import takes_argument


logger = logging.get_logger(__name__)

# Model types whose first position is 1.
COUNT_FROM_ONE = ("paligemma",)


@dataclass
class LatteFlowContext:
    """The keys and values of the prompts in every decoder layer, from one prefill; reused at every sampling step.

    P prompts can serve m * P images: the first m images belong to the first prompt, and so on. The keys and values
    are not copied for that.

    Args:
        keys, values (`tuple[torch.Tensor, ...]`): per decoder layer (P, G, T, d); keys carry their rotary position.
        attention_mask (`torch.Tensor`): (P, T), bool, `False` at padding.
        next_position (`torch.Tensor`): (P,), the first rotary position after the prompt.
        has_padding (`bool`): whether any element of the mask is `False`. Stored, so that no step has to synchronize
            with the device to find out.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    attention_mask: torch.Tensor
    next_position: torch.Tensor
    has_padding: bool

    def __len__(self) -> int:
        return self.next_position.shape[0]

    def select(self, index: torch.Tensor) -> "LatteFlowContext":
        """The prompts at `index` (int64, shape (n,)), in that order; an index may occur several times."""
        return LatteFlowContext(
            tuple(keys.index_select(0, index) for keys in self.keys),
            tuple(values.index_select(0, index) for values in self.values),
            self.attention_mask.index_select(0, index),
            self.next_position.index_select(0, index),
            self.has_padding,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LatteFlowContext":
        """The same prompts on another device. accelerate's data loaders move batches with this method."""
        return LatteFlowContext(
            tuple(keys.to(device, non_blocking=non_blocking) for keys in self.keys),
            tuple(values.to(device, non_blocking=non_blocking) for values in self.values),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.next_position.to(device, non_blocking=non_blocking),
            self.has_padding,
        )

    def of_layers(self, layers: Collection[int]) -> "LatteFlowContext":
        """What an expert reads whose layers stand beside these decoder layers, `config.context_layers(expert)`.

        The keys and values of all other layers keep their place in the tuples and have no elements: (P, G, T, 0).
        """

        def keep(states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(
                layer if index in layers else layer.new_empty((*layer.shape[:3], 0))
                for index, layer in enumerate(states)
            )

        return LatteFlowContext(
            keep(self.keys), keep(self.values), self.attention_mask, self.next_position, self.has_padding
        )

    def split(self) -> list["LatteFlowContext"]:
        """Each prompt as a context of its own, without its left padding. The inverse of `cat`."""
        contexts = []
        for row, length in enumerate(self.attention_mask.sum(dim=1).tolist()):
            tokens = slice(self.attention_mask.shape[1] - length, None)
            contexts.append(
                LatteFlowContext(
                    tuple(keys[row : row + 1, :, tokens] for keys in self.keys),
                    tuple(values[row : row + 1, :, tokens] for values in self.values),
                    self.attention_mask[row : row + 1, tokens],
                    self.next_position[row : row + 1],
                    has_padding=False,
                )
            )
        return contexts

    @classmethod
    def cat(cls, contexts: Sequence["LatteFlowContext"]) -> "LatteFlowContext":
        """The prompts of several contexts in one batch, padded on the left to the longest."""
        length = max(context.attention_mask.shape[1] for context in contexts)

        def pad_left(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            shape = list(tensor.shape)
            shape[dim] = length - shape[dim]
            return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor

        def cat_layers(name: str) -> tuple[torch.Tensor, ...]:
            layers = zip(*(getattr(context, name) for context in contexts))
            return tuple(torch.cat([pad_left(states, 2) for states in layer]) for layer in layers)

        return cls(
            cat_layers("keys"),
            cat_layers("values"),
            torch.cat([pad_left(context.attention_mask, 1) for context in contexts]),
            torch.cat([context.next_position for context in contexts]),
            any(context.has_padding or context.attention_mask.shape[1] < length for context in contexts),
        )


def check_prompts(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """
    Raises:
        `ValueError`: if `input_ids` are not the tokens of prompts (P, T), or `attention_mask` has another shape.
    """
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        found = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be the tokens of the prompts, (batch, length), got {found}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )


def check_tokens(vlm: PreTrainedModel, input_ids: torch.Tensor, has_images: bool) -> None:
    """
    Raises:
        `ValueError`: if `input_ids` are tokens of another backbone: one that it does not embed, or images without
            an image token.
    """
    num_tokens = vlm.get_input_embeddings().num_embeddings
    largest = int(input_ids.max())
    if largest >= num_tokens:
        raise ValueError(
            f"input_ids contain the token {largest}, but the backbone embeds {num_tokens}: use its own processor."
        )
    image_token_id = getattr(vlm.config, "image_token_id", None)
    if has_images and image_token_id is not None and not bool((input_ids == image_token_id).any()):
        raise ValueError(
            f"input_ids contain no image token of the backbone, {image_token_id}, but pixel_values are given: use its "
            "own processor."
        )


def warn_of_long_prompts(
    input_ids: torch.Tensor, mm_token_type_ids: torch.Tensor | None, text_config: PreTrainedConfig
) -> None:
    """Warn once if a prompt (P, T) has more tokens of text than the backbone has positions.

    Tokens of images are not counted: there are more of them than they take positions.
    """
    max_positions = getattr(text_config, "max_position_embeddings", None)
    num_tokens = input_ids.shape[-1]
    if max_positions is not None and num_tokens > max_positions and mm_token_type_ids is not None:
        num_tokens = int((mm_token_type_ids == 0).sum(dim=-1).max())
    if max_positions is not None and num_tokens > max_positions:
        logger.warning_once(
            f"A prompt has more tokens than the {max_positions} positions that the backbone was trained on "
            "(max_position_embeddings): answers and images will not follow it. Use a shorter prompt."
        )


def warn_of_unknown_words(conversations: list[list[dict]], trained_words: Collection[str] | None) -> None:
    """Warn once of words that a model of a small world never learned; `None` as its words is no small world."""
    texts = [part.get("text", "") for messages in conversations for message in messages for part in message["content"]]
    unknown = unknown_words(texts, trained_words)
    if unknown:
        assert trained_words is not None
        _warn_once(
            f"The model never learned the words {unknown}: expect a wrong answer or image. It knows "
            f"{', '.join(sorted(trained_words))}."
        )


@functools.lru_cache(256)
def _warn_once(message: str) -> None:
    """`logger.warning_once` keeps every message for ever, and these are made of the words of users."""
    logger.warning(message)


def unknown_words(texts: list[str], trained_words: Collection[str] | None) -> list[str]:
    """The words of `texts` that a model of a small world never learned; none if `trained_words` is `None`."""
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.lower()))
    return [] if trained_words is None else [word for word in words if word not in trained_words]


def prefill_context(
    vlm: PreTrainedModel,
    has_mrope: bool,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
    num_layers: int | None = None,
    **vision_inputs: torch.Tensor | None,
) -> LatteFlowContext:
    """Run the backbone once over the prompts and keep its cache.

    `vlm` is the backbone, and `has_mrope` tells whether its positions have three axes. Other arguments and errors are
    those of [`~LatteFlowForConditionalGeneration.encode_context`].
    """
    check_prompts(input_ids, attention_mask)
    check_tokens(vlm, input_ids, has_images=vision_inputs.get("pixel_values") is not None)
    warn_of_long_prompts(input_ids, mm_token_type_ids, vlm.config.get_text_config(decoder=True))
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    has_grids = vision_inputs.get("image_grid_thw") is not None
    if has_grids and mm_token_type_ids is None:
        raise ValueError("mm_token_type_ids must be given with images, as the processor returns it; got None.")
    # Of Gemma 3 and PaliGemma: which tokens attend to each other in both directions.
    has_token_types = takes_argument(type(vlm).forward, "token_type_ids")
    given = [name for name in ("pixel_values", "token_type_ids") if vision_inputs.get(name) is not None]
    if has_token_types and given == ["pixel_values"]:
        raise ValueError("token_type_ids must be given with images, as the processor returns it; got None.")
    # A context is a cache without logits, whatever a training loop asks of the same call.
    for name in ("use_cache", "logits_to_keep"):
        vision_inputs.pop(name, None)
    for name in ("inputs_embeds", "position_ids", "past_key_values"):
        if vision_inputs.pop(name, None) is not None:
            raise ValueError(f"{name} must not be given: a context is made from the tokens of the prompts alone.")
    if has_grids:
        position_ids, _ = vlm.model.get_rope_index(
            input_ids,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=vision_inputs["image_grid_thw"],
            attention_mask=attention_mask,
        )
    else:
        first = 1 if vlm.config.model_type in COUNT_FROM_ONE else 0
        position_ids = (attention_mask.cumsum(-1) - 1 + first).clamp(min=first)
        if has_mrope:
            position_ids = position_ids.expand(3, -1, -1)
    check_positions(position_ids, max_positions(vlm.config.get_text_config(decoder=True)))
    # A cache without a configuration keeps all keys, also in layers with a sliding window.
    cache = DynamicCache()
    with _first_layers(vlm.get_decoder(), num_layers), _evaluation_mode(vlm):
        # The whole backbone, since off-loading hooks its `forward`. The language head sees no token.
        vlm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            mm_token_type_ids=mm_token_type_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.arange(0, device=input_ids.device),
            **vision_inputs,
        )
    last_position = position_ids.amax(dim=0) if position_ids.ndim == 3 else position_ids
    last_position = last_position.masked_fill(attention_mask == 0, -1).amax(dim=-1)
    return LatteFlowContext(
        tuple(layer.keys for layer in cache.layers),
        tuple(layer.values for layer in cache.layers),
        attention_mask.bool(),
        last_position + 1,
        has_padding=not bool(attention_mask.all()),
    )


@contextlib.contextmanager
def _evaluation_mode(vlm: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: in training mode, checkpointed layers keep no cache."""
    if not vlm.training:
        yield
        return
    vlm.eval()
    try:
        yield
    finally:
        vlm.train()


@contextlib.contextmanager
def _first_layers(decoder: nn.Module, num_layers: int | None) -> Iterator[None]:
    """Run only the first `num_layers` layers of `decoder` inside the block; all of them if `None`."""
    layers = decoder.layers
    decoder.layers = layers if num_layers is None else layers[:num_layers]
    try:
        yield
    finally:
        decoder.layers = layers
