# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Throughput and latency of three ways to serve one pipeline to many clients.

- one at a time: each request is a call of the pipeline; the others wait.
- static batching: what waits when a call ends is the next call, if it has the same number of steps; a batch ends when
  its slowest image does.
- continuous batching: the engine of `latte-flow serve`.

Each client sends a request, waits for its image and sends the next one. The number of steps of each request is drawn
from `--steps`. All three run the same requests, in turns within each round. Seconds of the processor's cores depend
less on other programs than throughput and latency do.
"""

import argparse
import json
import queue
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import generation_prompts
from latte_flow_hf.serving import Engine, ImageRequest


class CallingServer:
    """Serves requests by calls of the pipeline, each with up to `max_batch` of those that wait."""

    def __init__(self, pipe: Any, max_batch: int):
        self.pipe, self.max_batch = pipe, max_batch
        self.waiting: queue.Queue[tuple[ImageRequest, Future] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()

    def submit(self, request: ImageRequest) -> Future:
        future: Future = Future()
        self.waiting.put((request, future))
        return future

    def _run(self) -> None:
        pending: list[tuple[ImageRequest, Future]] = []
        is_open = True
        while is_open or pending:
            while is_open and (not pending or not self.waiting.empty()):
                item = self.waiting.get()
                if item is None:
                    is_open = False
                else:
                    pending.append(item)
            if not pending:
                break
            num_steps = pending[0][0].num_inference_steps
            batch = [item for item in pending if item[0].num_inference_steps == num_steps][: self.max_batch]
            pending = [item for item in pending if item not in batch]
            images = self.pipe(
                [request.prompt for request, _ in batch],
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(request.seed) for request, _ in batch],
            ).images
            for (_, future), image in zip(batch, images, strict=True):
                future.set_result(image)


def run_clients(server: Any, requests: list[ImageRequest], num_clients: int) -> tuple[float, float, list[float]]:
    """The seconds from the first request to the last result, those of all processor cores, and those of each
    request."""
    waiting: queue.SimpleQueue[ImageRequest] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    latencies: list[float] = []

    def client() -> None:
        while True:
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            server.submit(request).result()
            latencies.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    start, cores_start = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, time.process_time() - cores_start, latencies


def make_server(way: str, pipe: Any, max_batch: int) -> Any:
    if way == "continuous":
        return Engine(pipe, max_images=max_batch)
    return CallingServer(pipe, 1 if way == "one at a time" else max_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--requests", type=int, default=128, help="of each way, round and number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for kind in generation_prompts(seed=1).values() for prompt in kind]
    rng = random.Random(0)
    requests = [
        ImageRequest(prompt=rng.choice(prompts), num_inference_steps=rng.choice(options.steps), seed=seed)
        for seed in range(options.requests)
    ]
    pipe("a red circle", num_inference_steps=2)
    ways = ["one at a time", "static", "continuous"]
    rows = []
    for num_clients in options.clients:
        # A single client needs no more requests to be measured.
        share = requests[: max(options.requests // 4, 1)] if num_clients == 1 else requests
        measured: dict[str, list[tuple[float, float, list[float]]]] = {way: [] for way in ways}
        for number in range(options.rounds):
            for way in ways if number % 2 == 0 else ways[::-1]:
                server = make_server(way, pipe, options.max_batch)
                server.start()
                measured[way].append(run_clients(server, share, num_clients))
                server.close()
        for way in ways:
            throughputs = [len(share) / seconds for seconds, _, _ in measured[way]]
            core_seconds = [seconds / len(share) for _, seconds, _ in measured[way]]
            latencies = np.concatenate([latencies for _, _, latencies in measured[way]])
            row = {
                "clients": num_clients,
                "way": way,
                "images per second": float(np.median(throughputs)),
                "p50 seconds": float(np.percentile(latencies, 50)),
                "p95 seconds": float(np.percentile(latencies, 95)),
                "core seconds per image": float(np.median(core_seconds)),
            }
            rows.append(row)
            print(
                f"| {num_clients} | {way} | {row['images per second']:.1f} | {row['p50 seconds']:.2f} "
                f"| {row['p95 seconds']:.2f} | {row['core seconds per image']:.3f} |",
                flush=True,
            )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"options": {**vars(options), "output": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
