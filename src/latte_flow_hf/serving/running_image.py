# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One image between two steps: everything that a call of the pipeline keeps in local variables, as an object.

With that, images of different requests, at different timesteps and with different numbers of steps, can take their
next step together, and an image can continue in another process.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from ..modeling.flow_matching import data_from_velocity, guided_velocity
from ..pipelines.denoising import DenoisingSteps, prepare_steps
from ..pipelines.offloading import check_hooks
from ..pipelines.source_images import KnownRegion, SourceImages, load_masked_sources, load_sources
from ..schedulers.steps import distilled_scheduler, finish_step, generator_kwargs


@dataclass(frozen=True)
class ImageRequest:
    """What is asked for: arguments of [`LatteFlowPipeline`], with the same meaning and the same defaults.

    Image number i is the one that `pipe(..., generator=torch.Generator().manual_seed(seed + i))` gives alone.

    Args:
        prompt (`str`, *optional*): the prompt, or `messages` instead.
        messages (`list[dict]`, *optional*): a conversation in the chat-template form.
        image (*optional*): images that are shown to the model before the prompt.
        negative_prompt (`str`, *optional*): what to guide away from.
        height, width (`int`, *optional*): in pixels.
        num_inference_steps (`int`, *optional*): the number of steps.
        steps_per_expert (`list[int]`, *optional*): the number of steps of each expert, instead.
        guidance_scale (`float` or `list[float]`, *optional*): one, or one for each expert.
        guidance_interval (`tuple[float, float]`, *optional*): (low, high) sigmas between which guidance is used.
        seed (`int`, defaults to 0): the seed of the first image; the next one has the next seed.
        num_images (`int`, defaults to 1): the number of images.
        adapter (`str`, *optional*): the name of an adapter.
        num_previews (`int`, defaults to 0): how often an image is shown before it is finished.
        output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
        source_image (*optional*): an image to start from, as `image` of [`LatteFlowImg2ImgPipeline`].
        mask_image (*optional*): what of it to generate, as in [`LatteFlowInpaintPipeline`].
        strength (`float`, *optional*): the share of the steps to take, with `source_image`.
    """

    prompt: str | None = None
    messages: list[dict] | None = None
    image: Any = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    steps_per_expert: list[int] | None = None
    guidance_scale: float | list[float] | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    num_images: int = 1
    adapter: str | None = None
    num_previews: int = 0
    output_type: str = "pil"
    source_image: Any = None
    mask_image: Any = None
    strength: float | None = None


