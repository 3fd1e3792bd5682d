# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoint on Ray Serve as stages, against one process, and what to expect of more devices.

1. The seconds that an image costs each stage, measured in one process: encoding its prompt, its steps of each expert,
   decoding, each in batches.
2. Images per second of `latte-flow serve` and of the staged app, with the same clients, both on this machine.
3. On paper: with n devices, each stage gets one and the busiest stage gets the next; the slowest stage limits the
   images per second. With fewer devices than stages, stages share them. Transfers are not counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import torch

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.serving import ImageRequest
from latte_flow_hf.serving.engine import decode_each
from latte_flow_hf.serving.expert_batches import ExpertBatches
from latte_flow_hf.serving.running_image import start_images


def stage_seconds(num_steps: int, batch_size: int, rounds: int) -> dict[str, float]:
    """The seconds of each stage for one image, the least of several rounds."""
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    requests = [ImageRequest(prompt="a red circle", num_inference_steps=num_steps, seed=i) for i in range(batch_size)]
    seconds: dict[str, float] = {}

    def measure(stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        spent = (time.perf_counter() - start) / batch_size
        seconds[stage] = min(spent, seconds.get(stage, float("inf")))
        return result

    for _ in range(rounds):
        images = [each[0] for each in measure("backbone", lambda: start_images(pipe, requests))]
        batches = ExpertBatches(pipe.model)
        batches.add(images)

        def run_expert(expert: int, images: list = images, batches: ExpertBatches = batches) -> None:
            while not images[0].is_done and images[0].expert == expert:
                assert not batches.step(images)

        for expert in range(pipe.model.config.num_experts):
            measure(f"expert {expert}", lambda expert=expert: run_expert(expert))
        latents = [image.latents for image in images]
        measure("decoder", lambda latents=latents: decode_each(pipe, latents, ["pil"] * len(latents)))
    return seconds


def images_per_second(seconds: dict[str, float], num_devices: int) -> float:
    """What the slowest stage lets through, with the devices where they help most."""
    if num_devices < len(seconds):
        loads = [0.0] * num_devices
        for cost in sorted(seconds.values(), reverse=True):
            loads[loads.index(min(loads))] += cost
        return 1 / max(loads)
    replicas = dict.fromkeys(seconds, 1)
    for _ in range(num_devices - len(seconds)):
        replicas[max(seconds, key=lambda stage: seconds[stage] / replicas[stage])] += 1
    return 1 / max(cost / replicas[stage] for stage, cost in seconds.items())


def measure_load(address: str, num_clients: int, num_requests: int, num_steps: int) -> float:
    def generate(seed: int) -> None:
        body = {"prompt": "a red circle", "steps": num_steps, "seed": seed}
        httpx2.post(f"{address}/v1/images/generations", json=body, timeout=600).raise_for_status()

    with ThreadPoolExecutor(num_clients) as threads:
        list(threads.map(generate, range(num_clients)))  # warm-up
        start = time.perf_counter()
        list(threads.map(generate, range(num_requests)))
        return num_requests / (time.perf_counter() - start)


def measure_one_process(options: argparse.Namespace) -> float:
    command = "import sys; from latte_flow_cli import app; sys.argv = ['latte-flow', 'serve', '--port', '0']; app()"
    server = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        while True:
            try:
                httpx2.get(f"{address}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.1)
        return measure_load(address, options.clients, options.requests, options.steps)
    finally:
        server.terminate()
        server.wait()


def measure_stages(options: argparse.Namespace) -> float:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from latte_flow_hf.serving import app
    from latte_flow_hf.serving.ray_app import AppArguments

    ray.init(
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"memory_monitor_refresh_ms": 0},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        serve.run(app(AppArguments(shape="staged")), name="latte-flow", route_prefix="/")
        return measure_load(f"http://127.0.0.1:{options.port}", options.clients, options.requests, options.steps)
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = stage_seconds(options.steps, 16, options.rounds)
    result: dict[str, Any] = {"seconds": seconds}
    print("milliseconds of an image:", ", ".join(f"{stage} {cost * 1000:.1f}" for stage, cost in seconds.items()))
    for num_devices in (1, 4, 64):
        result[f"{num_devices} devices"] = images_per_second(seconds, num_devices)
        print(f"on paper, {num_devices} devices: {result[f'{num_devices} devices']:.1f} images per second")
    result["one process"] = measure_one_process(options)
    print(f"one process: {result['one process']:.1f} images per second", flush=True)
    result["staged"] = measure_stages(options)
    print(f"staged: {result['staged']:.1f} images per second")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
