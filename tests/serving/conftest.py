# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A server in this process, on a free port, with the event loop in a thread."""

import contextlib
import threading
import time

import pytest
import torch
import uvicorn

from latte_flow_hf import (
    LatteFlowImg2ImgPipeline,
    LatteFlowInpaintPipeline,
    LatteFlowPipeline,
    LatteFlowScheduler,
)
from latte_flow_hf.serving import Engine, ImageRequest
from latte_flow_hf.serving.server import bind, create_app


@pytest.fixture(scope="module")
def served_pipe(model, processor, vae) -> LatteFlowPipeline:
    """A pipeline around the session's components, which must not be changed."""
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    pipe = LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def alone():
    """`alone(pipe, request)`: each image of a request by a call of a pipeline with this image only."""

    def alone(pipe: LatteFlowPipeline, request: ImageRequest) -> list:
        names = ("prompt", "messages", "image", "negative_prompt", "height", "width", "num_inference_steps")
        names += ("steps_per_expert", "guidance_scale", "guidance_interval", "output_type")
        call = {name: getattr(request, name) for name in names}
        if request.source_image is not None:
            with_source = LatteFlowImg2ImgPipeline if request.mask_image is None else LatteFlowInpaintPipeline
            pipe = with_source.from_pipe(pipe)
            pipe.set_progress_bar_config(disable=True)
            call |= {"context_image": call["image"], "image": request.source_image, "strength": request.strength}
            if request.mask_image is not None:
                call["mask_image"] = request.mask_image
        return [
            pipe(**call, generator=torch.Generator().manual_seed(request.seed + number)).images[0]
            for number in range(request.num_images)
        ]

    return alone


@pytest.fixture(scope="session")
def run_server():
    """`with run_server(engine, settings) as address`: the address of the server, which ends after the block."""

    @contextlib.contextmanager
    def run(engine: Engine, settings=None):
        listening = bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()

    return run
