# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A conversation with images: questions whose answers are streamed, and images that are generated in between."""

import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from .limits import Limits
from .model_queue import Job


PAINT = "/paint"


class _StopWithJob(StoppingCriteria):
    def __init__(self, job: Job):
        self.job = job

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self.job.stopped).bool()


def paint_prompt(text: str) -> str | None:
    """What `/paint ...` asks for; `None` if the text is a question."""
    text = text.strip()
    is_command = text == PAINT or text.startswith(f"{PAINT} ") or text.startswith(f"{PAINT}\n")
    return text[len(PAINT) :].strip() if is_command else None


def user_turn(text: str, images: list[Image.Image]) -> dict:
    parts: list[dict] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_turn(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def last_question(messages: list[dict]) -> list[dict]:
    """The last question alone, with its images, or else those that were shown last."""
    words = [part for part in messages[-1]["content"] if part["type"] == "text"]
    for message in reversed(messages):
        images = [part for part in message["content"] if part["type"] == "image"]
        if images:
            return [{"role": "user", "content": [*images, *words]}]
    return [messages[-1]]


def check_turns(messages: list[dict], limits: Limits) -> None:
    """
    Raises:
        `ValueError`: if the conversation has as many questions as are allowed.
    """
    num_questions = sum(message["role"] == "user" for message in messages)
    if num_questions >= limits.turns:
        raise ValueError(f"This conversation has {num_questions} questions, the most there can be. Start a new one.")


def answer(pipe: Any, messages: list[dict], limits: Limits, job: Job) -> str:
    """Answer the last question, in the thread of the queue. The job gets the answer so far whenever it grows.

    Raises:
        `ValueError`: if the conversation is longer than the model can read.
    """
    processor = pipe.processor
    encoded = processor.encode_conversations([processor.conversation(messages)])
    num_tokens = encoded["input_ids"].shape[1]
    most = pipe.model.config.text_config.max_position_embeddings - limits.answer_tokens
    if num_tokens > most:
        raise ValueError(f"The conversation has {num_tokens:,} tokens, and at most {most:,} fit. Start a new one.")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def forward(parts: Iterator[str]) -> None:
        text = ""
        for part in parts:
            text += part
            job.send(text.strip())

    listener = threading.Thread(target=forward, args=(streamer,), daemon=True)
    listener.start()
    try:
        result = pipe.chat(
            messages,
            streamer=streamer,
            max_new_tokens=limits.answer_tokens,
            do_sample=False,
            stopping_criteria=[_StopWithJob(job)],
        )
    finally:
        # Also after an error, or the listener would wait for ever.
        streamer.end()
        listener.join()
    return result
