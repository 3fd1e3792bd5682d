# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The steps of a call and the loop over them, the same for all pipelines.

Image-to-image starts at a later step: the experts above the starting sigma never run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..modeling.context import LatteFlowContext
from ..modeling.flow_matching import guided_velocity
from ..modeling.sampling import (
    check_distilled_steps,
    check_distilled_strength,
    default_strength,
    guidance_of_steps,
)
from ..schedulers.steps import (
    distilled_scheduler,
    experts_of_steps,
    finish_step,
    first_evaluation,
    generator_kwargs,
    model_timesteps,
    num_steps,
    set_timesteps,
)
from .offloading import runs_only_in_forward
from .source_images import KnownRegion, SourceImages


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DenoisingSteps:
    """The n evaluations of the model in a call.

    Args:
        first (`int`): the index of the first one in the timesteps of the scheduler; 0 unless an image is the start.
        timesteps (`torch.Tensor`): (n,), those of the scheduler.
        model_timesteps (`torch.Tensor`): (n,), `1000 * sigma`, which the model takes.
        sigmas (`list[float]`): n + 1 falling sigmas, where each evaluation starts and where the last one ends, 0.
        experts (`list[int]`): the expert of each.
        scales (`list[float]`): the guidance scale of each; up to 1, it is not guided.
    """

    first: int
    timesteps: torch.Tensor
    model_timesteps: torch.Tensor
    sigmas: list[float]
    experts: list[int]
    scales: list[float]

    @property
    def is_guided(self) -> list[bool]:
        """Whether each may be guided."""
        return [scale > 1 for scale in self.scales]


def prepare_steps(
    scheduler: Any,
    config: Any,
    sampling: dict[str, Any],
    guidance_scale: float | list[float],
    guidance_interval: tuple[float, float] | None,
    source: SourceImages | None,
    starts_from_noise: bool,
    **arguments: Any,
) -> DenoisingSteps:
    """Set the timesteps of a scheduler and find the expert of each.

    Args:
        scheduler: the scheduler, which is changed; that of `distilled_scheduler` for a distilled model.
        config ([`LatteFlowConfig`]): the configuration of the model.
        sampling (`dict`): how the model, with its active adapters, is sampled.
        guidance_scale, guidance_interval: see the call.
        source ([`SourceImages`], *optional*): the images to start from, and the share of the steps to take.
        starts_from_noise (`bool`): whether the first sigma must be (almost) 1.
        arguments: the arguments of [`schedulers.steps.set_timesteps`].

    Raises:
        `ValueError`: if the scheduler or the steps cannot lead to right images.
    """
    boundaries = config.expert_boundaries
    set_timesteps(scheduler, starts_from_noise=starts_from_noise, **arguments)
    first = 0
    if source is not None:
        n = num_steps(scheduler)
        strength = default_strength(n, sampling) if source.strength is None else source.strength
        first = first_evaluation(scheduler, strength)
        scheduler.set_begin_index(first)
    sigmas = scheduler.sigmas.tolist()[first:]
    check_distilled_steps(sigmas, sampling, boundaries)
    experts = experts_of_steps(scheduler, boundaries)[first:]
    if source is not None:
        check_distilled_strength(strength, n, experts[0], sampling)
    model_times = model_timesteps(scheduler)[first:]
    scales = guidance_of_steps(guidance_scale, guidance_interval, experts, model_times.tolist())
    # `finish_step` takes the last step of every scheduler to 0.
    sigmas[-1] = 0.0
    return DenoisingSteps(first, scheduler.timesteps[first:], model_times, sigmas, experts, scales)


