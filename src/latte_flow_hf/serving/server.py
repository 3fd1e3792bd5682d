# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The web interface of an engine, in the shapes of OpenAI: its official client works against it.

Nothing here computes. A request is checked, handed to the engine, and its result is put into a response. The app runs
in one event loop, the engine in threads of its own.
"""

import asyncio
import base64
import dataclasses
import hmac
import json
import math
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Form, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.utils import logging

from .chat import ChatRequest
from .engine import EngineClosedError, Preview, QueueFullError, UnavailableError
from .errors import ApiError
from .pictures import MEDIA_TYPES, image_file, open_image, open_mask, read_image
from .running_image import ImageRequest
from .schemas import ChatBody, ImageBody, ImageEditForm, ImageGenerationBody, Message
from .settings import ServerSettings


logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 256

# Images whose URLs were given out are kept in memory. (Chosen: an hour, as OpenAI's URLs live; and so that they cannot
# fill the memory.)
URL_SECONDS = 3600
MAX_STORED_BYTES = 256 * 2**20


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ClientGoneError(Exception):
    """Nobody waits for the response any more."""


class ImageStore:
    """The files behind URLs, the oldest ones dropped first."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES, seconds: float = URL_SECONDS):
        self.max_bytes, self.seconds = max_bytes, seconds
        self._files: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self._num_bytes = 0

    def add(self, data: bytes, output_format: str) -> str:
        """Keep a file, and return a name that cannot be guessed."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        self._files[name] = (time.monotonic() + self.seconds, MEDIA_TYPES[output_format], data)
        self._num_bytes += len(data)
        while self._num_bytes > self.max_bytes or self._is_old(next(iter(self._files))):
            _, (_, _, dropped) = self._files.popitem(last=False)
            self._num_bytes -= len(dropped)
            if not self._files:
                break
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """The media type and the bytes of a file, or `None` if it is gone."""
        if name not in self._files or self._is_old(name):
            return None
        return self._files[name][1:]

    def _is_old(self, name: str) -> bool:
        return self._files[name][0] < time.monotonic()


class Metrics:
    """What `/metrics` shows."""

    def __init__(self, engine: Any):
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("latte_flow_requests", "Requests.", ["path", "status"], **options)
        self.seconds = Histogram(
            "latte_flow_request_seconds",
            "From the arrival of a request to the end of its response.",
            ["path"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            **options,
        )
        self.images = Counter("latte_flow_images", "Generated images.", **options)
        self.tokens = Counter("latte_flow_chat_tokens", "Tokens of answers.", **options)
        self.batch_size = Histogram(
            "latte_flow_batch_size", "Images in a step.", ["expert"], buckets=(1, 2, 4, 8, 16, 32, 64), **options
        )
        self.step_seconds = Histogram(
            "latte_flow_step_seconds",
            "A step of a batch, with decoding.",
            ["expert"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
            **options,
        )
        for name, text, function in (
            ("images_running", "Images that are being generated.", lambda: engine.num_running),
            ("chats_running", "Answers that are being generated.", lambda: engine.num_chats),
            ("requests_waiting", "Requests that wait.", lambda: engine.num_waiting),
        ):
            Gauge(f"latte_flow_{name}", text, **options).set_function(function)
        engine.on_step = self._on_step

    def _on_step(self, expert: int, num_images: int, seconds: float) -> None:
        self.batch_size.labels(expert).observe(num_images)
        self.step_seconds.labels(expert).observe(seconds)


class Gate:
    """What every request passes before anything is read of its body: its origin, its key, its size, the counters."""

    def __init__(self, app: Any, settings: ServerSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # Of a client that has left.

        async def send_and_note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, send_and_note)
            else:
                await self.app(scope, self._limited(receive), send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            # The path of the route, since others could be of any number.
            path = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        # A browser sends forms of any page to a local server without asking, and names the page.
        origin = headers.get(b"origin")
        if origin is not None and origin.rpartition(b"//")[2] != headers.get(b"host"):
            return ApiError(403, "Pages of other sites cannot use this server.", "cross_origin")
        # Names of images cannot be guessed, and browsers that show them send no key.
        is_open = scope["path"] == "/health" or scope["path"].startswith("/v1/images/files/")
        if self.settings.api_keys and not is_open:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # All of them, so that the time does not tell which one.
            matches = [hmac.compare_digest(given.strip(), key.encode()) for key in self.settings.api_keys]
            if scheme.lower() != b"bearer" or not any(matches):
                return ApiError(
                    401,
                    "Give a valid API key: Authorization: Bearer KEY.",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body_size:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request has more than {self.settings.max_body_size} bytes.",
            "request_too_large",
            headers={"Connection": "close"},
        )

    def _limited(self, receive: Callable) -> Callable:
        """`receive`, for bodies whose length is not announced."""
        num_bytes = 0

        async def limited() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.settings.max_body_size:
                # FastAPI passes its own exceptions on.
                raise HTTPException(413, self._too_large().message)
            return message

        return limited


def create_app(engine: Any, settings: ServerSettings | None = None) -> FastAPI:
    """The web app of an engine.

    Args:
        engine ([`Engine`]): the engine; started and closed with the app.
        settings ([`ServerSettings`], *optional*): names and limits.
    """
    settings = ServerSettings() if settings is None else settings
    created = int(time.time())
    metrics = Metrics(engine)
    store = ImageStore()
    finished: deque[float] = deque(maxlen=32)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        started = engine.start()
        if started is not None:
            await started
        yield
        await asyncio.to_thread(engine.close)

    # Its pages of documentation would load scripts from elsewhere.
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    app = FastAPI(title="latte_flow_hf", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    _add_error_handlers(app)
    own_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        """Same as FastAPI's, without its status of invalid requests, which is 400 here."""
        schema = own_openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

    def adapter_of(model: str | None) -> str | None:
        """The adapter in `model:adapter`."""
        base, colon, adapter = (settings.model_name if model is None else model).partition(":")
        if base == settings.model_name and (not colon or adapter in engine.adapters()):
            return adapter or None
        raise ApiError(404, f"The model {model!r} does not exist; see /v1/models.", "model_not_found", "model")

    def submit(request: ImageRequest | ChatRequest, on_event: Callable[[Any], None]) -> Future:
        try:
            future = engine.submit(request, on_event)
        except QueueFullError as error:
            raise ApiError(
                429, str(error), "queue_full", headers={"Retry-After": str(_retry_after(engine.num_waiting, finished))}
            ) from error
        except EngineClosedError as error:
            raise ApiError(503, str(error), "shutting_down", headers={"Retry-After": "5"}) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        future.add_done_callback(lambda done: finished.append(time.monotonic()))
        return future

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine runs."""
        if not engine.is_alive:
            raise ApiError(503, "The engine does not run.", "not_running")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Counters in the format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "latte_flow_hf"}

    def model_names() -> list[str]:
        return [settings.model_name, *(f"{settings.model_name}:{adapter}" for adapter in engine.adapters())]

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The model, and the model with each adapter."""
        return JSONResponse({"object": "list", "data": [describe(name) for name in model_names()]})

    @app.get("/v1/models/{name}")
    async def show_model(name: str) -> Response:
        """One of the models."""
        if name not in model_names():
            raise ApiError(404, f"The model {name!r} does not exist; see /v1/models.", "model_not_found", "model")
        return JSONResponse(describe(name))

    @app.get("/v1/images/files/{name}")
    async def show_file(name: str) -> Response:
        """An image of which a response had the URL."""
        found = store.get(name)
        if found is None:
            raise ApiError(404, "There is no such image, or it has expired.", "not_found")
        return Response(found[1], media_type=found[0], headers={"X-Content-Type-Options": "nosniff"})

    async def respond(request: Request, body: ImageBody, asked: ImageRequest, kind: str) -> Response:
        """The images of a request, in the form that it asks for; `kind` begins the types of streamed events."""
        output_format = body.output_format or "png"
        about = {
            "background": "opaque",
            "output_format": output_format,
            "quality": "auto",
            "size": f"{asked.width}x{asked.height}",
        }

        async def encoded(image: Any) -> bytes:
            return await asyncio.to_thread(image_file, image, output_format, body.output_compression)

        events = _events(request, lambda on_event: submit(asked, on_event))
        if body.stream:
            await anext(events)  # Its start; errors before have a status of their own.

            async def stream() -> AsyncIterator[bytes]:
                async for event in events:
                    if isinstance(event, Preview):
                        name, image = f"{kind}.partial_image", event.preview
                        more: dict[str, Any] = {"partial_image_index": event.number}
                    else:
                        metrics.images.inc()
                        name, image = f"{kind}.completed", event.images[0]
                        more = {"seed": asked.seed, "usage": _image_usage(event)}
                    b64_json = base64.b64encode(await encoded(image)).decode()
                    created_at = int(time.time())
                    yield _sse({"type": name, "b64_json": b64_json, "created_at": created_at, **more, **about}, name)

            return _stream(stream())

        *_, result = [event async for event in events]
        metrics.images.inc(len(result.images))
        data: list[dict[str, Any]] = []
        for number, image in enumerate(result.images):
            file = await encoded(image)
            if body.response_format == "url":
                path = f"v1/images/files/{store.add(file, output_format)}"
                content = {"url": f"{request.base_url}{path}"}
            else:
                content = {"b64_json": base64.b64encode(file).decode()}
            data.append({**content, "seed": asked.seed + number})
        return JSONResponse({"created": int(time.time()), "data": data, "usage": _image_usage(result), **about})

    @app.post("/v1/images/generations")
    async def generate(body: ImageGenerationBody, request: Request) -> Response:
        """Generate images."""
        asked = _image_request(body, body.guidance, adapter_of(body.model), engine, settings)
        return await respond(request, body, asked, "image_generation")

    @app.post("/v1/images/edits")
    async def edit(body: Annotated[ImageEditForm, Form()], request: Request) -> Response:
        """Generate images from an image, or a part of it anew."""
        asked = _image_request(body, body.guidance, adapter_of(body.model), engine, settings)
        source = await asyncio.to_thread(open_image, await body.image.read(), settings, "image")
        mask = None
        if body.mask is not None:
            mask = await asyncio.to_thread(open_mask, await body.mask.read(), settings, "mask")
        asked = dataclasses.replace(asked, source_image=source, mask_image=mask, strength=body.strength)
        return await respond(request, body, asked, "image_edit")

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer about text and images."""
        adapter = adapter_of(body.model)
        asked = await asyncio.to_thread(_chat_request, body, adapter, settings)
        common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        common["model"] = settings.model_name if adapter is None else f"{settings.model_name}:{adapter}"
        events = _events(request, lambda on_event: submit(asked, on_event))
        if not body.stream:
            *_, answer = [event async for event in events]
            metrics.tokens.inc(answer.num_tokens)
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
            return JSONResponse(
                {**common, "object": "chat.completion", "choices": [choice], "usage": _chat_usage(answer)}
            )
        await anext(events)
        has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            usage = {"usage": None} if has_usage else {}
            return _sse({**common, "object": "chat.completion.chunk", "choices": [choice], **usage})

        async def stream() -> AsyncIterator[bytes]:
            yield chunk({"role": "assistant", "content": ""})
            async for event in events:
                if isinstance(event, str):
                    yield chunk({"content": event})
                    continue
                metrics.tokens.inc(event.num_tokens)
                yield chunk({}, event.finish_reason)
                if has_usage:
                    usage = _chat_usage(event)
                    yield _sse({**common, "object": "chat.completion.chunk", "choices": [], "usage": usage})
                yield b"data: [DONE]\n\n"

        return _stream(stream())

    return app


def _image_request(
    body: ImageBody, guidance: Any, adapter: str | None, engine: Any, settings: ServerSettings
) -> ImageRequest:
    """What the engine is asked for.

    Raises:
        [`ApiError`]: if a limit of the server is exceeded.
    """
    num_images = body.n or 1
    width = height = engine.default_size
    if body.size not in (None, "auto"):
        width, height = map(int, body.size.split("x"))  # type: ignore[union-attr]
    largest = settings.max_size or 2 * engine.default_size
    multiple = engine.size_multiple
    _check_limit("n", num_images, settings.max_images_per_request)
    if max(width, height) > largest or width % multiple or height % multiple:
        raise ApiError(
            400,
            f"size must have a width and a height of at most {largest} that are multiples of {multiple}, got "
            f"{body.size!r}.",
            "invalid_size",
            "size",
        )
    _check_limit("steps", body.steps or 1, settings.max_steps)
    for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        _check_length(name, len(text or ""), settings)
    if body.stream and num_images > 1:
        raise ApiError(400, f"n must be 1 with stream, got {num_images}.", param="n")
    if body.stream and body.response_format == "url":
        raise ApiError(400, "response_format must be 'b64_json' with stream.", param="response_format")
    if body.response_format == "url" and not settings.gives_urls:
        raise ApiError(400, "response_format must be 'b64_json' on this server.", param="response_format")
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images needs stream=true.", param="partial_images")
    if body.output_compression is not None and (body.output_format or "png") == "png":
        raise ApiError(400, "output_compression is for webp and jpeg only.", param="output_compression")
    return ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=body.steps,
        guidance_scale=guidance,
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        num_images=num_images,
        adapter=adapter,
        num_previews=body.partial_images or 0,
    )


def _chat_request(body: ChatBody, adapter: str | None, settings: ServerSettings) -> ChatRequest:
    """What the engine is asked for; reads the images.

    Raises:
        [`ApiError`]: if a limit of the server is exceeded, or an image cannot be read.
    """
    _check_limit("messages", len(body.messages), settings.max_messages)
    parts = [part for message in body.messages if not isinstance(message.content, str) for part in message.content]
    texts = [message.content for message in body.messages if isinstance(message.content, str)]
    texts += [part.text for part in parts if part.type == "text"]
    _check_length("messages", sum(map(len, texts)), settings)
    _check_limit("images in messages", sum(part.type == "image_url" for part in parts), settings.max_input_images)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both.", param="max_tokens")
    max_new_tokens = body.max_completion_tokens or body.max_tokens or min(DEFAULT_NEW_TOKENS, settings.max_new_tokens)
    _check_limit("max_completion_tokens", max_new_tokens, settings.max_new_tokens)
    return ChatRequest(
        [_message(message, f"messages[{index}]", settings) for index, message in enumerate(body.messages)],
        adapter,
        max_new_tokens,
        body.temperature or 0.0,
        1.0 if body.top_p is None else body.top_p,
        secrets.randbelow(2**32) if body.seed is None else body.seed,
        tuple([body.stop] if isinstance(body.stop, str) else body.stop or []),
    )


def _message(message: Message, param: str, settings: ServerSettings) -> dict[str, Any]:
    """A message in the chat-template form."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    content: list[dict[str, Any]] = []
    for index, part in enumerate(message.content):
        if part.type == "text":
            content.append({"type": "text", "text": part.text})
        else:
            image = read_image(part.image_url.url, settings, f"{param}.content[{index}].image_url.url")
            content.append({"type": "image", "image": image})
    return {"role": role, "content": content}


