# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Steps along falling sigmas, with the expert that owns each evaluation of the model.

With Euler every number equals `FlowMatchEulerDiscreteScheduler`'s to the bit; what is added is the copy of the
experts' boundaries, the expert of each step, steps that can be spent where they pay, and solvers of second order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# `SchedulerMixin` must be visible here: diffusers looks in a component's defining module for the base class it knows.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..modeling.flow_matching import (
    check_boundaries,
    data_from_velocity,
    expert_of_sigma,
    interpolate,
    uniform_boundaries,
)


SOLVERS = ("euler", "heun", "multistep")


@dataclass
class LatteFlowSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample at the next, smaller sigma; like the sample that was given.
    """

    prev_sample: torch.Tensor


class LatteFlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow-match steps from sigma 1 (noise) to 0 (data), each owned by one expert.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            `timestep = num_train_timesteps * sigma`.
        shift (`float`, defaults to 1.0):
            sigma <- shift * sigma / (1 + (shift - 1) * sigma): above 1 spends steps on the noise, below 1 on the data.
            1 changes nothing (chosen: the sources are silent). The experts' boundaries stay where they are.
        expert_boundaries (`list[float]`, *optional*):
            The model's own: K + 1 falling sigmas from 1 to 0. Four uniform intervals if not given. The pipeline
            refuses a model and a scheduler that disagree.
        solver (`str`, defaults to `"euler"`):
            `"euler"` (the paper's); `"heun"`, which evaluates the model a second time where each step but the last
            ends (n steps are 2n - 1 evaluations, as in diffusers); or `"multistep"`, which extrapolates the velocity
            from the evaluation before, at no cost (Adams-Bashforth of second order).
        stochastic_sampling (`bool`, `float` or `list[float]`, defaults to `False`):
            How much of the noise (of its variance, 0 to 1) each of Euler's steps draws anew; one value, or one for
            each expert. What an expert got wrong is then noise to the next step and not carried on. `True` is 1, as
            diffusers' `FlowMatchEulerDiscreteScheduler` has it (chosen: the paper's steps are deterministic). The
            other solvers draw nothing.

    Raises:
        `ValueError`: if the boundaries do not fall from 1 to 0, a number is out of range, there is no such solver, or
            `stochastic_sampling` has not one value for each expert.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    _begin_index: int | None = None
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        expert_boundaries: list[float] | None = None,
        solver: str = "euler",
        stochastic_sampling: bool | float | list[float] = False,
    ):
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}, got {solver!r}.")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be positive, got {num_train_timesteps}.")
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}.")
        boundaries = uniform_boundaries(4) if expert_boundaries is None else list(expert_boundaries)
        self.register_to_config(expert_boundaries=check_boundaries(boundaries, len(boundaries) - 1))
        if isinstance(stochastic_sampling, (list, tuple)):
            shares = list(stochastic_sampling)
        else:
            shares = [stochastic_sampling] * self.num_experts
        if len(shares) != self.num_experts or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"stochastic_sampling must be from 0 to 1, or such a value for each of {self.num_experts} experts, "
                f"got {stochastic_sampling!r}."
            )
        trained = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1].copy()
        self._set_sigmas(self._shifted(torch.from_numpy(trained) / num_train_timesteps))
        # The range from which `set_timesteps` takes its steps.
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-2].item()
        self.num_inference_steps: int | None = None

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.config.expert_boundaries) - 1

    @property
    def order(self) -> int:
        """Evaluations of the model a step."""
        return 2 if self.config.solver == "heun" else 1

    @property
    def step_index(self) -> int | None:
        """How many steps were taken since `set_timesteps`; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step's index, if a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this step (a pipeline that starts from a picture does not start from pure noise)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        steps_per_expert: Sequence[int] | None = None,
    ) -> None:
        """Choose the steps: by their number, by their sigmas, or by a number for each expert.

        Afterwards `timesteps` (n,), `sigmas` (n + 1,), the last of them 0, and `experts` (a list of n) tell them; with
        Heun all but the first and the last sigma come twice, where a step ends and where the next one starts.

        Args:
            num_inference_steps (`int`, *optional*):
                n steps, evenly spaced in timesteps from 1000 to 1 as diffusers has it.
            device (*optional*): where `timesteps` lie; the sigmas stay on the CPU.
            sigmas (`list[float]`, *optional*): falling sigmas in (0, 1], before the shift.
            steps_per_expert (`list[int]`, *optional*):
                How many steps each expert gets, evenly spaced in its interval; no shift. 0 skips an expert: the step
                before it then crosses its interval.

        Raises:
            `ValueError`: if not exactly one of the three is given (a number may go with `sigmas` of that length), or a
            value is out of range.
        """
        if (sigmas is None and num_inference_steps is None) == (steps_per_expert is None):
            raise ValueError("give one of num_inference_steps, sigmas and steps_per_expert.")
        if steps_per_expert is not None:
            found = self._sigmas_per_expert(steps_per_expert)
        elif sigmas is not None:
            if num_inference_steps is not None and len(sigmas) != num_inference_steps:
                raise ValueError(f"sigmas must be {num_inference_steps} (num_inference_steps), got {len(sigmas)}.")
            given = np.array(sigmas).astype(np.float32)
            if len(given) == 0 or not (given[0] <= 1 and given[-1] > 0 and (np.diff(given) < 0).all()):
                raise ValueError(f"sigmas must fall strictly inside (0, 1], got {list(sigmas)}.")
            found = self._shifted(torch.from_numpy(given))
        else:
            assert num_inference_steps is not None
            check_num_inference_steps(num_inference_steps)
            scale = self.config.num_train_timesteps
            spaced = np.linspace(self.sigma_max * scale, self.sigma_min * scale, num_inference_steps) / scale
            found = self._shifted(torch.from_numpy(spaced)).to(torch.float32)
        self.num_inference_steps = len(found)
        self._set_sigmas(found, device)

    def _sigmas_per_expert(self, steps_per_expert: Sequence[int]) -> torch.Tensor:
        boundaries = self.config.expert_boundaries
        steps = list(steps_per_expert) if isinstance(steps_per_expert, (list, tuple)) else []
        whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in steps)
        if len(steps) != self.num_experts or not whole or not steps[0]:
            raise ValueError(
                f"steps_per_expert must be {self.num_experts} whole numbers, one for each expert, the first at least "
                f"1, got {steps_per_expert}."
            )
        spaced = [np.linspace(high, low, n, endpoint=False) for high, low, n in zip(boundaries, boundaries[1:], steps)]
        return torch.from_numpy(np.concatenate(spaced)).to(torch.float32)

    def _shifted(self, sigmas: torch.Tensor) -> torch.Tensor:
        shift = self.config.shift
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _set_sigmas(self, sigmas: torch.Tensor, device: str | torch.device | None = None) -> None:
        if self.config.solver == "heun":
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self._step_index: int | None = None
        self._begin_index = None
        self._previous: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def experts(self) -> list[int]:
        """The expert of each evaluation; a corrector belongs to the interval of the step that it ends."""
        boundaries = self.config.expert_boundaries
        return [
            expert_of_sigma(sigma, boundaries, ends_step=self._is_corrector(index))
            for index, sigma in enumerate(self.sigmas[:-1].tolist())
        ]

    def _is_corrector(self, index: int) -> bool:
        return self.config.solver == "heun" and index % 2 == 1

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: flow matching scales nothing."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LatteFlowSchedulerOutput | tuple[torch.Tensor]:
        """One evaluation's share of a step, in float32; h is the step's width, sigma_next - sigma, below zero.

        Euler: x_next = x + h * v. Heun: the same to where the step ends, and from the velocity there
        x_next = x + h * (v + v_there) / 2. Multistep: x_next = x + h * (v + h / (2 * h_before) * (v - v_before)), the
        first step Euler's. With a share s of new noise e, and
        data = x - sigma * v: x_next = (1 - sigma_next) * data + sigma_next * (sqrt(1 - s) * (data + v) + sqrt(s) * e).

        Args:
            model_output (`torch.Tensor`): the velocity (noise - data) at `sample`.
            timestep (`float` or `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor`): x at this timestep.
            generator (`torch.Generator` or a list of them, *optional*): of the new noise, with `stochastic_sampling`.
            return_dict (`bool`, defaults to `True`): a [`LatteFlowSchedulerOutput`] or a tuple.

        Raises:
            `ValueError`: if `timestep` is an index or not one of `timesteps`, or all steps were taken.
        """
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of `scheduler.timesteps`, not an index, got {timestep}.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        if index >= len(self.sigmas) - 1:
            raise ValueError(f"all {len(self.sigmas) - 1} steps are taken; call set_timesteps first.")
        sample = sample.to(torch.float32)
        share = self._share_of_new_noise(index)
        if share == 0:
            prev_sample = getattr(self, f"_{self.config.solver}")(index, model_output, sample)
        else:
            data = data_from_velocity(sample, model_output, self.sigmas[index])
            new = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            noise = (1.0 - share) ** 0.5 * (data + model_output) + share**0.5 * new
            prev_sample = interpolate(data, noise, self.sigmas[index + 1])
        prev_sample = prev_sample.to(model_output.dtype)
        self._step_index += 1
        return LatteFlowSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _share_of_new_noise(self, index: int) -> float:
        shares = self.config.stochastic_sampling
        if self.config.solver != "euler":
            return 0.0
        return float(shares[self.experts[index]] if isinstance(shares, (list, tuple)) else shares)

    def _euler(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample + (self.sigmas[index + 1] - self.sigmas[index]) * velocity

    def _heun(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self._previous is None:
            # The last step has no corrector: it would be evaluated at sigma 0.
            if index + 2 < len(self.sigmas):
                self._previous = velocity, sample
            return self._euler(index, velocity, sample)
        (velocity_before, sample_before), self._previous = self._previous, None
        return self._euler(index - 1, 0.5 * (velocity_before + velocity), sample_before)

    def _multistep(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        width = self.sigmas[index + 1] - self.sigmas[index]
        extrapolated = velocity
        if self._previous is not None:
            velocity_before, width_before = self._previous
            extrapolated = velocity + (width / (2 * width_before)) * (velocity - velocity_before)
        self._previous = velocity, width
        return sample + width * extrapolated

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The step that starts at `timestep`.

        Raises:
            `ValueError`: if `timestep` is not one of `timesteps`.
        """
        found = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep must be one of `scheduler.timesteps`, got {float(timestep)}.")
        # Heun's sigmas come twice; a run starts where a step does.
        return int(found[-1])

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_sigma = (1 - sigma) * data + sigma * noise with sigma = timestep / num_train_timesteps, (B,)."""
        sigma = timesteps.to(original_samples.device, torch.float32) / self.config.num_train_timesteps
        return interpolate(original_samples, noise, sigma)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` under the name and in the order of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def check_num_inference_steps(num_inference_steps: int) -> None:
    """Refuse anything but a positive whole number.

    Raises:
        `ValueError`: with the value.
    """
    whole = isinstance(num_inference_steps, (int, np.integer)) and not isinstance(num_inference_steps, bool)
    if not whole or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a positive whole number, got {num_inference_steps!r}.")
