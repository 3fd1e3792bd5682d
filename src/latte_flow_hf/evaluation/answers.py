# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Answers of a model, or of its stock backbone, to the questions of other tools' benchmarks.

Both are loaded by `AutoModelForImageTextToText` and asked by the same code: what differs is the class of the model.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, BatchFeature
from transformers.generation import LogitsProcessorList

from ..files import component_subfolder
from ..modeling.generation import FiniteLogits
from ..modeling.processing_latte_flow import LatteFlowProcessor, check_processor


DTYPES = ("float32", "bfloat16", "float16")
# What a benchmark may ask of the generation of an answer.
GENERATION_SETTINGS = (
    *("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"),
)


class Answerer:
    """A model of this package or a stock backbone, with its processor, that answers conversations.

    Args:
        pretrained (`str` or `Path`): folder or hub id of a pipeline, or of a vision-language model of transformers,
            such as `latte-flow convert extract-backbone` writes.
        device (`str` or `torch.device`, defaults to `"cpu"`): where the model runs.
        dtype (`str`, defaults to `"float32"`): of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        max_new_tokens (`int`, defaults to 128): the longest answer, in tokens, where a question says nothing else.
            (Chosen: as the Qwen2-VL of lmms-eval.)
        system_prompt (`str`, *optional*): the message of the system before each conversation.

    Raises:
        `ValueError`: if there is no such dtype, the checkpoint lacks weights or a chat template, or its processor is
            that of another model.
    """

    def __init__(
        self,
        pretrained: str | Path,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        max_new_tokens: int = 128,
        system_prompt: str | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        _check_positive("max_new_tokens", max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self.system_prompt = system_prompt
        self.processor: Any = LatteFlowProcessor.from_pretrained(pretrained)
        if self.processor.chat_template is None:
            raise ValueError(
                f"{pretrained} has no chat template, which says how a question is put to its model; add a "
                "chat_template.jinja to the processor of a model that was trained on conversations."
            )
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            subfolder=component_subfolder(pretrained, "model"),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
        if loaded["missing_keys"]:
            raise ValueError(
                f"{pretrained} lacks weights, which would be random: {', '.join(sorted(loaded['missing_keys'])[:3])}."
            )
        backbone = getattr(model, "vlm", model)
        check_processor(self.processor, backbone.config, backbone.get_input_embeddings().num_embeddings)
        self.model: Any = model.eval().to(device)

    def conversation(self, messages: list[dict]) -> list[dict]:
        """A conversation that can be answered: its images are loaded, and the system prompt stands before it.

        Args:
            messages (`list[dict]`): in the chat-template form, see [`LatteFlowProcessor.conversation`].

        Raises:
            `ValueError`: if a message has another form, such as one with a video, an image cannot be read, the
                conversation does not end with the user, it has a system prompt and this object another, or there is
                neither text nor an image in it.
        """
        conversation = self.processor.conversation(messages)
        if conversation[-1]["role"] != "user":
            raise ValueError(
                f"a conversation must end with a message of the user, got one of {conversation[-1]['role']!r}."
            )
        parts = [part for message in conversation for part in message["content"]]
        if not any(part["type"] == "image" or part["text"].strip() for part in parts):
            raise ValueError("a conversation must have text or an image, and all of its text is empty.")
        if self.system_prompt is not None:
            if conversation[0]["role"] == "system":
                raise ValueError(
                    f"a conversation has a system prompt of its own; leave out system_prompt={self.system_prompt!r}."
                )
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            conversation = [system, *conversation]
        return conversation

    @torch.no_grad()
    def answer(self, conversations: list[list[dict]], settings: Mapping[str, Any] | None = None) -> list[str]:
        """Answer conversations in one batch.

        Args:
            conversations (`list[list[dict]]`): as returned by `conversation`.
            settings (`Mapping`, *optional*): `GENERATION_SETTINGS`, see `generation_arguments`.

        Raises:
            `ValueError`: for settings that cannot be followed, or if the logits are not finite.
        """
        arguments = generation_arguments({"max_new_tokens": self.max_new_tokens, **(settings or {})})
        inputs = self._encode(conversations)
        output = self.model.generate(
            **inputs,
            **arguments,
            tokenizer=self.processor.tokenizer,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for stop in arguments.get("stop_strings", ()):
            answers = [answer.split(stop)[0] for answer in answers]
        return [answer.strip() for answer in answers]

    @torch.no_grad()
    def losses(self, conversations: list[list[dict]], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """How likely given answers are, in one batch.

        Args:
            conversations (`list[list[dict]]`): as returned by `conversation`.
            answers (`Sequence[str]`): one for each.

        Returns:
            `list[tuple[float, bool]]`: the mean of the negative log-likelihoods (nats, >= 0) of the answer's tokens,
            and whether each of them is the most likely one.

        Raises:
            `ValueError`: if an answer is empty, or the logits are not finite.
        """
        tokenizer = self.processor.tokenizer
        tokens = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
        if not all(tokens):
            raise ValueError(f"an answer must have at least one token, got {answers[tokens.index([])]!r}.")
        inputs = self._encode(conversations)
        num_prompt = inputs["input_ids"].shape[1]
        width = max(map(len, tokens))
        # Prompts are padded on the left, their answers on the right.
        target = torch.full((len(tokens), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(tokens), width, dtype=torch.long)
        for row, ids in enumerate(tokens):
            target[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        target, mask = target.to(self.model.device), mask.to(self.model.device)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:  # 0 is text.
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(mask, dtype=inputs[name].dtype)], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
        logits = self.model(**inputs).logits[:, num_prompt - 1 : -1].float()
        log_likelihood = logits.log_softmax(dim=-1).gather(-1, target[..., None])[..., 0]
        if not torch.isfinite(log_likelihood[mask.bool()]).all():
            raise ValueError(f"the logits are not finite in dtype {self.model.dtype}; use float32 or bfloat16.")
        loss = -(log_likelihood * mask).sum(dim=1) / mask.sum(dim=1)
        is_greedy = ((logits.argmax(dim=-1) == target) | (mask == 0)).all(dim=1)
        return list(zip(loss.tolist(), is_greedy.tolist()))

    def _encode(self, conversations: list[list[dict]]) -> BatchFeature:
        return self.processor.encode_conversations(conversations).to(self.model.device)


def generation_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for what a benchmark asks.

    Args:
        settings (`Mapping`): of `GENERATION_SETTINGS`, where `None` is the same as left out. `until` is a list of
            strings: an answer ends before the first of them. Without `do_sample`, a `temperature` above 0 samples.

    Raises:
        `ValueError`: if a setting is none of these, has a value of another kind, or `do_sample` and `temperature`
            contradict each other.
    """
    unknown = sorted(settings.keys() - set(GENERATION_SETTINGS))
    if unknown:
        raise ValueError(
            f"the settings {unknown} of a generation are not supported; leave them out, or use some of "
            f"{list(GENERATION_SETTINGS)}."
        )
    arguments = {name: value for name, value in settings.items() if value is not None}
    for name in ("max_new_tokens", "num_beams", "top_k"):
        if name in arguments:
            _check_positive(name, arguments[name])
    temperature = arguments.get("temperature", 0.0)
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or temperature < 0:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}.")
    do_sample = arguments.setdefault("do_sample", temperature > 0)
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample must be true or false, got {do_sample!r}.")
    if do_sample and arguments.get("temperature") == 0:
        raise ValueError("do_sample needs a temperature above 0, got 0; use do_sample=False for the likeliest answer.")
    if not do_sample:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    until = arguments.pop("until", [])
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in until):
        raise ValueError(f"until must be a list of strings that are not empty, got {until!r}.")
    if until:
        arguments["stop_strings"] = list(until)
    return arguments


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
