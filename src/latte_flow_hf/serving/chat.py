# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One answer of a chat, in a thread that takes turns with the images after each token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to continue.

    Args:
        messages (`list[dict]`): in the chat-template form, images included.
        adapter (`str`, *optional*): the name of an adapter.
        max_new_tokens (`int`, defaults to 256): the maximum length of the answer.
        temperature (`float`, defaults to 0.0): 0 takes the most probable token (Chosen: as `pipe.chat`); otherwise
            the logits are divided by it and a token is drawn.
        top_p (`float`, defaults to 1.0): draw among the most probable tokens that together have this probability.
        seed (`int`, defaults to 0): of the draws.
        stop (`list[str]`): texts before which the answer ends.
    """

    messages: list[dict]
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatAnswer:
    """
    Args:
        text (`str`): the answer.
        finish_reason (`str`): `"stop"` if the model or a stop text ended it, `"length"` if it was cut.
        num_prompt_tokens, num_tokens (`int`): the lengths of the conversation and of the answer.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


class ChatStoppedError(Exception):
    """Ends `generate` from inside its streamer: a stop text was found, or nobody waits for the answer."""


class SeededDraw(LogitsProcessor):
    """Draws each token with a generator of its own, and leaves it as the only possible one.

    `generate` draws from torch's global generator, which chats at the same time would share.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, device: torch.device):
        self.warpers = [TemperatureLogitsWarper(temperature)]
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        drawn = torch.multinomial(scores.float().softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class AnswerStreamer(TextStreamer):
    """Passes the text of an answer on, up to a stop text, and counts tokens.

    Args:
        tokenizer: the tokenizer.
        on_text (`Callable`): called with each piece of the answer.
        on_token (`Callable`): called after each token.
        stop (`tuple[str, ...]`): texts before which the answer ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None],
        on_token: Callable[[], None],
        stop: tuple[str, ...] = (),
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.on_token, self.stop = on_text, on_token, stop
        self.num_prompt_tokens = self.num_tokens = 0
        self.text = ""
        self._num_sent = 0

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.num_prompt_tokens = value.shape[-1]
        else:
            self.num_tokens += value.numel()
        super().put(value)
        self.on_token()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # Without white space at both ends, as in the answer of `pipe.chat`.
        self.text = (self.text + text).lstrip()
        ends = [index for stop in self.stop if (index := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)].rstrip()
        self._send(is_last=stream_end or bool(ends))
        if ends:
            raise ChatStoppedError

    def _send(self, is_last: bool) -> None:
        end = len(self.text.rstrip())
        if not is_last:
            # The start of a stop text may be the end of what there is.
            held = [n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
            end = min(end, len(self.text) - max(held, default=0))
        if end > self._num_sent:
            self.on_text(self.text[self._num_sent : end])
            self._num_sent = end


def run_chat(
    pipe: Any,
    request: ChatRequest,
    on_text: Callable[[str], None] = lambda text: None,
    on_token: Callable[[], None] = lambda: None,
) -> ChatAnswer:
    """Answer with `pipe.chat`.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline, with the adapter of the request active.
        request ([`ChatRequest`]): the conversation.
        on_text (`Callable`): called with each piece of the answer.
        on_token (`Callable`): called after each token; may raise [`ChatStoppedError`].

    Raises:
        `ValueError`: same as `pipe.chat`.
    """
    streamer = AnswerStreamer(pipe.processor.tokenizer, on_text, on_token, request.stop)
    kwargs: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "do_sample": False}
    if request.temperature > 0:
        draw = SeededDraw(request.temperature, request.top_p, request.seed, pipe._execution_device)
        kwargs["logits_processor"] = [draw]
    try:
        pipe.chat(request.messages, streamer=streamer, **kwargs)
    except ChatStoppedError:
        is_cut = False
    else:
        is_cut = streamer.num_tokens >= request.max_new_tokens
    return ChatAnswer(
        streamer.text.strip(), "length" if is_cut else "stop", streamer.num_prompt_tokens, streamer.num_tokens
    )
