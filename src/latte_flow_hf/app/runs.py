# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images from settings, one at a time: an image of several is to the pixel the one that its seed makes alone."""

import io
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from ..pipelines.image_metadata import ImageMetadata, PipelineRecord, record_call, write_metadata
from .limits import ImageSettings
from .model_queue import Job
from .trace import Trace


# Chosen: four previews a second look alive, and cost little beside the steps.
PREVIEW_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """A step of an image that is being generated.

    Args:
        image (`int`): which image of the request, from 0.
        step, num_steps (`int`): evaluations of the model so far, and in all.
        expert (`int`): the expert that ran.
        sigma (`float`): where it ran, from 1 (noise) to 0 (data).
        preview (`PIL.Image.Image`, *optional*): the estimated clean image; not at every step.
    """

    image: int
    step: int
    num_steps: int
    expert: int
    sigma: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Generated:
    """A finished image.

    Args:
        image (`PIL.Image.Image`): the image.
        settings ([`ImageSettings`]): what makes it again.
        seconds (`float`): the time for it, previews included.
        sigmas (`tuple[float, ...]`): of its evaluations.
        experts (`tuple[int, ...]`): of its evaluations.
        model (`str`): what the model is called.
        metadata ([`ImageMetadata`], *optional*): what `latte-flow generate --like` repeats.
    """

    image: Image.Image
    settings: ImageSettings
    seconds: float
    sigmas: tuple[float, ...]
    experts: tuple[int, ...]
    model: str
    metadata: ImageMetadata | None

    def png(self) -> bytes:
        """The image as a PNG file that says how it was made.

        That of a variation has its settings in a text chunk of its own, `latte_flow_studio`: a reader of the other
        would make the image that was varied.
        """
        file = io.BytesIO()
        if self.metadata is not None and not self.settings.variation:
            write_metadata(self.image, self.metadata, file)
        else:
            info = PngImagePlugin.PngInfo()
            info.add_itxt("latte_flow_studio", json.dumps({"model": self.model, **asdict(self.settings)}))
            self.image.save(file, "PNG", pnginfo=info)
        return file.getvalue()


def initial_noise(pipe: Any, settings: ImageSettings) -> tuple[torch.Tensor, torch.Generator]:
    """The noise of an image, (1, channels, height / f, width / f), and the generator for noise that the solver adds.

    A variation is a step on the sphere from the noise of `seed` towards that of `variation_seed`: with share a,
    cos(a pi / 2) noise + sin(a pi / 2) other, again standard normal. (Chosen: as interfaces for other diffusion models
    do.) Without a variation, it is what the pipeline itself draws with this generator.
    """
    height = settings.height or pipe.default_size
    width = settings.width or pipe.default_size
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(generator: torch.Generator) -> torch.Tensor:
        return pipe.prepare_latents(1, height, width, pipe.model.dtype, pipe._execution_device, generator)

    noise = draw(generator)
    if settings.variation:
        other = draw(torch.Generator().manual_seed(settings.variation_seed))
        angle = settings.variation * math.pi / 2
        noise = math.cos(angle) * noise + math.sin(angle) * other
    return noise, generator


def generate(
    pipe: Any,
    settings: ImageSettings,
    model: str,
    job: Job,
    image: int = 0,
    shows_previews: bool = True,
    trace: Trace | None = None,
    record: PipelineRecord | None = None,
) -> Generated:
    """Generate one image, in the thread of the queue. Its adapters must be active.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        settings ([`ImageSettings`]): the settings.
        model (`str`): what the model is called.
        job ([`Job`]): gets [`Progress`] after each step, and may stop between steps.
        image (`int`): the number of the image in its request.
        shows_previews (`bool`, defaults to `True`): whether to decode estimates, which takes time.
        trace ([`Trace`], *optional*): records the call.
        record ([`PipelineRecord`], *optional*): of the pipeline with its adapters, for the file of the image.

    Raises:
        `StoppedError`: if the job is stopped.
        `ValueError`: if the pipeline refuses the settings.
    """
    call: dict[str, Any] = {"height": settings.height, "width": settings.width}
    if isinstance(settings.steps, tuple):
        call["steps_per_expert"] = list(settings.steps)
    else:
        call["num_inference_steps"] = settings.steps
    guidance = settings.guidance
    call["guidance_scale"] = list(guidance) if isinstance(guidance, tuple) else guidance
    metadata = None if record is None else record_call(pipe, record, settings.prompt, settings.seed, **call)
    call["prompt"] = settings.prompt
    call["latents"], call["generator"] = initial_noise(pipe, settings)

    start = last_preview = time.perf_counter()
    trace = Trace() if trace is None else trace
    with trace.record(pipe) as recording:

        def on_step_end(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
            nonlocal last_preview
            recording.step(pipe, index, timestep, tensors)
            evaluation = trace.evaluations[-1]
            preview = None
            is_last = index + 1 == pipe.num_timesteps
            if shows_previews and not is_last and time.perf_counter() - last_preview > PREVIEW_SECONDS:
                preview = pipe.decode_latents(evaluation.clean)[0]
                last_preview = time.perf_counter()
            job.send(Progress(image, index + 1, pipe.num_timesteps, evaluation.expert, evaluation.sigma, preview))
            if job.stopped:
                pipe._interrupt = True
            return {}

        (result,) = pipe(**call, callback_on_step_end=on_step_end).images
    job.check()
    return Generated(
        image=result,
        settings=settings,
        seconds=time.perf_counter() - start,
        sigmas=tuple(evaluation.sigma for evaluation in trace.evaluations),
        experts=tuple(evaluation.expert for evaluation in trace.evaluations),
        model=model,
        metadata=metadata,
    )
