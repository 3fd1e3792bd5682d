# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The server on Ray Serve, with real processes on this machine: five for two experts, about 3 GB."""

import asyncio
import base64
import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import psutil
import pytest
import torch
import yaml
from PIL import Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowPipeline
from latte_flow_hf.serving.server import bind


pytest.importorskip("ray")

import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

from latte_flow_hf.serving import app
from latte_flow_hf.serving.ray_app import AppArguments, Room


ROOT = Path(__file__).parents[2]


# Without processes.


@pytest.mark.parametrize("name", ["replicas", "staged"])
def test_configuration_files_are_valid(name):
    content = yaml.safe_load((ROOT / "deploy" / "ray" / f"{name}.yaml").read_text())
    check_configuration(content, name)


def test_the_configuration_for_kubernetes_is_valid():
    content = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    assert content["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    check_configuration(yaml.safe_load(content["spec"]["serveConfigV2"]), "replicas")


def check_configuration(content: dict, shape: str) -> None:
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert application.import_path == "latte_flow_hf.serving:app"
    arguments = AppArguments.model_validate(application.args)
    assert arguments.shape == shape
    # Options are for deployments that there are.
    names = {deployment.name for deployment in application.deployments}
    stages = {"Front", "Backbone", "Decoder", *(f"Expert{k}" for k in range(4))}
    assert names == ({"Replica"} if shape == "replicas" else stages)


def test_contradictory_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adapters need shape 'replicas'"):
        app(AppArguments(shape="staged", adapters=str(tmp_path)))
    with pytest.raises(ValueError, match="shape"):
        AppArguments(shape="other")
    with pytest.raises(ValueError, match="nonsense"):
        AppArguments(nonsense=1)
    with pytest.raises(ValueError, match="max_steps"):
        app(AppArguments(settings={"max_steps": 0}))


def test_places_are_given_in_the_order_of_asking():
    async def check() -> list[str]:
        room, order = Room(3), []

        async def take(name: str, num_places: int) -> None:
            await room.acquire(num_places)
            order.append(name)

        await take("first", 2)
        tasks = [asyncio.create_task(take(name, n)) for name, n in (("large", 3), ("gone", 1), ("small", 1))]
        await asyncio.sleep(0)
        # The small ones would fit, but the large one asked before.
        assert order == ["first"]
        tasks[1].cancel()
        room.release(2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["first", "large"]
        room.release(3)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert room._num_free == 2
        return order

    assert asyncio.run(check()) == ["first", "large", "small"]


# With processes.


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with bind("127.0.0.1", 0) as unused:
        port = unused.getsockname()[1]
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # Ray would end its own processes if others fill the memory.
        _system_config={"memory_monitor_refresh_ms": 0},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def generate(address: str, seed: int, steps: int = 8) -> httpx2.Response:
    body = {"prompt": "a red circle", "seed": seed, "steps": steps}
    return httpx2.post(f"{address}/v1/images/generations", json=body, timeout=300)


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)


@pytest.fixture(scope="module")
def expected(pipeline):
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)

    def image(seed: int, steps: int = 8) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe("a red circle", num_inference_steps=steps, generator=generator).images[0]).astype(int)

    image.pipe = pipe
    return image


def check_server(address: str, expected, picture) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda seed: generate(address, seed), range(8)))
    for seed, response in enumerate(responses):
        assert np.abs(pixels(response.json()["data"][0]["b64_json"]) - expected(seed)).max() <= 1
    events = list(client.images.generate(prompt="a cross", stream=True, partial_images=1, extra_body={"steps": 8}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    file, ours = io.BytesIO(), {"seed": 2, "steps": 8, "strength": 0.5}
    picture.save(file, "PNG")
    edit = client.images.edit(
        prompt="a red circle",
        image=("image.png", file.getvalue()),
        extra_body=ours,
    )
    edited = LatteFlowImg2ImgPipeline.from_pipe(expected.pipe)(
        "a red circle", picture, 0.5, num_inference_steps=8, generator=torch.Generator().manual_seed(2)
    ).images[0]
    assert np.abs(pixels(edit.data[0].b64_json) - edited).max() <= 1
    messages = [{"role": "user", "content": "what is this?"}]
    answer = client.chat.completions.create(model="random", messages=messages, max_tokens=8).choices[0].message.content
    assert answer == expected.pipe.chat("what is this?", max_new_tokens=8)
    chunks = client.chat.completions.create(model="random", messages=messages, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    for body in ({"guidance": [1.0]}, {"response_format": "url"}, {"size": "1x1"}):
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a cross", extra_body=body)


@pytest.mark.slow
def test_stages_give_the_images_of_one_process_and_survive_kills(cluster, pipeline, expected, picture):
    arguments = AppArguments(shape="staged", model=pipeline, settings={"max_steps": 2000})
    serve.run(app(arguments), name="latte-flow", route_prefix="/")
    check_server(cluster, expected, picture)
    experts = [serve.get_deployment_handle(f"Expert{k}", "latte-flow") for k in range(2)]
    model = expected.pipe.model
    in_layers = sum(weight.numel() for weight in model.tower.layers.parameters())
    shared = sum(weight.numel() for weight in model.tower.parameters()) - in_layers
    for expert in experts:
        assert expert.num_weights.remote().result() < 0.6 * in_layers + shared
    # Long enough to be in the middle.
    process = experts[0].process_id.remote().result()
    with ThreadPoolExecutor(4) as threads:
        responses = [threads.submit(generate, cluster, seed, 600) for seed in range(4)]
        time.sleep(0.5)
        assert not any(response.done() for response in responses)
        os.kill(process, signal.SIGKILL)
        responses = [response.result(timeout=300) for response in responses]
    assert [response.status_code for response in responses] == [200] * 4
    assert experts[0].process_id.remote().result() != process
    for seed, response in enumerate(responses):
        assert np.abs(pixels(response.json()["data"][0]["b64_json"]) - expected(seed, 600)).max() <= 1
    serve.delete("latte-flow")


@pytest.mark.slow
def test_replicas_give_the_images_of_one_process(cluster, pipeline, expected, picture):
    arguments = AppArguments(shape="replicas", model=pipeline, settings={"max_steps": 2000})
    serve.run(app(arguments), name="latte-flow", route_prefix="/")
    check_server(cluster, expected, picture)
    # Of a replica that is killed, requests fail in a way that clients repeat, or are served by the next one.
    (process,) = [each for each in psutil.process_iter(["name"]) if "Replica" in " ".join(each.cmdline() or [])]
    with ThreadPoolExecutor(4) as threads:
        responses = [threads.submit(generate, cluster, seed, 2000) for seed in range(4)]
        time.sleep(0.5)
        assert not any(response.done() for response in responses)
        process.kill()
        statuses = [response.result(timeout=300).status_code for response in responses]
    assert set(statuses) <= {200, 500, 503}
    # OpenAI's client repeats such requests.
    client = openai.OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=8, timeout=300)
    image = client.images.generate(prompt="a red circle", extra_body={"seed": 1, "steps": 8}).data[0]
    assert np.abs(pixels(image.b64_json) - expected(1)).max() <= 1
    serve.delete("latte-flow")