@dataclass(eq=False)
class RunningImage:
    """An image that is being generated.

    Args:
        latents (`torch.Tensor`): (1, C, height, width), at the next timestep.
        scheduler: its own copy, with its steps and whatever the solver remembers.
        generator (`torch.Generator`): the source of its noise.
        timesteps (`tuple[float, ...]`): `1000 * sigma` of each evaluation of the model.
        experts (`list[int]`): the expert of each evaluation.
        scales (`list[float]`): the guidance scale of each evaluation; up to 1, there is none.
        sigmas (`list[float]`): n + 1, where each evaluation starts and where the last one ends, 0.
        first (`int`): the index of the first evaluation in the timesteps of the scheduler.
        context, negative_context ([`LatteFlowContext`], *optional*): one prompt each, without padding; the negative
            one is `None` if no evaluation is guided.
        adapter (`str`, *optional*): the adapter that it is generated with.
        index (`int`): the number of the next evaluation.
        known ([`KnownRegion`], *optional*): what is not generated.
        velocity (`torch.Tensor`, *optional*): of the last evaluation, with guidance, at `previous_latents`.
    """

    latents: torch.Tensor
    scheduler: Any
    generator: torch.Generator
    timesteps: tuple[float, ...]
    experts: list[int]
    scales: list[float]
    sigmas: list[float]
    first: int
    context: LatteFlowContext | None
    negative_context: LatteFlowContext | None
    adapter: str | None = None
    index: int = 0
    known: KnownRegion | None = None
    velocity: torch.Tensor | None = None
    previous_latents: torch.Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.index == len(self.experts)

    @property
    def expert(self) -> int:
        """The expert of the next evaluation."""
        return self.experts[self.index]

    @property
    def is_guided(self) -> bool:
        """Whether the next evaluation needs the negative prompt too."""
        return self.scales[self.index] > 1

    @property
    def contexts(self) -> list[LatteFlowContext]:
        """The prompts of the next evaluation, in the order of the rows of its velocity."""
        contexts = [self.negative_context, self.context] if self.is_guided else [self.context]
        return [context for context in contexts if context is not None]

    def expert_interval(self) -> tuple[int, int]:
        """The first evaluation of the current expert, and the one after its last."""
        first = self.experts.index(self.expert)
        return first, first + self.experts.count(self.expert)

    def to(self, device: torch.device | str) -> "RunningImage":
        """The same image on another device, with what its solver remembers."""

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            return [move(item) for item in value] if isinstance(value, list) else value

        scheduler = copy.copy(self.scheduler)
        # Schedulers keep their sigmas on the CPU.
        vars(scheduler).update({name: move(value) for name, value in vars(scheduler).items() if name != "sigmas"})
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        if self.known is not None:
            moved["known"] = KnownRegion(**{name: value.to(device) for name, value in vars(self.known).items()})
        return dataclasses.replace(self, scheduler=scheduler, **moved)

    def advance(self, velocities: torch.Tensor) -> None:
        """Take one step of the solver.

        Args:
            velocities (`torch.Tensor`): (1 or 2, C, height, width), one for each of `contexts`.
        """
        velocity = velocities[-1:]
        if self.is_guided:
            velocity = guided_velocity(velocities[:1], velocity, self.scales[self.index])
        timestep = self.scheduler.timesteps[self.first + self.index]
        kwargs = generator_kwargs(self.scheduler, self.generator)
        latents = self.scheduler.step(velocity, timestep, self.latents, **kwargs, return_dict=False)[0]
        latents = finish_step(self.scheduler, self.first + self.index, velocity, latents)
        if self.known is not None:
            latents = self.known.restore(latents, self.sigmas[self.index + 1])
        self.previous_latents, self.velocity = self.latents, velocity
        self.latents = latents
        self.index += 1

    def prediction(self) -> torch.Tensor:
        """The clean latents at which the last velocity points, (1, C, height, width)."""
        assert self.previous_latents is not None and self.velocity is not None
        latents = data_from_velocity(self.previous_latents, self.velocity, self.sigmas[self.index - 1])
        return latents if self.known is None else self.known.restore(latents, 0.0)


@dataclass(frozen=True)
class _Plan:
    """The size, the start and the steps of a request's images."""

    request: ImageRequest
    height: int
    width: int
    source: SourceImages | None
    scheduler: Any
    steps: DenoisingSteps

    @property
    def is_guided(self) -> bool:
        return any(self.steps.is_guided)


@torch.no_grad()
def start_images(pipe: Any, requests: Sequence[ImageRequest]) -> list[list[RunningImage] | Exception]:
    """What [`LatteFlowPipeline`] does before its first step: checks, steps, prompts, noise.

    Prompts are encoded together, as far as they share a negative prompt.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline, with the adapter of the requests active.
        requests (`list[ImageRequest]`): requests for one adapter.

    Returns:
        Of each request its images, or the error: a `ValueError` if an argument is invalid.
    """
    outcomes: list[Any] = []
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        try:
            plan = _plan(pipe, request)
        except Exception as error:
            outcomes.append(error)
            continue
        outcomes.append(plan)
        key = index if request.messages is not None else (plan.is_guided, request.negative_prompt)
        groups.setdefault(key, []).append(index)
    for indices in groups.values():
        for index, images in zip(indices, _start(pipe, [outcomes[index] for index in indices]), strict=True):
            outcomes[index] = images
    return outcomes


