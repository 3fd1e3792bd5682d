# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A server under load whose clients leave or send what is wrong: are all images right, and does its memory stay?

Starts `latte-flow serve` and sends requests from several clients at once. Of them, `--leaving` close the connection in
the middle, and `--bad` are invalid. All other images are compared with those of the pipeline. The resident memory of
the server is compared between the end of the first fifth, when all buffers have been used, and the end.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
from PIL import Image

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint


PROMPTS = ["a red circle", "a blue square left of a green cross", "a handwritten seven", "a yellow triangle"]
BAD = [
    {"prompt": ""},
    {"prompt": "a cross", "size": "63x64"},
    {"prompt": "a cross", "steps": 10**6},
    {"prompt": "a cross", "n": 0},
    {"prompt": "a cross", "nonsense": 1},
    {"prompt": "a cross", "guidance": [1.0]},
    {"prompt": "a cross", "model": "another"},
]


def combinations(num: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [
        {
            "prompt": rng.choice(PROMPTS),
            "seed": seed,
            "steps": rng.choice([5, 10, 20]),
            "guidance": rng.choice([1.0, 4.0]),
        }
        for seed in range(num)
    ]


def expected_images(bodies: list[dict[str, Any]]) -> list[np.ndarray]:
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(
            body["prompt"],
            num_inference_steps=body["steps"],
            guidance_scale=body["guidance"],
            generator=torch.Generator().manual_seed(body["seed"]),
        ).images[0]
        for body in bodies
    ]
    return [np.asarray(image).astype(int) for image in images]


async def send(
    client: httpx2.AsyncClient, kind: str, bodies: list[dict[str, Any]], expected: list[np.ndarray], rng: random.Random
) -> str:
    """One request, and what came of it."""
    if kind == "bad":
        response = await client.post("/v1/images/generations", json=rng.choice(BAD))
        is_right = response.status_code in (400, 404) and "error" in response.json()
        return "bad: refused" if is_right else f"bad: {response.status_code}"
    number = rng.randrange(len(bodies))
    if kind == "leaving":
        try:
            await asyncio.wait_for(client.post("/v1/images/generations", json=bodies[number]), rng.uniform(0.01, 0.3))
        except TimeoutError:
            return "leaving: left"
        return "leaving: was served before"
    response = await client.post("/v1/images/generations", json=bodies[number])
    if response.status_code != 200:
        return f"good: {response.status_code}"
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    # One of 255: a value between two may be rounded either way.
    is_right = np.abs(np.asarray(image).astype(int) - expected[number]).max() <= 1
    return "good: right image" if is_right else "good: WRONG image"


async def load(address: str, options: argparse.Namespace, memory: Any) -> tuple[Counter, list[int]]:
    bodies = combinations(24)
    expected = expected_images(bodies)
    rng = random.Random(0)
    num_leaving, num_bad = (round(share * options.requests) for share in (options.leaving, options.bad))
    kinds = ["leaving"] * num_leaving + ["bad"] * num_bad
    kinds += ["good"] * (options.requests - len(kinds))
    rng.shuffle(kinds)
    outcomes: Counter = Counter()
    memories: list[int] = []

    async def client_loop(client: httpx2.AsyncClient) -> None:
        while kinds:
            outcomes[await send(client, kinds.pop(), bodies, expected, rng)] += 1
            if sum(outcomes.values()) % max(options.requests // 20, 1) == 0:
                memories.append(memory().rss)

    async with httpx2.AsyncClient(base_url=address, timeout=300) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(options.clients)))
        for _ in range(100):
            text = (await client.get("/metrics")).text
            left = float(re.search(r"^latte_flow_images_running (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
            if not left:
                break
            await asyncio.sleep(0.1)
        outcomes["images that still run at the end"] = int(left)
    memories.append(memory().rss)
    return outcomes, memories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--leaving", type=float, default=0.10)
    parser.add_argument("--bad", type=float, default=0.05)
    options = parser.parse_args()
    command = "import sys; from latte_flow_cli import app; sys.argv = ['latte-flow', 'serve', '--port', '0']; app()"
    server = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        start = time.perf_counter()
        while True:
            try:
                httpx2.get(f"{address}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                assert time.perf_counter() - start < 60
                time.sleep(0.1)
        outcomes, memories = asyncio.run(load(address, options, psutil.Process(server.pid).memory_info))
    finally:
        server.terminate()
        server.wait()
    growth = memories[-1] / memories[len(memories) // 5] - 1
    for outcome, number in sorted(outcomes.items()):
        print(f"{outcome}: {number}")
    print(f"memory: {', '.join(f'{value / 1e6:.0f}' for value in memories)} MB; {growth:+.1%} after the first fifth")
    print(f"exit status of the server: {server.returncode}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"outcomes": outcomes, "memories": memories, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