class LatteFlowDenoisingMixin:
    """The steps of a call and the loop over them; it stands before `DiffusionPipeline`."""

    model: Any
    scheduler: Any
    expert_offload: Any
    progress_bar: Any
    _adapters: Any
    _running_call: Any
    _guidance_scale: Any
    _current_expert: Any
    _num_timesteps: Any
    _interrupt: Any

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current expert."""
        if isinstance(self._guidance_scale, list):
            return self._guidance_scale[self._current_expert]
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance is on. A callback may end it by `pipe._guidance_scale = 1.0`."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of evaluations of the model in the current call of this thread, or in its last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is interrupted. A callback may skip the remaining steps of its call by
        `pipe._interrupt = True`; a thread without a running call interrupts all calls."""
        return self._interrupt

    def _prepare_steps(
        self,
        sampling: dict[str, Any],
        guidance_interval: tuple[float, float] | None,
        source: SourceImages | None,
        starts_from_noise: bool,
        **arguments: Any,
    ) -> DenoisingSteps:
        """Same as `prepare_steps`, for the scheduler and the guidance of the call."""
        if sampling != (self.model.config.sampling or {}):
            # The pipeline's scheduler belongs to the model without the adapter that is active.
            self._running_call.scheduler = distilled_scheduler(self.scheduler, sampling, self.model.config)
        steps = prepare_steps(
            self.scheduler,
            self.model.config,
            sampling,
            self._guidance_scale,
            guidance_interval,
            source,
            starts_from_noise,
            **arguments,
        )
        self._num_timesteps = len(steps.experts)
        return steps

    def _denoise(
        self,
        latents: torch.Tensor,
        steps: DenoisingSteps,
        context: LatteFlowContext,
        negative_context: LatteFlowContext | None,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        known: KnownRegion | None,
    ) -> torch.Tensor:
        """Take the latents from the first sigma of the steps to 0.

        Args:
            latents (`torch.Tensor`): (batch, channels, height / f, width / f), at the first sigma.
            steps ([`DenoisingSteps`]): the steps.
            context, negative_context ([`LatteFlowContext`]): the encoded prompts; without the second, no guidance.
            generator, callback_on_step_end, callback_on_step_end_tensor_inputs: see the call.
            known ([`KnownRegion`], *optional*): what is not generated.
        """
        guided_context = None if negative_context is None else LatteFlowContext.cat([negative_context, context])
        layout = guided_layout = modulation = uncond_velocity = cond_velocity = None
        precompute = not runs_only_in_forward(self.model.tower)
        if precompute:
            layout = self.model.latent_layout(latents, context)
            if guided_context is not None:
                guided_layout = self.model.latent_layout(torch.cat([latents, latents]), guided_context)
        extra_step_kwargs = generator_kwargs(self.scheduler, generator)
        adapters = self._adapters()
        experts = steps.experts

        with self.progress_bar(total=len(experts)) as progress_bar:
            for i, (t, scheduler_t, expert) in enumerate(zip(steps.model_timesteps, steps.timesteps, experts)):
                if self.interrupt:
                    continue
                self._current_expert = expert
                if i == 0 or expert != experts[i - 1]:
                    progress_bar.set_description(f"expert {expert} of {self.model.config.num_experts}")
                    first_step, last_step = i, i + experts.count(expert) - 1
                    if self.expert_offload is not None:
                        self.expert_offload.enter(expert)
                # A callback may have changed, loaded or unloaded adapters since the step before.
                is_adapted = adapters != [] or self._adapters() != []
                if precompute and (i == first_step or (callback_on_step_end is not None and is_adapted)):
                    adapters = self._adapters()
                    modulation = self.model.modulate(steps.model_timesteps[first_step : last_step + 1], expert)
                if self.expert_offload is not None and i == last_step and i + 1 < len(experts):
                    self.expert_offload.next_expert = experts[i + 1]

                shared = {"expert": expert, "modulation": None if modulation is None else modulation[i - first_step]}
                if steps.is_guided[i] and self.do_classifier_free_guidance:
                    velocity = self.model.predict_velocity(
                        torch.cat([latents, latents]), t, guided_context, layout=guided_layout, **shared
                    )
                    uncond_velocity, cond_velocity = velocity.chunk(2)
                    velocity = guided_velocity(uncond_velocity, cond_velocity, self.guidance_scale)
                else:
                    velocity = self.model.predict_velocity(latents, t, context, layout=layout, **shared)

                latents = self.scheduler.step(velocity, scheduler_t, latents, **extra_step_kwargs, return_dict=False)[
                    0
                ]
                latents = finish_step(self.scheduler, steps.first + i, velocity, latents)
                if known is not None:
                    latents = known.restore(latents, steps.sigmas[i + 1])

                if callback_on_step_end is not None:
                    tensors = {"latents": latents}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, scheduler_t, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                progress_bar.update()

        if self.expert_offload is not None:
            self.expert_offload.release_all()
        if cond_velocity is not None and torch.equal(uncond_velocity, cond_velocity):
            logger.warning(
                "Prompt and negative prompt give the same velocity: they are equal, or the tower is untrained."
            )
        return latents