def _plan(pipe: Any, request: ImageRequest) -> _Plan:
    """
    Raises:
        `ValueError`: if an argument is invalid.
    """
    # 1. Check inputs
    sampling, config = pipe.model.sampling, pipe.model.config
    height = pipe.default_size if request.height is None else request.height
    width = pipe.default_size if request.width is None else request.width
    num_inference_steps, steps_per_expert, guidance_scale = pipe._sampling_arguments(
        sampling, request.num_inference_steps, request.steps_per_expert, request.guidance_scale, has_sigmas=False
    )
    pipe.check_inputs(
        request.prompt,
        request.image,
        request.messages,
        request.negative_prompt,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        request.guidance_interval,
        request.num_images,
        None,
        request.output_type,
        [],
    )
    if request.prompt is not None and not isinstance(request.prompt, str):
        raise ValueError(f"prompt must be one string, got {request.prompt!r}; send a request for each prompt.")
    check_hooks(pipe.model)

    source = _source(pipe, request)

    # 2. Prepare timesteps, the expert of each, and its guidance
    scheduler = copy.deepcopy(pipe.scheduler)
    if sampling != (config.sampling or {}):
        scheduler = distilled_scheduler(scheduler, sampling, config)
    steps = prepare_steps(
        scheduler,
        config,
        sampling,
        guidance_scale,
        request.guidance_interval,
        source,
        starts_from_noise=source is None,
        num_inference_steps=num_inference_steps,
        device=pipe._execution_device,
        steps_per_expert=steps_per_expert,
    )
    return _Plan(request, height, width, source, scheduler, steps)


def _source(pipe: Any, request: ImageRequest) -> SourceImages | None:
    if request.source_image is None:
        if request.mask_image is not None or request.strength is not None:
            raise ValueError("mask_image and strength need a source_image.")
        return None
    background = getattr(pipe.processor, "background", "white")
    if request.mask_image is None:
        return load_sources(request.source_image, request.strength, background)
    return load_masked_sources(request.source_image, request.mask_image, request.strength, background)


def _start(pipe: Any, plans: Sequence[_Plan]) -> list[list[RunningImage] | Exception]:
    """The images of plans whose prompts can be encoded together; one by one, if that fails."""
    requests, device = [plan.request for plan in plans], pipe._execution_device
    try:
        # 3. Encode prompts
        context, negative_context = pipe.encode_prompt(
            None if requests[0].messages is not None else [request.prompt for request in requests],
            [request.image for request in requests]
            if any(request.image is not None for request in requests)
            else None,
            requests[0].messages,
            requests[0].negative_prompt,
            do_classifier_free_guidance=plans[0].is_guided,
            device=device,
        )
    except Exception as error:
        return [error] if len(plans) == 1 else [_start(pipe, [plan])[0] for plan in plans]
    contexts = _each(context)
    negative_contexts = [None] * len(plans) if negative_context is None else _each(negative_context)

    outcomes: list[list[RunningImage] | Exception] = []
    for plan, context, negative_context in zip(plans, contexts, negative_contexts, strict=True):
        try:
            outcomes.append(_start_plan(pipe, plan, context, negative_context))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def _each(context: LatteFlowContext) -> list[LatteFlowContext]:
    """Each prompt in memory of its own, which a view of the batch would keep, and take along to other processes."""
    return [each.select(torch.zeros_like(each.next_position)) for each in context.split()]


def _start_plan(
    pipe: Any, plan: _Plan, context: LatteFlowContext, negative_context: LatteFlowContext | None
) -> list[RunningImage]:
    # 4. Prepare latents
    request, steps, device = plan.request, plan.steps, pipe._execution_device
    # On the CPU, so that the noise is the same for every device.
    generators = [torch.Generator().manual_seed(request.seed + number) for number in range(request.num_images)]
    size = (plan.height, plan.width)
    noise = torch.cat([pipe.prepare_latents(1, *size, pipe.model.dtype, device, each) for each in generators])
    latents, known = noise, None
    if plan.source is not None:
        latents, known = pipe._prepare_source(plan.source, noise, steps, *size, 1, request.num_images)
    return [
        RunningImage(
            latents[row : row + 1].clone(),
            copy.deepcopy(plan.scheduler),
            generator,
            tuple(steps.model_timesteps.tolist()),
            steps.experts,
            steps.scales,
            steps.sigmas,
            steps.first,
            context,
            negative_context,
            request.adapter,
            known=None
            if known is None
            else KnownRegion(*(part[row : row + 1].clone() for part in (known.latents, known.noise, known.mask))),
        )
        for row, generator in enumerate(generators)
    ]
