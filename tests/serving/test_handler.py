# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The handler of Inference Endpoints, which is copied into checkpoints and is no part of the package."""

import base64
import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latte_flow_hf import LatteFlowPipeline


HANDLER = Path(__file__).parents[2] / "deploy" / "handler.py"


def test_the_handler_answers(pipeline):
    spec = importlib.util.spec_from_file_location("handler", HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(pipeline)
    bodies = [
        {"inputs": "a cross", "parameters": {"seed": seed, "num_inference_steps": 3, "num_images": 2}}
        for seed in range(4)
    ]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(handler, bodies))
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    for seed, answer in enumerate(answers):
        found = Image.open(io.BytesIO(base64.b64decode(answer[1]["image"])))
        generator = torch.Generator().manual_seed(seed + 1)
        expected = pipe("a cross", num_inference_steps=3, generator=generator).images[0]
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1
    for body in (
        {},
        {"inputs": ""},
        {"inputs": "x", "parameters": {"step": 3}},
        {"inputs": "x", "parameters": {"seed": "a"}},
    ):
        assert handler(body)["error"]
    handler.engine.close()