def _check_limit(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ApiError(400, f"{name} must be at most {limit}, got {value}.", param=name.split(" ")[-1])


def _check_length(name: str, length: int, settings: ServerSettings) -> None:
    limit = settings.max_prompt_length
    if length > limit:
        raise ApiError(
            400, f"{name} must have at most {limit} characters, got {length}.", "string_above_max_length", name
        )


async def _events(request: Request, submit: Callable[[Callable[[Any], None]], Future]) -> AsyncIterator[Any]:
    """The events of a request to the engine, with its result as the last one. It is cancelled if the client leaves.

    Raises:
        [`ApiError`]: if the request is invalid or failed.
        [`ClientGoneError`]: if the client left.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(event: Any) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    future = submit(put)
    future.add_done_callback(put)
    gone = asyncio.ensure_future(_until_disconnected(request))
    event: Any = None
    try:
        while event is not future:
            next_event = asyncio.ensure_future(queue.get())
            await asyncio.wait({next_event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not next_event.done():
                next_event.cancel()
                raise ClientGoneError
            event = next_event.result()
            if event is not future:
                yield event
        try:
            result = future.result()
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except UnavailableError as error:
            raise ApiError(503, str(error), "unavailable", headers={"Retry-After": "5"}) from error
        except Exception as error:
            logger.error(f"A request failed: {error!r}")
            raise ApiError(500, str(error) or "The request failed.", "generation_failed") from error
        yield result
    finally:
        gone.cancel()
        future.cancel()


async def _until_disconnected(request: Request) -> None:
    # The body was read: nothing else comes.
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    async def with_errors() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except ClientGoneError:
            pass
        except ApiError as error:
            # The status has been sent.
            yield _sse(error.body(), "error")

    return StreamingResponse(
        with_errors(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def _sse(data: dict[str, Any], event: str | None = None) -> bytes:
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def _image_usage(result: Any) -> dict[str, Any]:
    num_input, num_output = result.num_prompt_tokens, result.num_image_tokens
    return {
        "input_tokens": num_input,
        "output_tokens": num_output,
        "total_tokens": num_input + num_output,
        "input_tokens_details": {"text_tokens": num_input, "image_tokens": 0},
    }


def _chat_usage(answer: Any) -> dict[str, int]:
    num_prompt, num_answer = answer.num_prompt_tokens, answer.num_tokens
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}


def _retry_after(num_waiting: int, finished: deque[float]) -> int:
    """In how many seconds those who wait will have been served, at the speed of the last requests; 1 to 60."""
    if len(finished) < 2 or finished[-1] <= finished[0]:
        return 1
    per_second = (len(finished) - 1) / (finished[-1] - finished[0])
    return min(max(math.ceil(num_waiting / per_second), 1), 60)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # ("body", "messages", 0, "content", "str"): the last one is a kind of value that was tried.
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = ".".join(place) or None
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"Unknown parameter: {param!r}.", "unknown_parameter", param).response()
        if first["type"] == "missing":
            return ApiError(
                400, f"Missing required parameter: {param!r}.", "missing_required_parameter", param
            ).response()
        where = "" if param is None else f"{param}: "
        return ApiError(400, f"{where}{first['msg']}.", "invalid_value", param).response()

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        messages = {
            404: f"There is no {request.method} {request.url.path}.",
            405: f"{request.url.path} does not take {request.method}.",
        }
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        message = messages.get(error.status_code, str(error.detail))
        headers = None if error.headers is None else dict(error.headers)
        return ApiError(error.status_code, message, codes.get(error.status_code), headers=headers).response()

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # Nobody reads it; the number is the one of nginx.

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return ApiError(500, "The server failed; see its log.", "internal_error").response()


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on, bound before a model is loaded.

    Raises:
        `OSError`: if the port is taken, or there is no such address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"host {host!r} is no address of this machine: {error}.") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        # Listening, because two sockets can be bound to one port.
        bound.listen()
    except OSError as error:
        bound.close()
        raise OSError(
            f"port {port} of {host} cannot be used ({error.strerror}); choose another one by --port."
        ) from error
    return bound


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serve until the process is told to end (SIGINT or SIGTERM); requests that run or wait are finished first."""
    config = uvicorn.Config(app, log_level="info", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
