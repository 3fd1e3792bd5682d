# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Losses of the generation tower: flow matching on data, and the states of a teacher's trajectories.

Both split a batch over the experts and differ in what an example shows: `_expert_losses` is what they share.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .configuration_latte_flow import LatteFlowConfig
from .context import LatteFlowContext, check_prompts
from .distributed import randn_local_rows, rank_and_world_size
from .flow_matching import (
    BOUNDARY_TOLERANCE,
    assign_examples_to_experts,
    folded_guidance_target,
    interpolate,
    mean_velocity,
    velocity_loss,
    velocity_target,
)


# The arguments of `encode_context` that have a row for each prompt.
PER_PROMPT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class LatteFlowLossMixin:
    """The training losses of [`LatteFlowForConditionalGeneration`]."""

    config: LatteFlowConfig
    tower: Any
    training: bool
    interval_overlap: float
    expert_layers: Any
    encode_context: Any
    predict_velocity: Any
    _check_latents: Any

    @property
    def training_experts(self) -> list[int]:
        """The experts that a training step is split over: those with a trainable weight, adapters included.

        All experts if a shared module of the tower is trainable too, or if nothing is.
        """

        def is_trainable(module: nn.Module) -> bool:
            return any(parameter.requires_grad for parameter in module.parameters())

        experts = range(self.config.num_experts)
        trainable = [k for k in experts if any(is_trainable(self.tower.layers[i]) for i in self.expert_layers(k))]
        shared = any(is_trainable(module) for name, module in self.tower.named_children() if name != "layers")
        return trainable if trainable and not shared else list(experts)

    def flow_loss(
        self,
        latents: torch.Tensor,
        context: LatteFlowContext | Mapping[str, Any],
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        negative_context: LatteFlowContext | Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared error of the velocity, summed over the experts, each on timesteps of its interval. (Paper.)

        The batch is split over the experts that learn ([`~LatteFlowForConditionalGeneration.training_experts`]), see
        `flow_matching.assign_examples_to_experts`. In training mode each interval extends down to
        (1 - `interval_overlap`) times its lower end ([`IntervalWarmupCallback`]).

        With several processes, the batch is the one of all processes: the mean of their results equals the result of
        one process for the whole batch. `latents`, `context` and `noise` are this process's rows, the same number in
        each process.

        Args:
            latents (`torch.Tensor`): (B, C, height, width), clean.
            context ([`LatteFlowContext`] or a mapping):
                The encoded prompts, or the arguments of `encode_context`. Prompts without images are then prefilled
                for each expert separately, through the layers that the expert reads and no further.
            noise (`torch.Tensor`, *optional*): same shape as `latents`; drawn if not given.
            generator (`torch.Generator`, *optional*): source of the noise and the timesteps.
            negative_context ([`LatteFlowContext`] or a mapping, *optional*):
                The empty prompt, one for all examples, with `guidance_scale`.
            guidance_scale (`float`, *optional*): above 1, the guidance that the weights shall contain, see
                `flow_matching.folded_guidance_target`. It takes one more evaluation, without gradients.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the sum (scalar), and the summands (K,), detached; 0 for an expert
            that does not learn.
        """
        self._check_training_latents(latents, context)
        noise = randn_local_rows(latents, generator) if noise is None else noise
        if noise.shape != latents.shape:
            raise ValueError(f"noise must have the shape {tuple(latents.shape)} of latents, got {tuple(noise.shape)}.")

        def example_at(rows: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            noisy = interpolate(latents[rows], noise[rows], sigma)
            return noisy, sigma, velocity_target(latents[rows], noise[rows])

        guidance = None
        if guidance_scale is not None or negative_context is not None:
            guidance = _check_folded_guidance(guidance_scale, negative_context)
        overlap = self.interval_overlap if self.training else 0.0
        sampling = self.config.timestep_sampling
        return self._expert_losses(
            example_at, len(latents), latents.device, context, overlap, sampling, generator, guidance
        )

    def trajectory_loss(
        self,
        states: torch.Tensor,
        sigmas: Sequence[float] | None,
        context: LatteFlowContext | Mapping[str, Any],
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared error of the velocity from the start to the end of a step, summed over the experts.

        The target at the start of step j is `flow_matching.mean_velocity`, which leads to its end at once. The batch
        is split over the experts as in `flow_loss`, and each example gets one of the steps of its expert.

        Args:
            states (`torch.Tensor`): (B, S, 2, C, height, width), on trajectories of a teacher: where each of S steps
                starts, x(sigma_j), and where it ends, x(sigma_j+1). The next step may start elsewhere, if new noise
                is added between them.
            sigmas (`list[float]`): S + 1, falling from 1 to 0, among them all boundaries of the experts.
            context, generator: as in `flow_loss`.

        Returns:
            Same as `flow_loss`.
        """
        boundaries = self.config.expert_boundaries
        found = [] if sigmas is None else [float(sigma) for sigma in sigmas]
        missing = [b for b in boundaries if not any(abs(b - sigma) < BOUNDARY_TOLERANCE for sigma in found)]
        if missing or any(a <= b for a, b in itertools.pairwise(found)):
            raise ValueError(
                f"sigmas must fall from 1 to 0 and contain the boundaries {boundaries} of the experts, got {found}."
            )
        if states.ndim != 6 or states.shape[1:3] != (len(found) - 1, 2):
            raise ValueError(
                f"states must be (batch, {len(found) - 1}, 2, channels, height, width), the start and the end of each "
                f"step between the sigmas, got {tuple(states.shape)}."
            )
        self._check_training_latents(states[:, 0, 0], context)
        sigma_of_state = torch.tensor(found, device=states.device)

        def example_at(rows: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            # The step whose interval contains sigma: the experts' own sampling spreads examples over their steps.
            step = (sigma_of_state[None, 1:-1] >= sigma[:, None]).sum(dim=1)
            start, end = states[rows, step].unbind(dim=1)
            sigma_start, sigma_end = sigma_of_state[step], sigma_of_state[step + 1]
            return start, sigma_start, mean_velocity(start, end, sigma_start, sigma_end)

        return self._expert_losses(example_at, len(states), states.device, context, 0.0, "uniform", generator)

    def _check_training_latents(self, latents: torch.Tensor, context: LatteFlowContext | Mapping[str, Any]) -> None:
        if not isinstance(context, LatteFlowContext):
            check_prompts(context.get("input_ids"), context.get("attention_mask"))
        num_prompts = len(context if isinstance(context, LatteFlowContext) else context["input_ids"])
        self._check_latents(latents, num_prompts)
        if num_prompts != len(latents):
            raise ValueError(f"context must have a prompt for each of the {len(latents)} latents, got {num_prompts}.")

    def _expert_losses(
        self,
        example_at: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        num_examples: int,
        device: torch.device,
        context: LatteFlowContext | Mapping[str, Any],
        interval_overlap: float,
        sampling: str,
        generator: torch.Generator | None,
        guidance: tuple[float, LatteFlowContext | Mapping[str, Any]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of the experts, see `flow_loss`. `example_at` maps rows of the batch and the sigmas drawn for
        them, both (n,), to noisy latents, their sigmas and the target velocities. `guidance` is the scale to fold in,
        and the empty prompt."""
        if not isinstance(context, LatteFlowContext):
            # The patches of all images are in one tensor, which cannot be split by prompt.
            vision_inputs = [name for name in context if name.startswith(("pixel_values", "image_", "video_"))]
            if any(context[name] is not None for name in vision_inputs):
                context = self.encode_context(**context)
        rank, world_size = rank_and_world_size()
        assigned = assign_examples_to_experts(
            num_examples,
            self.training_experts,
            self.config.expert_boundaries,
            interval_overlap=interval_overlap,
            sampling=sampling,
            generator=generator,
            rank=rank,
            world_size=world_size,
        )
        losses = []
        for examples in assigned:
            rows = examples.indices.to(device)
            noisy, sigma, target = example_at(rows, examples.sigma.to(device))
            if isinstance(context, LatteFlowContext):
                expert_context = context.select(rows)
            else:
                inputs = {name: context[name][rows] for name in PER_PROMPT_INPUTS if context.get(name) is not None}
                num_layers = self.tower.layers[self.expert_layers(examples.expert)[-1]].source_index + 1
                expert_context = self.encode_context(**{**context, **inputs}, num_layers=num_layers)
            velocity = self.predict_velocity(noisy, 1000.0 * sigma, expert_context, expert=examples.expert)
            if guidance is not None:
                scale, negative = guidance
                if not isinstance(negative, LatteFlowContext):
                    num_layers = self.expert_layers(examples.expert).stop
                    negative = self.encode_context(**{**negative, "num_layers": num_layers})
                with torch.no_grad():
                    uncond_velocity = self.predict_velocity(noisy, 1000.0 * sigma, negative, expert=examples.expert)
                target = folded_guidance_target(target, velocity.detach(), uncond_velocity, scale)
            losses.append(examples.weight * velocity_loss(velocity, target))
        summands = torch.stack(losses)
        expert_losses = summands.new_zeros(self.config.num_experts)
        expert_losses[[examples.expert for examples in assigned]] = summands.detach()
        return summands.sum(), expert_losses


def _check_folded_guidance(
    guidance_scale: float | None, negative_context: LatteFlowContext | Mapping[str, Any] | None
) -> tuple[float, LatteFlowContext | Mapping[str, Any]]:
    """
    Raises:
        `ValueError`: if one of the two is missing, the scale is not above 1, or there is not exactly one prompt.
    """
    if guidance_scale is None or negative_context is None:
        raise ValueError("give guidance_scale and negative_context together: the guidance to learn, and from what.")
    if not guidance_scale > 1.0:
        raise ValueError(f"guidance_scale must be above 1 to be learned, got {guidance_scale}.")
    encoded = negative_context if isinstance(negative_context, LatteFlowContext) else negative_context["input_ids"]
    num_prompts = len(encoded)
    if num_prompts != 1:
        raise ValueError(f"negative_context must be one prompt, which serves all examples, got {num_prompts}.")
    return guidance_scale, negative_context
