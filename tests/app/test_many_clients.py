# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Twenty visitors at once: each gets the image that its seed makes alone, and the memory does not grow."""

import gc
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.app import app
from tests.app.test_app import call, free_port


CLIENTS, REQUESTS = 20, 10
PROMPTS = ("a red circle", "a white cross above a green circle", "a handwritten seven", "a purple triangle")


def generate(port: int, client: int, number: int) -> tuple[str, int, np.ndarray]:
    """One request of one visitor, and the image in its gallery, as a browser gets it."""
    seed = 100 * client + number
    prompt = PROMPTS[seed % len(PROMPTS)]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as connection:
        data = [prompt, str(seed), "8", "", "", "", 1, None, None]
        messages = call(connection, "create", data, f"client{client}request{number}")
        assert messages[-1]["success"], messages[-1]
        (path, *_) = re.findall(rf'"path": "([^"]*-{seed}-[0-9a-f]{{8}}\.png)"', json.dumps(messages))
        image = Image.open(io.BytesIO(connection.get(f"/gradio_api/file={path}").content))
        assert json.loads(image.text["latte_flow"])["seed"] == seed
    return prompt, seed, np.asarray(image.convert("RGB"))


@pytest.mark.slow
def test_two_hundred_requests_of_twenty_visitors():
    studio = app.make_studio(LatteFlowPipeline.from_pretrained(tiny_checkpoint()), "tiny world")
    port = free_port()
    page = app.launch(studio, port=port, blocks_thread=False)
    process = psutil.Process()

    def everybody(numbers: range) -> list[tuple[str, int, np.ndarray]]:
        with ThreadPoolExecutor(CLIENTS) as clients:
            visits = [
                clients.submit(lambda client: [generate(port, client, number) for number in numbers], client)
                for client in range(CLIENTS)
            ]
            return [result for visit in visits for result in visit.result()]

    try:
        # The first requests fill caches of torch, of the server and of the allocator.
        everybody(range(90, 90 + REQUESTS // 2))
        gc.collect()
        before = process.memory_info().rss
        results = everybody(range(REQUESTS))
        gc.collect()
        after = process.memory_info().rss
        assert len(results) == CLIENTS * REQUESTS
        for prompt, seed, image in results:
            *_, alone = studio.create("alone", [studio.settings(prompt, str(seed), "8")])
            assert np.array_equal(image, alone.image), (prompt, seed)
        print(f"memory {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after {len(results)} requests")
        assert after < 1.05 * before
        assert not studio._jobs
    finally:
        page.close()
