# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Continuous batching by expert: which images take their next step together, and that step.

In other diffusion models, a batch has one timestep. Here, all images that wait for one expert can share a batch, each
at its own timestep, since `predict_velocity` takes one timestep for each image. An image joins and leaves between any
two steps.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..modeling.context import LatteFlowContext
from ..modeling.modeling_latte_flow import LatteFlowLayout, LatteFlowModulation
from ..pipelines.offloading import runs_only_in_forward
from .running_image import RunningImage


# Modulations of an expert's steps that are kept: one for each adapter, expert and list of timesteps in use.
MAX_MODULATIONS = 64


class ExpertBatches:
    """The images that wait for a step, and the choice of those that take it together.

    A batch has one expert, one adapter and one size. Next is the batch of the image that came first: all others that
    wait there move along with it (Chosen: with the largest batch first, images of one time are torn apart, batches are
    smaller and the slowest images slower, as `benchmarks/serving.py` showed). But if an image was passed over for more
    than `patience` ticks, its batch is next. So with G batches to choose from, no image waits for more than
    `patience` + G ticks.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model.
        patience (`int`, defaults to 32): how many ticks an image may be passed over. (Chosen: 16 and fewer tear
            batches apart; 64 are no faster.)
    """

    def __init__(self, model: Any, patience: int = 32):
        if patience < 0:
            raise ValueError(f"patience must not be negative, got {patience}.")
        self.model, self.patience = model, patience
        self.num_ticks = 0
        self._last_ticks: dict[RunningImage, int] = {}
        # Of each batch, by expert, adapter and size, the inputs of its last step.
        self._inputs: dict[tuple, tuple[list, LatteFlowContext, LatteFlowLayout | None]] = {}
        self._modulations: dict[tuple, list[LatteFlowModulation]] = {}

    def __len__(self) -> int:
        return len(self._last_ticks)

    @property
    def images(self) -> list[RunningImage]:
        return list(self._last_ticks)

    def add(self, images: Iterable[RunningImage]) -> None:
        """Let images wait for their next step."""
        for image in images:
            self._last_ticks[image] = self.num_ticks

    def remove(self, images: Iterable[RunningImage]) -> None:
        """Forget images, whether they are finished or not."""
        for image in images:
            self._last_ticks.pop(image, None)

    def forget_adapter(self, name: str) -> None:
        """Drop what was computed with an adapter that is unloaded."""
        self._modulations = {key: value for key, value in self._modulations.items() if key[0] != name}

    def choose(self) -> list[RunningImage]:
        """The images that take the next step, in the order in which they came; empty if there are none."""
        batches: dict[tuple, list[RunningImage]] = {}
        for image in self._last_ticks:
            batches.setdefault(_key(image), []).append(image)
        self._inputs = {key: inputs for key, inputs in self._inputs.items() if key in batches}
        if not batches:
            return []

        def last_tick(batch: list[RunningImage]) -> int:
            return min(self._last_ticks[image] for image in batch)

        longest = min(batches.values(), key=last_tick)
        if self.num_ticks - last_tick(longest) > self.patience:
            return longest
        return batches[_key(next(iter(self._last_ticks)))]

    @torch.no_grad()
    def step(self, batch: Sequence[RunningImage]) -> dict[RunningImage, Exception]:
        """Take one step with the images of [`~ExpertBatches.choose`]; their adapter must be the active one.

        Returns:
            The images that could not take it, each with its own error. If the batch as a whole fails, for instance for
            lack of memory, its images are tried one by one.
        """
        self.num_ticks += 1
        for image in batch:
            self._last_ticks[image] = self.num_ticks
        try:
            velocities = dict(zip(batch, self._velocities(batch), strict=True))
        except Exception as error:
            if len(batch) == 1:
                return {batch[0]: error}
            velocities, errors = {}, {}
            for image in batch:
                try:
                    (velocities[image],) = self._velocities([image])
                except Exception as own_error:
                    errors[image] = own_error
        else:
            errors = {}
        for image, velocity in velocities.items():
            try:
                image.advance(velocity)
            except Exception as error:
                errors[image] = error
        return errors

    def _velocities(self, batch: Sequence[RunningImage]) -> Sequence[torch.Tensor]:
        """The velocities of each image, (1 or 2, C, height, width)."""
        expert = batch[0].expert
        num_rows = [len(image.contexts) for image in batch]
        offload = getattr(self.model.tower, "expert_offload", None)
        if offload is not None:
            offload.enter(expert)
        context, layout = self._context_and_layout(batch)
        rows = [image for image, n in zip(batch, num_rows) for _ in range(n)]
        modulation = None
        if not runs_only_in_forward(self.model.tower):
            # As in the pipeline: one row for all, if all images are at the same timestep of the same steps.
            at_steps = [self._modulation(image) for image in batch]
            is_shared = all(each is at_steps[0] for each in at_steps)
            of_rows = [each for each, n in zip(at_steps, num_rows) for _ in range(n)]
            modulation = at_steps[0] if is_shared else LatteFlowModulation.cat(of_rows)
        velocities = self.model.predict_velocity(
            torch.cat([image.latents for image in rows]),
            torch.tensor([image.timesteps[image.index] for image in rows], device=batch[0].latents.device),
            context,
            expert,
            modulation,
            layout,
        )
        return velocities.split(num_rows)

    def _context_and_layout(self, batch: Sequence[RunningImage]) -> tuple[LatteFlowContext, LatteFlowLayout | None]:
        """The prompts of a batch, joined again only if it is not the same as in the last step of its expert."""
        key, members = _key(batch[0]), [(image, image.is_guided) for image in batch]
        if key in self._inputs and self._inputs[key][0] == members:
            return self._inputs[key][1:]
        layers = self.model.config.context_layers(batch[0].expert)
        context = LatteFlowContext.cat([each.of_layers(layers) for image in batch for each in image.contexts])
        layout = None
        if not runs_only_in_forward(self.model.tower):
            latents = batch[0].latents
            # Only the shape matters.
            layout = self.model.latent_layout(latents.expand(len(context), -1, -1, -1), context)
        self._inputs[key] = (members, context, layout)
        return context, layout

    def _modulation(self, image: RunningImage) -> LatteFlowModulation:
        """The modulation at the next step of an image; equal steps share it."""
        first, end = image.expert_interval()
        key = (image.adapter, image.expert, image.timesteps)
        if key not in self._modulations:
            if len(self._modulations) >= MAX_MODULATIONS:
                self._modulations.clear()
            timesteps = torch.tensor(image.timesteps[first:end], device=image.latents.device)
            modulation = self.model.modulate(timesteps, image.expert)
            self._modulations[key] = [modulation[step] for step in range(len(timesteps))]
        return self._modulations[key][image.index - first]


def _key(image: RunningImage) -> tuple:
    return (image.expert, image.adapter, tuple(image.latents.shape[2:]))
