# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The plug-in for lmms-eval, which finds it by the entry point `lmms_eval.models`.

lmms-eval has two kinds of models: a chat model is given conversations, a simple one images and a text. Only tasks of
simple models choose among answers by their likelihood. So there is a class for each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

from ..checkpoints import tiny_checkpoint
from .answers import Answerer, generation_arguments


MODEL_NAME = "latte_flow"
# How LLaVA splits images: some tasks name it for all models, and other models have no use for it.
_LLAVA_SETTINGS = ("image_aspect_ratio",)


def manifest() -> ModelManifest:
    """The entry of the model in the registry of lmms-eval."""
    return ModelManifest(
        MODEL_NAME,
        simple_class_path=f"{__name__}.{LatteFlowSimple.__name__}",
        chat_class_path=f"{__name__}.{LatteFlowChat.__name__}",
    )


class LatteFlowLmms(lmms):
    """A model of this package, or a stock backbone, as a model of lmms-eval.

    Args:
        pretrained (`str`, *optional*): see [`Answerer`]; the embedded checkpoint if left out.
        batch_size (`int` or `str`, defaults to 1): the number of questions that are answered at once.
        device (`str`, *optional*): defaults to the accelerator of this process, if there is one, and must be left out
            for several processes.
        dtype, max_new_tokens, system_prompt: see [`Answerer`].

    Raises:
        `ValueError`: if `batch_size` is not a positive integer, several processes are given one `device`, or for the
            reasons of [`Answerer`].
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 128,
        system_prompt: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is not None and self._world_size > 1:
            raise ValueError(f"device must be left out for {self._world_size} processes, got {device!r}.")
        self.device = device or self.accelerator.device
        self.answerer: Any = Answerer(
            pretrained or tiny_checkpoint(), self.device, dtype, max_new_tokens, system_prompt
        )

    def _generate(self, requests: list[Instance], settings_index: int) -> list[str]:
        """The answers to `requests`, whose arguments have the settings of the generation at `settings_index`."""

        def settings_of(arguments: tuple) -> dict[str, Any]:
            return {name: value for name, value in arguments[settings_index].items() if name not in _LLAVA_SETTINGS}

        def answer(batch: list[tuple], conversations: list[list[dict]]) -> list[str]:
            return self.answerer.answer(conversations, settings_of(batch[0]))

        for request in requests:
            with _named(request.args):
                generation_arguments(settings_of(request.args))
        return self._in_batches(requests, answer, settings_of)

    def _in_batches(self, requests: list[Instance], run: Callable, settings_of: Callable) -> list:
        """`run` with batches of arguments and their conversations; those of one batch have the same settings."""
        # The longest first, so that a batch that does not fit into the memory is the first one.
        collator = Collator(
            [request.args for request in requests], lambda args: -len(str(args[0])), settings_of, grouping=True
        )
        results: list = []
        with tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as progress:
            for batch in collator.get_batched(n=self.batch_size):
                conversations = []
                for arguments in batch:
                    with _named(arguments):
                        conversations.append(self.answerer.conversation(self._messages(arguments)))
                results += run(batch, conversations)
                progress.update(len(batch))
        return collator.get_original(results)

    def _document(self, arguments: tuple) -> dict:
        doc_id, task, split = arguments[-3:]
        return self.task_dict[task][split][doc_id]

    def _messages(self, arguments: tuple) -> list[dict]:
        """The conversation of the arguments of a request, in the chat-template form."""
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            f"{MODEL_NAME} does not run tasks of several rounds, such as {requests[0].task_name!r}."
        )

    def clean(self) -> None:
        self.answerer = None
        super().clean()


class LatteFlowChat(LatteFlowLmms):
    """For the chat tasks of lmms-eval: conversations whose images stand where the task puts them."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._generate(requests, settings_index=2)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("chat models of lmms-eval only generate; add --force_simple.")

    def _messages(self, arguments: tuple) -> list[dict]:
        doc_to_messages = arguments[1]
        messages = ChatMessages(messages=doc_to_messages(self._document(arguments))).messages
        return [{"role": it.role, "content": [_part(content) for content in it.content]} for it in messages]


class LatteFlowSimple(LatteFlowLmms):
    """For the simple tasks of lmms-eval: the images of a document stand before its text."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._generate(requests, settings_index=1)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The loss of each answer and whether it is the most likely one, see [`~Answerer.losses`].

        lmms-eval chooses the answer with the smallest loss, in spite of the method's name. It makes a string of a pair
        that stands alone, which it then cannot score.
        """
        for request in requests:
            if len(request.args) != 6:
                raise ValueError(
                    f"task {request.task_name!r} asks how likely an answer is without its question, as the metric "
                    "acc_mutual_info does; this is not supported, use another metric."
                )

        def measure(batch: list[tuple], conversations: list[list[dict]]) -> list[GenerationResult]:
            losses = self.answerer.losses(conversations, [self._target(arguments) for arguments in batch])
            return [GenerationResult(text=loss) for loss in losses]  # type: ignore[arg-type]

        return self._in_batches(requests, measure, lambda arguments: {})

    def _target(self, arguments: tuple) -> str:
        target = arguments[1](self._document(arguments)) if callable(arguments[1]) else arguments[1]
        with _named(arguments):
            if not isinstance(target, str) or not target.strip():
                raise ValueError(f"an answer must be a string that is not empty, got {target!r}.")
        return target

    def _messages(self, arguments: tuple) -> list[dict]:
        text, _, doc_to_visual = arguments[:3]
        images = doc_to_visual(self._document(arguments)) or []
        content = [{"type": "image", "image": image} for image in images]
        # Some tasks mark the place of an image, which here is before the text.
        return [{"role": "user", "content": [*content, {"type": "text", "text": text.replace("<image>", "")}]}]


@contextmanager
def _named(arguments: tuple) -> Iterator[None]:
    """Errors name the task and the document of a request."""
    try:
        yield
    except ValueError as error:
        doc_id, task, _ = arguments[-3:]
        raise ValueError(f"task {task!r}, document {doc_id}: {error}") from error


def _part(content: Any) -> dict[str, Any]:
    if content.type == "text":
        return {"type": "text", "text": content.text}
    if content.type == "image":
        return {"type": "image", "image": content.url}
    raise ValueError(f"a message has a part of type {content.type!r}, and only text and images are supported.")
