# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A model for VLMEvalKit, which has no plug-ins: it is added to the table of models before `run.py` starts."""

from functools import partial
from itertools import groupby
from typing import Any

import torch
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from ..checkpoints import tiny_checkpoint
from .answers import Answerer, generation_arguments


class LatteFlowVLM(BaseModel):
    """A model of this package, or a stock backbone, as a model of VLMEvalKit.

    Args:
        pretrained (`str`, *optional*): see [`Answerer`]; the embedded checkpoint if left out.
        device (`str`, *optional*): defaults to the accelerator, if there is one.
        dtype, max_new_tokens, system_prompt: see [`Answerer`].
        generation: how answers are generated, see [`generation_arguments`]; the likeliest tokens if left out.

    Raises:
        `ValueError`: for the reasons of [`Answerer`].
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 2048,
        system_prompt: str | None = None,
        **generation: Any,
    ):
        super().__init__()
        generation_arguments(generation)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.answerer = Answerer(
            pretrained or tiny_checkpoint(), device or accelerator or "cpu", dtype, max_new_tokens, system_prompt
        )
        self.generation = generation

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to one question.

        Args:
            message (`list[dict]`): parts with `type`, `value` and possibly `role`, the user's if left out.
            dataset (`str`, *optional*): not used.

        Raises:
            `ValueError`: if a part is neither text nor an image, or for the reasons of [`Answerer`].
        """
        turns = groupby(message, key=lambda part: part.get("role", "user"))
        return self._answer([{"role": role, "content": list(parts)} for role, parts in turns])

    def chat_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Same as `generate_inner`, for a conversation: messages with `role` and such parts as `content`."""
        return self._answer(message)

    def _answer(self, messages: list[dict]) -> str:
        converted = [{"role": it["role"], "content": [_part(part) for part in it["content"]]} for it in messages]
        return self.answerer.answer([self.answerer.conversation(converted)], self.generation)[0]


def _part(part: dict) -> dict:
    if part["type"] not in ("text", "image"):
        raise ValueError(f"a message has a part of type {part['type']!r}, and only text and images are supported.")
    return {"type": part["type"], part["type"]: part["value"]}


def register(name: str, **settings: Any) -> None:
    """Add a model to those that VLMEvalKit's `run.py` knows.

    Args:
        name (`str`): for `--model`, and part of the names of result files.
        settings: arguments of [`LatteFlowVLM`].

    Raises:
        `ValueError`: if VLMEvalKit has a model of that name.
    """
    if name in supported_VLM:
        raise ValueError(f"VLMEvalKit has a model {name!r} already; choose another name.")
    supported_VLM[name] = partial(LatteFlowVLM, **settings)
