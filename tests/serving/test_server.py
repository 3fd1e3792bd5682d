# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The server as its users see it: through OpenAI's client, unchanged, and with requests that no client would send."""

import base64
import dataclasses
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from latte_flow_hf.serving import Engine, ImageRequest
from latte_flow_hf.serving.server import ImageStore, bind
from latte_flow_hf.serving.settings import ServerSettings


SETTINGS = ServerSettings(
    model_name="tiny", max_steps=1000, max_prompt_length=200, max_body_size=2**20, max_input_pixels=256 * 256
)
STEPS = {"steps": 3}


@pytest.fixture(scope="module")
def engine(served_pipe) -> Engine:
    return Engine(served_pipe, max_images=8)


@pytest.fixture(scope="module")
def address(engine, run_server):
    with run_server(engine, SETTINGS) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(address):
    with httpx2.Client(base_url=address, timeout=60) as http:
        yield http


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def decode(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def expected_image(pipe, seed: int, **call) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(
        pipe(**{"prompt": "a red circle", "num_inference_steps": 3, "generator": generator, **call}).images[0]
    )


# OpenAI's client.


def test_images_are_those_of_the_pipeline(client, served_pipe):
    response = client.images.generate(
        model="tiny", prompt="a red circle", n=2, size="64x32", extra_body={"seed": 7, "guidance": 2.5, **STEPS}
    )
    assert [item.seed for item in response.data] == [7, 8]
    assert response.size == "64x32" and response.output_format == "png" and response.usage.output_tokens == 2 * 8 * 4
    for number, item in enumerate(response.data):
        image = decode(item.b64_json)
        assert image.format == "PNG" and image.size == (64, 32)
        expected = expected_image(served_pipe, 7 + number, width=64, height=32, guidance_scale=2.5)
        # The same pixels, or neighbours where a value lies between two.
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    # What is meant for other models is accepted.
    response = client.images.generate(
        prompt="a cross",
        quality="high",
        style="vivid",
        moderation="low",
        user="someone",
        background="auto",
        extra_body=STEPS,
    )
    assert len(response.data) == 1 and 0 <= response.data[0].seed < 2**32


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_images_come_in_the_format_that_is_asked_for(client, output_format):
    response = client.images.generate(prompt="a cross", output_format=output_format, extra_body=STEPS)
    assert decode(response.data[0].b64_json).format == output_format.upper()


def test_urls_lead_to_the_images(client, http):
    arguments = {"prompt": "a cross", "output_format": "webp", "extra_body": {"seed": 1, **STEPS}}
    url = client.images.generate(response_format="url", **arguments).data[0].url
    found = http.get(url)
    assert found.headers["content-type"] == "image/webp"
    assert found.content == base64.b64decode(client.images.generate(**arguments).data[0].b64_json)
    assert http.get(url + "x").status_code == 404


def test_images_are_streamed(client, served_pipe):
    stream = client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, extra_body={"seed": 7, "steps": 6}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    images = [np.asarray(decode(event.b64_json)).astype(int) for event in events]
    expected = expected_image(served_pipe, 7, num_inference_steps=6)
    assert np.abs(images[2] - expected).max() <= 1
    assert np.abs(images[1] - images[2]).mean() < np.abs(images[0] - images[2]).mean()
    assert events[2].usage.total_tokens > 0 and events[2].size == "64x64"


def png(image: Image.Image) -> tuple[str, bytes, str]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "image.png", file.getvalue(), "image/png"


def test_images_are_edited(client, served_pipe, picture, alone):
    arguments = {
        "prompt": "a red circle",
        "image": png(picture),
        "extra_body": {"seed": 3, "steps": 6, "strength": 0.5},
    }
    request = ImageRequest(prompt="a red circle", seed=3, num_inference_steps=6, strength=0.5, source_image=picture)
    edited = decode(client.images.edit(**arguments).data[0].b64_json)
    (expected,) = alone(served_pipe, request)
    assert np.abs(np.asarray(edited).astype(int) - expected).max() <= 1
    # Transparent pixels of the mask are generated: the upper half.
    mask = picture.convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 64, 32))
    upper = Image.new("L", (64, 64))
    upper.paste(255, (0, 0, 64, 32))
    arguments |= {"mask": png(mask), "n": 2, "size": "64x64"}
    edited = [decode(item.b64_json) for item in client.images.edit(**arguments).data]
    expected = alone(served_pipe, dataclasses.replace(request, mask_image=upper, num_images=2))
    for one, other in zip(edited, expected, strict=True):
        assert np.abs(np.asarray(one).astype(int) - other).max() <= 1
    events = list(client.images.edit(**{**arguments, "n": 1}, stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert np.array_equal(decode(events[1].b64_json), edited[0])


def test_bad_edits_are_refused(client, http, picture):
    opaque, small = png(picture), picture.convert("RGBA").resize((32, 32))
    small.putalpha(0)
    for arguments, param in (
        ({"image": ("image.png", b"no image", "image/png")}, "image"),
        ({"image": opaque, "mask": opaque}, "mask"),
        ({"image": opaque, "mask": png(small)}, None),
        ({"image": [opaque, opaque]}, "image"),
        ({"image": opaque, "extra_body": {"strength": 0}}, "strength"),
        ({"image": opaque, "size": "63x64"}, "size"),
        ({"image": opaque, "n": 0}, "n"),
        ({"image": png(Image.new("RGB", (300, 300)))}, "image"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(prompt="a cross", **arguments)
        assert caught.value.param == param
    error = http.post("/v1/images/edits", data={"prompt": "a cross"}).json()["error"]
    assert (error["param"], error["code"]) == ("image", "missing_required_parameter")


def test_an_error_before_the_first_event_has_its_own_status(client):
    with pytest.raises(openai.BadRequestError, match="guidance_scale"):
        client.images.generate(prompt="a cross", stream=True, extra_body={"guidance": [1.0, 2.0, 3.0]})


def test_chats_equal_those_of_the_pipeline(client, served_pipe, picture):
    question = "what is this?"
    expected = served_pipe.chat(question, picture, max_new_tokens=16)
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}]
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_completion_tokens": 16}
    completion = client.chat.completions.create(**arguments)
    choice = completion.choices[0]
    assert choice.message.content == expected and choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if completion.usage.completion_tokens == 16 else "stop")
    assert completion.usage.prompt_tokens > 16
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason and chunks[-1].usage == completion.usage


def test_answers_are_drawn_by_their_seed(client):
    def ask(**arguments) -> str:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
        arguments = {"temperature": 1.5, "max_tokens": 12, **arguments}
        return client.chat.completions.create(model="tiny", messages=messages, **arguments).choices[0].message.content

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda seed: ask(seed=seed), [1, 2, 1, 2]))
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
    assert ask(seed=1, top_p=1e-6) == ask(temperature=0)


