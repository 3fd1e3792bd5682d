# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The server on Ray Serve, in two shapes. Ray places, starts, scales and restarts processes; nothing here does.

- `replicas`: each replica is a whole server with a pipeline.
- `staged`: the backbone, each expert and the decoder are deployments of their own, behind one that speaks HTTP. Each
  holds its part of the weights, batches what is there, and is placed and scaled on its own.
"""

import asyncio
import dataclasses
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from transformers.utils import logging

from ..checkpoints import tiny_checkpoint
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from .chat import ChatRequest, ChatStoppedError, run_chat
from .engine import (
    Engine,
    EngineClosedError,
    GeneratedImages,
    GenerationError,
    Preview,
    QueueFullError,
    UnavailableError,
    decode_each,
    generated_images,
)
from .running_image import ImageRequest, RunningImage, start_images
from .server import create_app
from .settings import ServerSettings
from .stages import ExpertStage, for_expert, keep_backbone, keep_decoder, keep_expert


logger = logging.get_logger(__name__)

# How often a piece of work is begun again whose process ended in the middle.
MAX_ATTEMPTS = 5

# Its annotations are those of the decorator.
deployment: Any = serve.deployment


class AppArguments(BaseModel):
    """The `args` of a configuration file.

    Args:
        shape (`str`, defaults to `"replicas"`): `"replicas"` or `"staged"`.
        model (`str`, *optional*): folder or hub id of a pipeline; defaults to the embedded checkpoint.
        device (`str`, defaults to `"cpu"`): where each process runs its part, such as `"cuda"`.
        dtype (`str`, defaults to `"float32"`): of all weights.
        adapters (`str`, *optional*): a folder of adapters; with `replicas` only.
        max_images (`int`, defaults to 32): how many images a replica, or all stages, generate at a time.
        max_waiting (`int`, defaults to 128): how many requests may wait.
        settings (`dict`): fields of [`ServerSettings`].
    """

    model_config = ConfigDict(extra="forbid")

    shape: Literal["replicas", "staged"] = "replicas"
    model: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    adapters: str | None = None
    max_images: int = 32
    max_waiting: int = 128
    settings: dict[str, Any] = {}

    def load(self, keep: Callable[..., None] | None = None, *options: Any) -> Any:
        """The pipeline on its device, or the part that one of the functions of [`stages`] keeps."""
        pipe = LatteFlowPipeline.from_pretrained(self.model or tiny_checkpoint(), dtype=getattr(torch, self.dtype))
        pipe.set_progress_bar_config(disable=True)
        if keep is None:
            return pipe.to(self.device)
        keep(pipe, *options, self.device)
        return pipe

    def config(self) -> LatteFlowConfig:
        return LatteFlowConfig.from_pretrained(self.model or tiny_checkpoint(), subfolder="model")

    def server_settings(self) -> ServerSettings:
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()
        }
        key = os.environ.get("LATTE_FLOW_API_KEY")
        if key and "api_keys" not in settings:
            settings["api_keys"] = (key,)
        settings.setdefault("model_name", "tinyworld" if self.model is None else Path(self.model).name)
        # Another process may be asked for an image than the one that has it.
        settings["gives_urls"] = False
        return ServerSettings(**settings)


def app(arguments: AppArguments) -> Any:
    """What `serve run latte_flow_hf.serving:app` runs.

    Raises:
        `ValueError`: if the arguments contradict each other.
    """
    arguments.server_settings()
    if arguments.shape == "staged":
        if arguments.adapters is not None:
            raise ValueError("adapters need shape 'replicas': with 'staged', each expert is a process of its own.")
        return _staged(arguments)

    def build() -> Any:
        engine = Engine(
            arguments.load(),
            arguments.max_images,
            arguments.max_waiting,
            adapters=None if arguments.adapters is None else Path(arguments.adapters),
        )
        return create_app(engine, arguments.server_settings())

    replica = deployment(serve.ingress(build)(), name="Replica", max_ongoing_requests=_limit(arguments))
    return replica.bind()


def _limit(arguments: AppArguments) -> int:
    # One more than the engine takes: the engine answers that it is full.
    return arguments.max_images + arguments.max_waiting + 1


def _staged(arguments: AppArguments) -> Any:
    config = arguments.config()
    limit = _limit(arguments)
    stages = [
        deployment(Backbone, name="Backbone", max_ongoing_requests=limit).bind(arguments),
        deployment(Decoder, name="Decoder", max_ongoing_requests=limit).bind(arguments),
    ]
    for expert in range(config.num_experts):
        stages.append(deployment(Expert, name=f"Expert{expert}", max_ongoing_requests=limit).bind(arguments, expert))

    def build() -> Any:
        return create_app(StagedEngine(arguments), arguments.server_settings())

    front = deployment(serve.ingress(build)(), name="Front", max_ongoing_requests=limit)
    return front.bind(*stages)


class Backbone:
    """Encodes prompts and chats."""

    def __init__(self, arguments: AppArguments):
        self.pipe = arguments.load(keep_backbone)

    def sizes(self) -> tuple[int, int]:
        """The default size of images and what sizes must be multiples of, in pixels."""
        return self.pipe.default_size, self.pipe._size_multiple

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def start(self, requests: list[ImageRequest]) -> list[Any]:
        """The images of each request, before their first step; or its error."""
        outcomes = await asyncio.to_thread(start_images, self.pipe, requests)
        return [
            outcome if isinstance(outcome, Exception) else [image.to("cpu") for image in outcome]
            for outcome in outcomes
        ]

    async def chat(self, request: ChatRequest) -> AsyncIterator[Any]:
        """The pieces of an answer, and the [`ChatAnswer`]."""
        loop, is_open = asyncio.get_running_loop(), True
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def stop_if_left() -> None:
            if not is_open:
                raise ChatStoppedError

        answer = asyncio.ensure_future(asyncio.to_thread(run_chat, self.pipe, request, put, stop_if_left))
        answer.add_done_callback(lambda _: put(None))
        try:
            while (item := await queue.get()) is not None:
                yield item
            yield answer.result()
        finally:
            is_open = False


class Expert:
    """One expert: takes images through its interval."""

    def __init__(self, arguments: AppArguments, expert: int):
        pipe = arguments.load(keep_expert, expert)
        self.device = arguments.device
        self.stage = ExpertStage(pipe.model, expert)

    async def run(self, image: RunningImage) -> RunningImage:
        """The image after the last step of this expert, without its prompts."""
        done = await asyncio.wrap_future(self.stage.submit(image.to(self.device)))
        return dataclasses.replace(done, context=None, negative_context=None).to("cpu")

    def num_weights(self) -> int:
        """How many weights this process holds."""
        model = self.stage.batches.model
        return sum(weight.numel() for weight in model.parameters() if weight.device.type != "meta")

    def process_id(self) -> int:
        return os.getpid()


class Decoder:
    """Decodes latents."""

    def __init__(self, arguments: AppArguments):
        self.device = arguments.device
        self.pipe = arguments.load(keep_decoder)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def decode(self, latents: list[torch.Tensor]) -> list[Any]:
        """The image of each (1, C, height, width); or its error."""
        moved = [each.to(self.device) for each in latents]
        return await asyncio.to_thread(decode_each, self.pipe, moved, ["pil"] * len(moved))


class StagedEngine:
    """An engine whose work is done by the other deployments; the same interface as [`Engine`] for the server.

    It keeps the state of each image before it goes to an expert. If the process of the expert ends in the middle, the
    image goes there again, to another replica or the one that Ray starts in its place, and becomes the same image.

    Args:
        arguments ([`AppArguments`]): the arguments of the app.
    """

    def __init__(self, arguments: AppArguments):
        self.max_images, self.max_waiting = arguments.max_images, arguments.max_waiting
        self.config = arguments.config()
        self.on_step: Callable[[int, int, float], None] = lambda expert, num_images, seconds: None
        self.num_running = self.num_waiting = self.num_chats = 0
        self._room = Room(self.max_images)
        self.is_alive = False
        self.default_size = self.size_multiple = 0
        self._tasks: set[asyncio.Task] = set()
        self._is_closing = False

    async def start(self) -> None:
        """Called in the event loop in which the requests come."""
        self._loop = asyncio.get_running_loop()
        self._backbone, self._decoder = (serve.get_deployment_handle(name) for name in ("Backbone", "Decoder"))
        self._experts = [serve.get_deployment_handle(f"Expert{k}") for k in range(self.config.num_experts)]
        self.default_size, self.size_multiple = await self._backbone.sizes.remote()
        self.is_alive = True

    def close(self) -> None:
        """Take no more requests, and finish those that run or wait."""
        self._is_closing = True
        asyncio.run_coroutine_threadsafe(self._wait_for_all(), self._loop).result()
        self.is_alive = False

    async def _wait_for_all(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def adapters(self) -> list[str]:
        """None: experts are processes of their own."""
        return []

    def submit(
        self, request: ImageRequest | ChatRequest, on_event: Callable[[Any], None] = lambda event: None
    ) -> Future:
        """Same as [`Engine.submit`], in the event loop of [`~StagedEngine.start`]."""
        if self._is_closing:
            raise EngineClosedError("the server is shutting down.")
        if isinstance(request, ImageRequest) and request.num_images > self.max_images:
            raise ValueError(f"num_images must be at most {self.max_images}, got {request.num_images}.")
        if self.num_waiting >= self.max_waiting:
            raise QueueFullError(f"{self.num_waiting} requests are waiting; try again later.")
        future: Future = Future()
        work = self._chat(request, on_event) if isinstance(request, ChatRequest) else self._images(request, on_event)
        task = self._loop.create_task(self._resolve(future, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        future.add_done_callback(lambda done: done.cancelled() and self._loop.call_soon_threadsafe(task.cancel))
        return future

    async def _resolve(self, future: Future, work: Coroutine) -> None:
        try:
            result = await work
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(_cause(error))
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    async def _chat(self, request: ChatRequest, on_event: Callable[[Any], None]) -> Any:
        self.num_chats += 1
        try:
            on_event(None)
            item = None
            pieces: Any = self._backbone.options(stream=True).chat.remote(request)
            async for item in pieces:
                if isinstance(item, str):
                    on_event(item)
            return item
        finally:
            self.num_chats -= 1

    async def _images(self, request: ImageRequest, on_event: Callable[[Any], None]) -> GeneratedImages:
        self.num_waiting += 1
        try:
            await self._room.acquire(request.num_images)
        finally:
            self.num_waiting -= 1
        self.num_running += request.num_images
        try:
            images = await self._again(self._backbone.start, request)
            if isinstance(images, Exception):
                raise images
            on_event(None)
            results = await asyncio.gather(
                *(self._image(image, number, request, on_event) for number, image in enumerate(images))
            )
            return generated_images(results, images, self.config)
        finally:
            self.num_running -= request.num_images
            self._room.release(request.num_images)

    async def _image(
        self, image: RunningImage, number: int, request: ImageRequest, on_event: Callable[[Any], None]
    ) -> Any:
        """An image on its way from expert to expert, and its decoded pixels."""
        contexts = {"context": image.context, "negative_context": image.negative_context}
        num_shown = 0
        while not image.is_done:
            # `image` stays as it is here, for another attempt.
            moved = await self._again(self._experts[image.expert].run, for_expert(image, self.config))
            image = dataclasses.replace(moved, **contexts)
            if not image.is_done and num_shown < request.num_previews:
                on_event(Preview(number, num_shown, await self._decoded(image.prediction())))
                num_shown += 1
        return await self._decoded(image.latents)

    async def _decoded(self, latents: torch.Tensor) -> Any:
        decoded = await self._again(self._decoder.decode, latents)
        if isinstance(decoded, Exception):
            raise GenerationError(str(decoded))
        return decoded

    async def _again(self, method: Any, *arguments: Any) -> Any:
        """Call a deployment, again if its process ends in the middle. All calls are free of side effects."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return await method.remote(*arguments)
            except (RayActorError, ReplicaUnavailableError, BackPressureError) as error:
                logger.warning(f"Attempt {attempt} of {MAX_ATTEMPTS} failed: {type(error).__name__}.")
                last = error
                await asyncio.sleep(0.2 * attempt)
        raise UnavailableError("a part of the model does not run at present; try again.") from last


class Room:
    """A number of places that several at once can take, in the order of asking.

    Args:
        num_places (`int`): how many there are.
    """

    def __init__(self, num_places: int):
        self._num_free = num_places
        self._waiting: deque[tuple[int, asyncio.Future]] = deque()

    async def acquire(self, num_places: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((num_places, turn))
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(num_places)
            self._waiting = deque(item for item in self._waiting if item[1] is not turn)
            self._give()
            raise

    def release(self, num_places: int) -> None:
        self._num_free += num_places
        self._give()

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._num_free:
            num_places, turn = self._waiting.popleft()
            if not turn.done():
                self._num_free -= num_places
                turn.set_result(None)


def _cause(error: Exception) -> Exception:
    """The error inside of one that Ray wraps: a `ValueError` of the pipeline is one of the request."""
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, ValueError):
        return ValueError(str(cause))
    if isinstance(error, (ValueError, GenerationError)):
        return error
    return GenerationError(str(error) or type(error).__name__)
