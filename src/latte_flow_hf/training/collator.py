# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Collators: examples -> batches. Padding and the chat template are those of the processor."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from ..modeling.distributed import all_gather_list, local_rows, rank_and_world_size
from ..modeling.processing_latte_flow import adapt


@dataclass
class ConversationCollator:
    """Collates conversations into inputs and labels of the language model.

    Each example is `{"messages": [...]}` in the chat-template form. The labels are the tokens of the assistant, which
    the chat template encloses in `{% generation %}`, and -100 elsewhere.

    Args:
        processor (`ProcessorMixin`): a [`LatteFlowProcessor`] or the backbone's own processor.

    Raises:
        `ValueError`: when called, if the chat template does not mark any token.
    """

    processor: Any

    def __post_init__(self) -> None:
        self.processor = adapt(self.processor)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor.apply_chat_template(
            [example["messages"] for example in examples],
            tokenize=True,
            return_dict=True,
            # transformers searches for the assistant's tokens one by one, which is much faster in numpy than in torch.
            return_tensors="np",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        assistant_mask = torch.as_tensor(inputs.pop("assistant_masks"), dtype=torch.bool)
        inputs = inputs.convert_to_tensors("pt")
        if not assistant_mask.any():
            raise ValueError(
                "no token is marked as the assistant's: enclose its content in {% generation %} in the chat template."
            )
        inputs["labels"] = inputs["input_ids"].masked_fill(~assistant_mask, -100)
        return dict(inputs)


@dataclass
class TextToImageCollator:
    """Collates images with prompts into latents and contexts for `forward`, and optionally conversations into labels.

    An example is a dict with

    - `latents` of shape (C, height, width), or `image`, which `encoder` encodes;
    - `prompt`: an index into `contexts` if those are encoded in advance, else a string;
    - `seed` (`int`, *optional*): a number that differs between examples and epochs, for all random draws. Without it
      they depend on the prompts, so that batches of the same prompts have the same prompts dropped;
    - `name` (`str`, *optional*): the name of the example in errors ([`LossCallback`] removes it from the batch).

    With several processes, the random draws are made for the batches of all processes, which must have the same size
    and be collated at the same time. The workers of a data loader only know the batch of their process.

    Args:
        contexts ([`LatteFlowContext`] or `Callable`): the contexts of all prompts, the last one unconditional; or a
            function that maps a list of prompts to their contexts, such as `ImagePromptEncoder.contexts`, or to the
            arguments of `encode_context`, such as `PromptTokenizer`.
        prompt_dropout (`float`): the share of prompts that are replaced by the unconditional one, for classifier-free
            guidance; 0 to 1.
        encoder (`Callable`, *optional*): a function that maps a list of images to latents (B, C, height, width).
        conversations (`Sequence`, *optional*): examples for [`ConversationCollator`]. Some of them are drawn for each
            batch, and `forward` adds the loss of the language model. It has no effect while the backbone is frozen.
        conversation_collator ([`ConversationCollator`], *optional*): required with `conversations`.
        conversation_share (`float`, defaults to 0.25): the number of conversations per image of the batch; at least
            one per batch.
        folded_guidance_scale (`float`, *optional*): the guidance that the weights shall contain; batches then have
            the empty prompt as `negative_context`, too.
    """

    contexts: LatteFlowContext | Callable[[list[str]], LatteFlowContext | Mapping[str, torch.Tensor]]
    prompt_dropout: float
    encoder: Callable[[list[Any]], torch.Tensor] | None = None
    conversations: Sequence[dict] | None = None
    conversation_collator: ConversationCollator | None = None
    conversation_share: float = 0.25
    folded_guidance_scale: float | None = None

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        prompts = [example["prompt"] for example in examples]
        # Seeded by the batch and not by the global generator: data loaders collate in advance, so that the state of
        # the global generator differs in a resumed run.
        seeds = all_gather_list([example["seed"] for example in examples] if "seed" in examples[0] else prompts)
        generator = torch.Generator().manual_seed(_checksum(seeds))
        is_dropped = local_rows(torch.rand(len(seeds), generator=generator)) < self.prompt_dropout
        batch: dict[str, Any] = {}
        if "latents" in examples[0]:
            batch["latents"] = torch.stack([example["latents"] for example in examples])
        else:
            assert self.encoder is not None
            batch["latents"] = self.encoder([example["image"] for example in examples])
        if isinstance(self.contexts, LatteFlowContext):
            index = torch.tensor(prompts).masked_fill(is_dropped, len(self.contexts) - 1)
            batch["context"] = self.contexts.select(index.to(self.contexts.next_position.device))
        else:
            batch["context"] = self.contexts(["" if drop else prompt for drop, prompt in zip(is_dropped, prompts)])
        if self.folded_guidance_scale is not None:
            batch["guidance_scale"] = self.folded_guidance_scale
            batch["negative_context"] = (
                self.contexts.select(self.contexts.next_position.new_tensor([len(self.contexts) - 1]))
                if isinstance(self.contexts, LatteFlowContext)
                else self.contexts([""])
            )
        if "name" in examples[0]:
            batch["names"] = [example["name"] for example in examples]
        if self.conversations is not None:
            assert self.conversation_collator is not None
            rank, world_size = rank_and_world_size()
            num_conversations = max(world_size, round(self.conversation_share * len(seeds)))
            indices = torch.randint(len(self.conversations), (num_conversations,), generator=generator).tolist()
            conversations = [self.conversations[index] for index in indices[rank::world_size]]
            batch.update(self.conversation_collator(conversations))
        return batch


def _checksum(values: list) -> int:
    if isinstance(values[0], str):
        return zlib.crc32("\n".join(values).encode())
    return zlib.crc32(torch.as_tensor(values).numpy().tobytes())


class ImagePromptEncoder:
    """Encodes images into latents and prompts into contexts, with the autoencoder and the backbone of a pipeline.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        batch_size (`int`, defaults to 1): how many images or prompts are encoded at once. 1 makes each encoding
            independent of its batch, bit for bit, so that training with and without a cache is the same. A larger
            batch is faster on an accelerator and equal up to rounding.
    """

    # Contexts kept in memory; chosen: because the names of ImageNet's 1,000 classes fit.
    max_contexts = 1024

    def __init__(self, pipe: Any, batch_size: int = 1):
        self.pipe, self.batch_size = pipe, batch_size
        self._contexts: dict[str, LatteFlowContext] = {}

    def latents(self, images: list[Any]) -> torch.Tensor:
        """Encode images of the same size: (B, C, height, width), on the CPU."""
        latents = [self.pipe.encode_images(chunk).cpu() for chunk in _chunks(images, self.batch_size)]
        return torch.cat(latents).contiguous()

    def separate_contexts(self, prompts: list[str]) -> list[LatteFlowContext]:
        """Encode prompts: one context for each, without padding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        for prompt in [prompt for prompt in self._contexts if prompt not in prompts]:
            if len(self._contexts) + len(new) <= self.max_contexts:
                break
            del self._contexts[prompt]
        for batch in _chunks(new, self.batch_size):
            self._contexts.update(zip(batch, encode_prompts(self.pipe.model, self.pipe.processor, batch).split()))
        return [self._contexts[prompt] for prompt in prompts]

    def contexts(self, prompts: list[str]) -> LatteFlowContext:
        """Encode prompts: one context for all, padded on the left."""
        return LatteFlowContext.cat(self.separate_contexts(prompts))


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def encode_prompts(model: Any, processor: Any, prompts: list[str], batch_size: int = 64) -> LatteFlowContext:
    """Encode prompts, `batch_size` at a time: one context for all, padded on the left."""
    contexts, processor = [], adapt(processor)
    for batch in _chunks(prompts, batch_size):
        inputs = processor.encode_conversations([processor.conversation(prompt) for prompt in batch])
        contexts.append(model.encode_context(**inputs.to(model.device)))
    return LatteFlowContext.cat(contexts)


class PromptTokenizer:
    """Maps prompts to the arguments of `encode_context`, for a backbone that is trained: `forward` encodes them.

    Args:
        processor (`ProcessorMixin`): a [`LatteFlowProcessor`] or the backbone's own processor.
    """

    def __init__(self, processor: Any):
        self.processor = adapt(processor)

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.processor.encode_conversations([self.processor.conversation(prompt) for prompt in prompts]))
