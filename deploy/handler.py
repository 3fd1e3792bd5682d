# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Custom handler of Hugging Face Inference Endpoints: put it into the root of a checkpoint's repository.

Its `requirements.txt` there must install this package. A request is `{"inputs": PROMPT, "parameters": {...}}` with the
arguments of the pipeline, and `seed`; the answer is a list of images in base64, as PNG.
"""

import base64
import io
from typing import Any

import torch

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.serving import Engine, ImageRequest


PARAMETERS = (
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
)


class EndpointHandler:
    def __init__(self, path: str = ""):
        on_gpu = torch.cuda.is_available()
        pipe = LatteFlowPipeline.from_pretrained(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
        pipe.set_progress_bar_config(disable=True)
        self.engine = Engine(pipe.to("cuda" if on_gpu else "cpu"))
        self.engine.start()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]] | dict[str, str]:
        """The images of a request; several threads may call this, and their images share batches."""
        prompt, parameters = data.get("inputs"), data.get("parameters") or {}
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if not isinstance(prompt, str) or not prompt or unknown:
            return {"error": f"give inputs, a prompt, and parameters among {list(PARAMETERS)}; unknown: {unknown}."}
        try:
            images = self.engine.submit(ImageRequest(prompt=prompt, **parameters)).result().images
        except (ValueError, TypeError) as error:
            return {"error": str(error)}
        answers = []
        for image in images:
            file = io.BytesIO()
            image.save(file, "PNG")
            answers.append({"image": base64.b64encode(file.getvalue()).decode()})
        return answers
