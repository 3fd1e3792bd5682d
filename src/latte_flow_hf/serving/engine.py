# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The engine of the server: requests come and go, and one pipeline works on all of them.

One thread runs ticks. A tick drops what was cancelled, lets requests in, takes one step with one batch (see
[`ExpertBatches`]) and decodes what is finished. Chats run in threads of their own, one token at a time: a lock that is
given in the order of asking lets ticks and tokens alternate.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..pipelines.offloading import has_forward_hooks
from .adapter_cache import AdapterCache
from .chat import ChatAnswer, ChatRequest, ChatStoppedError, run_chat
from .expert_batches import ExpertBatches
from .running_image import ImageRequest, RunningImage, start_images


logger = logging.get_logger(__name__)

# Images decoded at once. (Chosen: the autoencoder's largest activations are far larger than a step's.)
DECODE_BATCH = 8


class QueueFullError(Exception):
    """As many requests wait as may wait."""


class EngineClosedError(Exception):
    """The engine is being shut down."""


class GenerationError(Exception):
    """A request was valid and failed: out of memory, or values that are not finite."""


class UnavailableError(GenerationError):
    """A request was valid, and can be sent again: a process that worked on it has ended."""


class FairLock:
    """A lock that is given in the order of asking; that of `threading` may be given to one thread for ever."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_held = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *error: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()  # It stays held.
            else:
                self._is_held = False


@dataclass(frozen=True)
class GeneratedImages:
    """The result of an [`ImageRequest`].

    Args:
        images (`list`): the images, of the request's `output_type`.
        num_prompt_tokens (`int`): the length of the prompt, without the negative one.
        num_image_tokens (`int`): the latent tokens of all images.
    """

    images: list[Any]
    num_prompt_tokens: int
    num_image_tokens: int


@dataclass(frozen=True)
class Preview:
    """What an image will look like.

    Args:
        image (`int`): the number of the image in the request.
        number (`int`): the number of the preview, from 0.
        preview: the image, of the request's `output_type`.
    """

    image: int
    number: int
    preview: Any


@dataclass(eq=False)
class _Job:
    """A request from its arrival to its result."""

    request: Any
    future: Future
    on_event: Callable[[Any], None]
    images: list[RunningImage] = field(default_factory=list)
    results: dict[int, Any] = field(default_factory=dict)


class Engine:
    """Generates images and answers for many requests at once.

    `submit` returns a `concurrent.futures.Future`. Cancelling it drops the request at the next tick.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline. As long as the engine is open, nothing else may use it.
        max_images (`int`, defaults to 32): how many images are generated at a time; it limits the memory.
        max_waiting (`int`, defaults to 128): how many requests may wait.
        max_chats (`int`, defaults to 4): how many answers are generated at a time.
        patience (`int`, defaults to 32): see [`ExpertBatches`].
        adapters (`Path`, *optional*): a folder of adapters, see [`AdapterCache`].
        max_adapters (`int`, defaults to 8): how many adapters are loaded at a time.

    Raises:
        `ValueError`: if a number is out of range, or another off-loading than that of experts is enabled.
    """

    def __init__(
        self,
        pipe: Any,
        max_images: int = 32,
        max_waiting: int = 128,
        max_chats: int = 4,
        patience: int = 32,
        adapters: Path | None = None,
        max_adapters: int = 8,
    ):
        limits = {"max_images": max_images, "max_waiting": max_waiting, "max_chats": max_chats}
        for name, limit in limits.items():
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}.")
        if has_forward_hooks(pipe.model) or has_forward_hooks(pipe.vae):
            raise ValueError("the engine needs a pipeline without off-loading, or with enable_expert_offload alone.")
        self.pipe, self.max_images, self.max_waiting, self.max_chats = pipe, max_images, max_waiting, max_chats
        self.batches = ExpertBatches(pipe.model, patience)
        self.adapter_cache = AdapterCache(pipe, adapters, max_adapters, on_drop=self.batches.forget_adapter)
        self.on_step: Callable[[int, int, float], None] = lambda expert, num_images, seconds: None
        self._job_of: dict[RunningImage, _Job] = {}
        self._chats: set[_Job] = set()
        self._waiting: deque[_Job] = deque()
        self._turns = FairLock()
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._chat_threads = ThreadPoolExecutor(max_chats, thread_name_prefix="latte-flow-chat")

    # For the server.

    @property
    def default_size(self) -> int:
        """The height and width of an image whose request gives none, in pixels."""
        return self.pipe.default_size

    @property
    def size_multiple(self) -> int:
        """What heights and widths must be multiples of, in pixels."""
        return self.pipe._size_multiple

    @property
    def num_running(self) -> int:
        """Images that are being generated."""
        return len(self.batches)

    @property
    def num_chats(self) -> int:
        """Answers that are being generated."""
        return len(self._chats)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def adapters(self) -> list[str]:
        """The adapters that a request may name."""
        return self.adapter_cache.names()

    def submit(
        self, request: ImageRequest | ChatRequest, on_event: Callable[[Any], None] = lambda event: None
    ) -> Future:
        """Let a request wait for its turn.

        Args:
            request ([`ImageRequest`] or [`ChatRequest`]): what to generate.
            on_event (`Callable`): called in a thread of the engine with `None` when the request starts, then with each
                [`Preview`] of an image, or each piece of an answer.

        Returns:
            `Future`: of [`GeneratedImages`], or of a [`ChatAnswer`]. It raises a `ValueError` if the request is
            invalid, and a [`GenerationError`] if it fails otherwise.

        Raises:
            `ValueError`: if more images are asked for than fit.
            [`QueueFullError`], [`EngineClosedError`]
        """
        if isinstance(request, ImageRequest) and request.num_images > self.max_images:
            raise ValueError(f"num_images must be at most {self.max_images}, got {request.num_images}.")
        job = _Job(request, Future(), on_event)
        with self._wake:
            if self._is_closing:
                raise EngineClosedError("the server is shutting down.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting; try again later.")
            self._waiting.append(job)
            self._wake.notify()
        return job.future

    def start(self) -> None:
        """Run ticks in a thread until [`~Engine.close`]."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="latte-flow-engine", daemon=True)
        self._thread.start()

    def close(self, finish: bool = True) -> None:
        """Take no more requests, and end.

        Args:
            finish (`bool`, defaults to `True`): whether to finish those that run or wait, or to cancel them.
        """
        with self._wake:
            self._is_closing = True
            if not finish:
                for job in [*self._waiting, *self._chats, *self._job_of.values()]:
                    job.future.cancel()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._chat_threads.shutdown()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_closing or self._waiting or len(self.batches))
                if self._is_closing and not (self._waiting or self._chats or len(self.batches)):
                    return
            try:
                is_busy = self.tick()
            except Exception as error:
                logger.exception("A tick of the engine failed.")
                self._fail_all(error)
                is_busy = True
            if not is_busy:
                # Requests wait for a chat to end.
                with self._wake:
                    self._wake.wait(timeout=0.1)

    def _fail_all(self, error: Exception) -> None:
        for job in set(self._job_of.values()):
            self._end(job, error=GenerationError(str(error)))

    # A tick.

    def tick(self) -> bool:
        """Do the next piece of work. The thread calls this; without [`~Engine.start`], the caller may.

        Returns:
            `bool`: whether there was any.
        """
        with self._turns:
            self._drop_cancelled()
            has_started = self._start_waiting()
            batch = self.batches.choose()
            if batch:
                self._step(batch)
        return has_started or bool(batch)

    def _drop_cancelled(self) -> None:
        for job in {job for job in self._job_of.values() if job.future.cancelled()}:
            self._end(job)
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _start_waiting(self) -> bool:
        """Start requests in the order of arrival, as long as there is room for the next one."""
        starting: dict[str | None, list[_Job]] = {}
        num_images = len(self.batches)
        while self._waiting:
            job = self._waiting[0]
            is_chat = isinstance(job.request, ChatRequest)
            needed = num_images + (0 if is_chat else job.request.num_images)
            if needed > self.max_images or (is_chat and len(self._chats) >= self.max_chats):
                break
            try:
                if not self.adapter_cache.acquire(job.request.adapter):
                    break
            except Exception as error:
                self._waiting.popleft()
                _resolve(job.future, error=error)
                continue
            num_images = needed
            if is_chat:
                self._chats.add(job)
                self._chat_threads.submit(self._chat, job)
            else:
                starting.setdefault(job.request.adapter, []).append(job)
            self._waiting.popleft()
        for adapter, jobs in starting.items():
            self._start_images(adapter, jobs)
        return bool(starting)

    def _start_images(self, adapter: str | None, jobs: Sequence[_Job]) -> None:
        try:
            self.adapter_cache.activate(adapter)
            outcomes = start_images(self.pipe, [job.request for job in jobs])
        except Exception as error:
            outcomes = [GenerationError(str(error) or type(error).__name__) for _ in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._end(job, error=outcome)
                continue
            job.images = outcome
            for image in job.images:
                self._job_of[image] = job
            self.batches.add(job.images)
            _notify(job, None)

    def _step(self, batch: Sequence[RunningImage]) -> None:
        start, expert = time.perf_counter(), batch[0].expert
        self.adapter_cache.activate(batch[0].adapter)
        errors = self.batches.step(batch)
        for image, error in errors.items():
            self._fail(image, error)
        # An error of one image of a request ends the others.
        batch_left = [image for image in batch if image in self._job_of]
        done = [image for image in batch_left if image.is_done]
        self.batches.remove(done)
        self._decode(done)
        self._show_previews([image for image in batch_left if not image.is_done])
        self.on_step(expert, len(batch), time.perf_counter() - start)

    def _decode(self, images: Sequence[RunningImage]) -> None:
        outcomes = decode_each(self.pipe, [image.latents for image in images], self._output_types(images))
        for image, outcome in zip(images, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(image, outcome)
                continue
            job = self._job_of.get(image)
            if job is None:
                continue  # Another image of the request has failed.
            job.results[job.images.index(image)] = outcome
            if len(job.results) == len(job.images):
                results = [job.results[number] for number in range(len(job.images))]
                self._end(job, generated_images(results, job.images, self.pipe.model.config))

    def _show_previews(self, images: Sequence[RunningImage]) -> None:
        shown = [image for image in images if image.index in self._preview_steps(image)]
        outcomes = decode_each(self.pipe, [image.prediction() for image in shown], self._output_types(shown))
        for image, outcome in zip(shown, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                job = self._job_of[image]
                number = self._preview_steps(image).index(image.index)
                _notify(job, Preview(job.images.index(image), number, outcome))

    def _preview_steps(self, image: RunningImage) -> list[int]:
        """After which evaluations an image is shown, evenly spaced; fewer than asked for if there are fewer."""
        num_previews, num_steps = self._job_of[image].request.num_previews, len(image.experts)
        steps = [round(num_steps * (number + 1) / (num_previews + 1)) for number in range(num_previews)]
        return sorted({step for step in steps if 0 < step < num_steps})

    def _output_types(self, images: Sequence[RunningImage]) -> list[str]:
        return [self._job_of[image].request.output_type for image in images]

    def _fail(self, image: RunningImage, error: Exception) -> None:
        job = self._job_of.get(image)
        if job is not None:
            self._end(job, error=GenerationError(str(error) or type(error).__name__))

    def _end(self, job: _Job, result: Any = None, error: Exception | None = None) -> None:
        self.batches.remove(job.images)
        for image in job.images:
            self._job_of.pop(image, None)
        self.adapter_cache.release(job.request.adapter)
        _resolve(job.future, result, error)

    # Chats.

    def _chat(self, job: _Job) -> None:
        """Answer, in a thread for chats, with a turn for each token."""
        adapter = job.request.adapter

        def give_turn() -> None:
            self._turns.__exit__()
            self._turns.__enter__()
            if job.future.cancelled():
                raise ChatStoppedError
            self.adapter_cache.activate(adapter)

        answer: ChatAnswer | None = None
        error: Exception | None = None
        with self._turns:
            try:
                self.adapter_cache.activate(adapter)
                _notify(job, None)
                answer = run_chat(self.pipe, job.request, lambda text: _notify(job, text), give_turn)
            except ValueError as invalid:
                error = invalid
            except Exception as failure:
                error = GenerationError(str(failure) or type(failure).__name__)
            self.adapter_cache.release(adapter)
        _resolve(job.future, answer, error)
        with self._wake:
            self._chats.discard(job)
            self._wake.notify()


def generated_images(results: list[Any], images: Sequence[RunningImage], config: Any) -> GeneratedImages:
    """The result of a request whose images are decoded."""
    context = images[0].context
    assert context is not None
    num_tokens = images[0].latents[0, 0].numel() // config.latent_patch_size**2
    return GeneratedImages(results, context.attention_mask.shape[1], num_tokens * len(images))


@torch.no_grad()
def decode_each(pipe: Any, latents: Sequence[torch.Tensor], output_types: Sequence[str]) -> list[Any]:
    """Decode images of any sizes, those of equal size together.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        latents (`list[torch.Tensor]`): of each image, (1, C, height, width).
        output_types (`list[str]`): of each image.

    Returns:
        `list`: of each image the image, or the exception: if images cannot be decoded together, they are decoded one
        by one.
    """
    outcomes: dict[int, Any] = {}
    groups: dict[tuple, list[int]] = {}
    for index, (each, output_type) in enumerate(zip(latents, output_types, strict=True)):
        groups.setdefault((output_type, each.shape), []).append(index)
    for (output_type, _), indices in groups.items():
        for start in range(0, len(indices), DECODE_BATCH):
            batch = indices[start : start + DECODE_BATCH]
            try:
                joined = torch.cat([latents[index] for index in batch])
                decoded = joined if output_type == "latent" else pipe.decode_latents(joined, output_type)
                outcomes |= dict(zip(batch, decoded, strict=True))
            except Exception as error:
                if len(batch) == 1:
                    outcomes[batch[0]] = error
                    continue
                for index in batch:
                    (outcomes[index],) = decode_each(pipe, [latents[index]], [output_type])
    return [outcomes[index] for index in range(len(latents))]


def _notify(job: _Job, event: Any) -> None:
    """Tell whoever waits; an error of theirs is none of the engine's."""
    try:
        job.on_event(event)
    except Exception:
        logger.exception("on_event failed.")
        job.future.cancel()


def _resolve(future: Future, result: Any = None, error: Exception | None = None) -> None:
    """End a future, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
