# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Examples -> batches. Every collator ends in one call of the processor, so padding and chat template are its own."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.modeling_latte_flow import LatteFlowContext


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
class PaintingCollator:
    """Encoded pictures and prompts -> latents and contexts, ready for `forward`.

    Each example is `{"latents": (C, height, width), "prompt": int}`, the prompt as a row of `contexts`.

    Args:
        contexts ([`LatteFlowContext`]): every prompt, encoded before; the last row is the unconditional one.
        prompt_dropout (`float`): how often a prompt is replaced by it, for classifier-free guidance; 0 to 1.
    """

    contexts: LatteFlowContext
    prompt_dropout: float

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        rows = torch.tensor([example["prompt"] for example in examples])
        # Drawn from the batch itself: loaders collate ahead, so that a draw from the global generator would differ
        # between a run and a resumed one.
        generator = torch.Generator().manual_seed(zlib.crc32(rows.numpy().tobytes()))
        dropped = torch.rand(len(rows), generator=generator) < self.prompt_dropout
        rows = rows.masked_fill(dropped, len(self.contexts) - 1)
        latents = torch.stack([example["latents"] for example in examples])
        return {"latents": latents, "context": self.contexts.rows(rows.to(self.contexts.next_position.device))}


def encode_prompts(model: Any, processor: Any, prompts: list[str], batch_size: int = 64) -> LatteFlowContext:
    """The contexts of `prompts`, in their order, prefilled `batch_size` at a time."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    contexts = []
    for batch in batches:
        inputs = processor.encode_conversations([processor.conversation(prompt) for prompt in batch])
        contexts.append(model.encode_context(**inputs.to(model.device)))
    return LatteFlowContext.cat(contexts)
