# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Examples -> batches. Every collator ends in one call of the processor, so padding and chat template are its own."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from ..modeling.distributed import all_gather_list, local_rows, rank_and_world_size


@dataclass
class ConversationCollator:
    """Conversations -> inputs and labels of the language model.

    Each example is `{"messages": [...]}` in the chat-template form. The labels are the tokens inside the template's
    `{% generation %}` marks (the assistant's words), -100 elsewhere.

    Raises:
        `ValueError`: when called, if the chat template marks nothing.
    """

    processor: Any

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor.apply_chat_template(
            [example["messages"] for example in examples],
            tokenize=True,
            return_dict=True,
            # Not tensors yet: the search for the assistant's tokens walks over all of them, far faster so.
            return_tensors="np",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        answers = torch.as_tensor(inputs.pop("assistant_masks"), dtype=torch.bool)
        inputs = inputs.convert_to_tensors("pt")
        if not answers.any():
            raise ValueError("no token is marked as the assistant's: the chat template needs {% generation %} marks.")
        inputs["labels"] = inputs["input_ids"].masked_fill(~answers, -100)
        return dict(inputs)


@dataclass
class TextToImageCollator:
    """Captioned pictures -> latents and contexts, ready for `forward`; with conversations mixed in, labels too.

    An example is a dict:

    - `latents` (C, height, width), or `image`, a picture that `encoder` turns into them;
    - `prompt`: a row of `contexts` if those are all encoded before, else a string;
    - `seed` (`int`, *optional*): differs between examples and epochs; what is drawn at random comes from it. Without
      it, it comes from the prompts, so that batches of equal prompts all lose the same ones;
    - `name` (`str`, *optional*): what an error calls the example ([`LossCallback`] takes the names out again).

    With several processes, what is drawn is drawn for the batches of all of them, each of which must be as large and
    ask at the same time. A data loader's workers know only their own process's batch, and draw from that.

    Args:
        contexts ([`LatteFlowContext`] or callable): every prompt, encoded before, the last row the unconditional one;
            or what gives the contexts of a list of prompts ([`ImagePromptEncoder`] and its like).
        prompt_dropout (`float`): how often a prompt is replaced by the unconditional one, for classifier-free
            guidance; 0 to 1.
        encoder (`Callable`, *optional*): a list of pictures -> latents (B, C, height, width).
        conversations (`Sequence`, *optional*): examples of [`ConversationCollator`]; each batch draws some of them,
            and `forward` then adds the backbone's own loss. They teach nothing while the backbone is frozen.
        conversation_collator ([`ConversationCollator`], *optional*): goes with them.
        conversation_share (`float`, defaults to 0.25): conversations for each picture of the batch; at least one.
    """

    contexts: LatteFlowContext | Callable[[list[str]], LatteFlowContext | Mapping[str, torch.Tensor]]
    prompt_dropout: float
    encoder: Callable[[list[Any]], torch.Tensor] | None = None
    conversations: Sequence[dict] | None = None
    conversation_collator: ConversationCollator | None = None
    conversation_share: float = 0.25

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        prompts = [example["prompt"] for example in examples]
        # Drawn from the batch itself: loaders collate ahead, so that a draw from the global generator would differ
        # between a run and a resumed one.
        drawn_from = all_gather_list([example["seed"] for example in examples] if "seed" in examples[0] else prompts)
        generator = torch.Generator().manual_seed(_checksum(drawn_from))
        dropped = local_rows(torch.rand(len(drawn_from), generator=generator)) < self.prompt_dropout
        batch: dict[str, Any] = {}
        if "latents" in examples[0]:
            batch["latents"] = torch.stack([example["latents"] for example in examples])
        else:
            assert self.encoder is not None
            batch["latents"] = self.encoder([example["image"] for example in examples])
        if isinstance(self.contexts, LatteFlowContext):
            rows = torch.tensor(prompts).masked_fill(dropped, len(self.contexts) - 1)
            batch["context"] = self.contexts.select(rows.to(self.contexts.next_position.device))
        else:
            batch["context"] = self.contexts(["" if drop else prompt for drop, prompt in zip(dropped, prompts)])
        if "name" in examples[0]:
            batch["names"] = [example["name"] for example in examples]
        if self.conversations is not None:
            assert self.conversation_collator is not None
            process, num_processes = rank_and_world_size()
            count = max(num_processes, round(self.conversation_share * len(drawn_from)))
            drawn = torch.randint(len(self.conversations), (count,), generator=generator).tolist()
            own = drawn[process::num_processes]
            batch.update(self.conversation_collator([self.conversations[index] for index in own]))
        return batch


def _checksum(drawn_from: list) -> int:
    if isinstance(drawn_from[0], str):
        return zlib.crc32("\n".join(drawn_from).encode())
    return zlib.crc32(torch.as_tensor(drawn_from).numpy().tobytes())


class ImagePromptEncoder:
    """Pictures -> latents and prompts -> contexts, by a pipeline's own autoencoder and frozen backbone.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        batch_size (`int`, defaults to 1): how many go through at once. With 1 a picture or a prompt gives the same
            bits in whatever company it comes, hence training from a cache equals training without it; more is faster
            on an accelerator and equal up to rounding.
    """

    # So many contexts are kept at hand: the names of ImageNet's classes fit.
    max_kept = 1024

    def __init__(self, pipe: Any, batch_size: int = 1):
        self.pipe, self.batch_size = pipe, batch_size
        self._kept: dict[str, LatteFlowContext] = {}

    def latents(self, images: list[Any]) -> torch.Tensor:
        """Pictures of one size -> (B, C, height, width), on the CPU."""
        latents = [self.pipe.encode_images(chunk).cpu() for chunk in _chunks(images, self.batch_size)]
        return torch.cat(latents).contiguous()

    def each_context(self, prompts: list[str]) -> list[LatteFlowContext]:
        """Each prompt's context alone, without padding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        for prompt in [prompt for prompt in self._kept if prompt not in prompts]:
            if len(self._kept) + len(new) <= self.max_kept:
                break
            del self._kept[prompt]
        encoded = [
            encode_prompts(self.pipe.model, self.pipe.processor, chunk) for chunk in _chunks(new, self.batch_size)
        ]
        self._kept.update(zip(new, [alone for context in encoded for alone in context.split()]))
        return [self._kept[prompt] for prompt in prompts]

    def contexts(self, prompts: list[str]) -> LatteFlowContext:
        """The prompts' contexts in one batch."""
        return LatteFlowContext.cat(self.each_context(prompts))


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def encode_prompts(model: Any, processor: Any, prompts: list[str], batch_size: int = 64) -> LatteFlowContext:
    """The contexts of `prompts`, in their order, prefilled `batch_size` at a time."""
    contexts = []
    for batch in _chunks(prompts, batch_size):
        inputs = processor.encode_conversations([processor.conversation(prompt) for prompt in batch])
        contexts.append(model.encode_context(**inputs.to(model.device)))
    return LatteFlowContext.cat(contexts)