def test_an_answer_ends_before_a_stop_text(client, served_pipe):
    full = served_pipe.chat("what?", max_new_tokens=24)
    stop = full[len(full) // 2 : len(full) // 2 + 4]
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 24, "stop": stop}
    choice = client.chat.completions.create(**arguments).choices[0]
    assert choice.message.content == full[: full.index(stop)].strip() and choice.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    for name in ("gpt-image-2", "tiny:style", "tiny:", ":"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.images.generate(model=name, prompt="a cross")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_many_clients_at_once(client, served_pipe):
    def generate(seed: int) -> np.ndarray:
        response = client.images.generate(prompt="a red circle", extra_body={"seed": seed, **STEPS})
        return np.asarray(decode(response.data[0].b64_json)).astype(int)

    with ThreadPoolExecutor(16) as threads:
        images = list(threads.map(generate, range(32)))
    for seed in (0, 13, 31):
        assert np.abs(images[seed] - expected_image(served_pipe, seed)).max() <= 1


# Health and metrics.


def test_metrics_count(http):
    def metric(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    assert http.get("/health").json() == {"status": "ok"}
    generations = 'latte_flow_requests_total{path="/v1/images/generations"'
    before = [metric(name) for name in (generations, "latte_flow_images_total", "latte_flow_batch_size_sum")]
    http.post("/v1/images/generations", json={"prompt": "a cross", "n": 2, **STEPS})
    http.post("/v1/images/generations", json={"prompt": ""})
    after = [metric(name) for name in (generations, "latte_flow_images_total", "latte_flow_batch_size_sum")]
    assert [new - old for new, old in zip(after, before)] == [2, 2, 6]
    assert metric('latte_flow_requests_total{path="none",status="404"}') == 0
    http.get("/wp-admin")
    assert metric('latte_flow_requests_total{path="none",status="404"}') == 1
    assert metric("latte_flow_images_running") == 0


# Bad requests. Each error has OpenAI's form.

IMAGE = "/v1/images/generations"
CHAT = "/v1/chat/completions"


def chat_body(content, **fields) -> dict:
    return {"messages": [{"role": "user", "content": content}], **fields}


def picture_body(url: str) -> dict:
    return chat_body([{"type": "image_url", "image_url": {"url": url}}])


def png_bomb(width: int, height: int) -> str:
    """A PNG of a few hundred bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


BAD_BODIES = [
    (IMAGE, {}, "prompt", "missing_required_parameter"),
    (IMAGE, {"prompt": ""}, "prompt", "invalid_value"),
    (IMAGE, {"prompt": 3}, "prompt", "invalid_value"),
    (IMAGE, {"prompt": "x" * 201}, "prompt", "string_above_max_length"),
    (IMAGE, {"prompt": "x", "negative_prompt": "x" * 201}, "negative_prompt", "string_above_max_length"),
    (IMAGE, {"prompt": "x", "n": 0}, "n", "invalid_value"),
    (IMAGE, {"prompt": "x", "n": 11}, "n", None),
    (IMAGE, {"prompt": "x", "n": True}, "n", "invalid_value"),
    (IMAGE, {"prompt": "x", "size": "64"}, "size", "invalid_value"),
    (IMAGE, {"prompt": "x", "size": "1024x1024"}, "size", "invalid_size"),
    (IMAGE, {"prompt": "x", "size": "65x64"}, "size", "invalid_size"),
    (IMAGE, {"prompt": "x", "steps": 1001}, "steps", None),
    (IMAGE, {"prompt": "x", "steps": "3"}, "steps", "invalid_value"),
    (IMAGE, {"prompt": "x", "seed": -1}, "seed", "invalid_value"),
    (IMAGE, {"prompt": "x", "seed": 2**63}, "seed", "invalid_value"),
    (IMAGE, {"prompt": "x", "guidance": 1000}, "guidance.constrained-float", "invalid_value"),
    (IMAGE, {"prompt": "x", "guidance": [1.0, 2.0, 3.0]}, None, None),
    (IMAGE, {"prompt": "x", "response_format": "gif"}, "response_format", "invalid_value"),
    (IMAGE, {"prompt": "x", "background": "transparent"}, "background", "invalid_value"),
    (IMAGE, {"prompt": "x", "partial_images": 2}, "partial_images", None),
    (IMAGE, {"prompt": "x", "stream": True, "n": 2}, "n", None),
    (IMAGE, {"prompt": "x", "output_compression": 50}, "output_compression", None),
    (IMAGE, {"prompt": "x", "step": 3}, "step", "unknown_parameter"),
    (IMAGE, {"prompt": "x", "\ud800": 3}, None, "invalid_value"),
    (IMAGE, {"prompt": "\ud800"}, "prompt", "invalid_value"),
    (IMAGE, [1], None, "invalid_value"),
    (CHAT, {"messages": []}, "messages", "invalid_value"),
    (CHAT, chat_body("x" * 201), "messages", "string_above_max_length"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
    (CHAT, chat_body("x", n=2), "n", "invalid_value"),
    (CHAT, chat_body("x", tools=[{}]), "tools", "invalid_value"),
    (CHAT, chat_body("x", max_tokens=2000), "max_completion_tokens", None),
    (CHAT, chat_body("x", temperature=3), "temperature", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}] * 65}, "messages", None),
    (CHAT, picture_body("https://example.com/a.png"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("http://169.254.169.254/latest"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("file:///etc/passwd"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("/etc/passwd"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("data:image/png;base64,!!"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("data:text/plain,hello"), "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, picture_body("data:image/png;base64,aGVsbG8="), "messages[0].content[0].image_url.url", "invalid_image"),
    (CHAT, picture_body(png_bomb(60000, 60000)), "messages[0].content[0].image_url.url", "image_too_large"),
    (CHAT, picture_body(png_bomb(200, 200)), "messages[0].content[0].image_url.url", "invalid_image"),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), BAD_BODIES)
def test_bad_bodies_are_refused(http, path, body, param, code):
    response = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"] and (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 5000, '{"prompt": NaN}', '{"prompt": "x", "guidance": 1e999}', "1" * 5000]
)
def test_bad_json_is_refused(http, text):
    response = http.post(IMAGE, content=text, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_pages_of_other_sites_are_refused(http, address):
    """Forms need no permission of the browser's user, unlike JSON."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        response = http.post("/v1/images/edits", data={"prompt": "a cross"}, headers={"Origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "cross_origin")
    assert http.get("/health", headers={"Origin": address}).status_code == 200


def test_a_body_must_say_that_it_is_json(http):
    """A page of another site may send text to a local server without asking the browser's user, but not JSON."""
    response = http.post(IMAGE, content='{"prompt": "a cross"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400


def test_paths_and_methods_that_do_not_exist(http):
    for method, path, status, code in (
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/images/variations", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", IMAGE, 405, "method_not_allowed"),
    ):
        response = http.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_large_bodies_are_refused(http, address):
    def pieces():
        for _ in range(40):
            yield b" " * 2**16

    for content in (b" " * (2**20 + 1), pieces()):
        response = http.post(IMAGE, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_a_client_that_leaves_is_dropped(engine, http, address):
    body = {"prompt": "a cross", "steps": 1000}
    for extra in ({}, {"stream": True, "partial_images": 1}):
        with (
            pytest.raises(httpx2.ReadTimeout),
            httpx2.Client(base_url=address, timeout=0.3) as impatient,
            impatient.stream("POST", IMAGE, json={**body, **extra}) as response,
        ):
            list(response.iter_bytes())
        wait_until(lambda: engine.num_running == 0)


# Servers with other settings.


def test_keys_are_needed_if_there_are_any(served_pipe, run_server):
    settings = ServerSettings(api_keys=("first-key", "second-key"))
    with run_server(Engine(served_pipe), settings) as address:
        for key in ("first-key", "second-key"):
            assert openai.OpenAI(base_url=f"{address}/v1", api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{address}/v1", api_key="first-ke").models.list()
        assert caught.value.code == "invalid_api_key"
        for headers in ({}, {"Authorization": "first-key"}, {"Authorization": "Basic first-key"}):
            assert httpx2.get(f"{address}/metrics", headers=headers).status_code == 401
        # Before anything of the body is read.
        assert httpx2.post(f"{address}{IMAGE}", content=b" " * 2**20).status_code == 401
        assert httpx2.get(f"{address}/health").status_code == 200


def test_a_full_queue_asks_to_retry(served_pipe, run_server):
    engine = Engine(served_pipe, max_images=1, max_waiting=1)
    with run_server(engine, ServerSettings(max_steps=1000)) as address, ThreadPoolExecutor(2) as threads:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def begin(number: int) -> Future:
            future = threads.submit(client.images.generate, prompt="a cross", extra_body={"steps": 300})
            wait_until(lambda: engine.num_running + engine.num_waiting == number and engine.num_running == 1)
            return future

        running = [begin(1), begin(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a cross")
        assert caught.value.code == "queue_full" and 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert all(future.result(timeout=60).data for future in running)


def test_what_runs_is_finished_before_the_end(served_pipe, run_server):
    engine = Engine(served_pipe)
    with ThreadPoolExecutor(1) as threads:
        with run_server(engine, ServerSettings(max_steps=1000)) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            future = threads.submit(client.images.generate, prompt="a cross", extra_body={"steps": 200})
            wait_until(lambda: engine.num_running)
        assert future.result(timeout=0).data and not engine.is_alive
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")


def test_images_of_allowed_hosts_are_fetched_without_redirects(picture, monkeypatch):
    """The client's own transport for tests stands for the network; everything else is real."""
    from latte_flow_hf.serving import pictures
    from latte_flow_hf.serving.errors import ApiError

    file = base64.b64decode(data_url(picture).partition(",")[2])
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        if request.url.path == "/moved":
            return httpx2.Response(302, headers={"Location": "http://169.254.169.254/"})
        return httpx2.Response(200, content=file if request.url.path == "/a.png" else b" " * 2**21)

    transport = httpx2.MockTransport(answer)
    monkeypatch.setattr(pictures.httpx2, "stream", httpx2.Client(transport=transport).stream)
    settings = ServerSettings(url_hosts=("images.example",), max_body_size=2**20)
    assert np.array_equal(pictures.read_image("https://images.example/a.png", settings, "url"), picture)
    for url in (
        "https://images.example/moved",
        "https://images.example/large",
        "http://images.example/a.png",
        "https://images.example@evil.example/a.png",
        "https://evil.example/images.example",
        "https://someone@images.example/a.png",
        "https://[",
    ):
        with pytest.raises(ApiError):
            pictures.read_image(url, settings, "url")
    assert asked == [f"https://images.example/{path}" for path in ("a.png", "moved", "large")]


def test_stored_images_are_limited():
    store = ImageStore(max_bytes=10)
    first, second = store.add(b"123456", "png"), store.add(b"654321", "webp")
    assert store.get(first) is None and store.get(second) == ("image/webp", b"654321")
    store.add(b"x" * 11, "png")
    assert store.get(second) is None and store._num_bytes == 0
    assert ImageStore(seconds=-1).add(b"1", "png")
    store = ImageStore(seconds=0)
    assert store.get(store.add(b"1", "png")) is None


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be used .* --port"):
            bind("127.0.0.1", port)
    with pytest.raises(OSError, match="no address of this machine"):
        bind("no such host", 0)


@pytest.mark.parametrize(
    "settings",
    [{"model_name": "a:b"}, {"model_name": ""}, {"api_keys": ("",)}, {"api_keys": ("é",)}, {"max_steps": 0}],
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServerSettings(**settings)
