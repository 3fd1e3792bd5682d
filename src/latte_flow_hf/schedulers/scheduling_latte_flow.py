# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Flow-matching steps along falling sigmas, and the expert that owns each evaluation of the model.

For equal sigmas, Euler gives the numbers of `FlowMatchEulerDiscreteScheduler` bit for bit. What is added: the experts'
boundaries, the expert of each step, a number of steps for each expert, shares of new noise, and Heun's solver.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    sigmas_per_expert,
    uniform_boundaries,
)
from ..modeling.sampling import check_steps_per_expert


SOLVERS = ("euler", "heun")


@dataclass
class LatteFlowSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample at the next, smaller sigma, with the shape of the given sample.
    """

    prev_sample: torch.Tensor


class LatteFlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow-matching steps from sigma 1 (noise) to 0 (data), each owned by one expert.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            `timestep = num_train_timesteps * sigma`.
        shift (`float`, defaults to 1.0):
            sigma <- shift * sigma / (1 + (shift - 1) * sigma). Values above 1 put more steps near the noise, values
            below 1 more steps near the data; 1 changes nothing (Chosen: the paper does not mention a shift). The
            experts' boundaries are not shifted.
        expert_boundaries (`list[float]`, *optional*):
            The model's `expert_boundaries`: K + 1 falling sigmas from 1 to 0. Defaults to four uniform intervals. The
            pipeline refuses a model and a scheduler with different boundaries.
        solver (`str`, defaults to `"euler"`):
            `"euler"` (Paper: the sampler) or `"heun"`, which evaluates the model a second time at the end of each step
            but the last (2n - 1 evaluations for n steps, same as diffusers). The pipeline also takes multistep solvers
            of diffusers.
        new_noise (`float` or `list[float]`, defaults to 0.0):
            Share of the noise (of its variance, 0 to 1) that each Euler step draws anew: one value, or one for each
            expert. Fresh noise keeps one expert's errors from reaching the next. (Chosen: 0, because the paper's
            sampler is deterministic.) Heun's solver draws no noise.
        stochastic_sampling (`bool`, *optional*):
            The argument of `FlowMatchEulerDiscreteScheduler`: `True` is `new_noise=1.0`. In the configuration it is
            `True` with that value only, because diffusers' scheduler takes a share for `True`. Shares, which earlier
            checkpoints have here, become `new_noise`.

    Raises:
        `ValueError`: if the boundaries do not fall from 1 to 0, a number is out of range, the solver is unknown,
            `new_noise` does not have one value for each expert, or `stochastic_sampling` contradicts it.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    _step_index: int | None
    _begin_index: int | None
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        expert_boundaries: list[float] | None = None,
        solver: str = "euler",
        new_noise: float | list[float] | None = None,
        stochastic_sampling: bool | None = None,
    ):
        if solver not in SOLVERS:
            raise ValueError(
                f"solver must be one of {list(SOLVERS)}, got {solver!r}. For others, give the pipeline a scheduler of "
                "diffusers, e.g. UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')."
            )
        if not isinstance(num_train_timesteps, (int, np.integer)) or num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be a positive whole number, got {num_train_timesteps!r}.")
        if not isinstance(shift, (int, float, np.number)) or not 0 < shift < math.inf:
            raise ValueError(f"shift must be a positive number, got {shift!r}.")
        boundaries = uniform_boundaries(4) if expert_boundaries is None else list(expert_boundaries)
        self.register_to_config(expert_boundaries=check_boundaries(boundaries, len(boundaries) - 1))
        self.noise_shares = self._check_new_noise(new_noise, stochastic_sampling)
        self.num_inference_steps: int | None = None
        # Before `set_timesteps`: the timesteps of training, same as diffusers.
        timesteps = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1].copy()
        self._set_sigmas(self._shift(torch.from_numpy(timesteps) / num_train_timesteps))

    def _check_new_noise(self, new_noise: Any, stochastic_sampling: Any) -> list[float]:
        """The share of new noise of each expert; the configuration gets both arguments in one form."""
        if stochastic_sampling is not None and not isinstance(stochastic_sampling, bool):
            new_noise, stochastic_sampling = stochastic_sampling, None  # a configuration of an earlier version
        if new_noise is None:
            new_noise = float(stochastic_sampling or 0.0)
        is_list = isinstance(new_noise, (list, tuple))
        shares = list(new_noise) if is_list else [new_noise] * self.num_experts
        if len(shares) != self.num_experts or not all(_is_number(share) and 0 <= share <= 1 for share in shares):
            raise ValueError(
                f"new_noise must be from 0 to 1, or one such value for each of {self.num_experts} experts, got "
                f"{new_noise!r}."
            )
        if stochastic_sampling is not None and any(share != stochastic_sampling for share in shares):
            raise ValueError(
                f"stochastic_sampling={stochastic_sampling} is new_noise={float(stochastic_sampling)}, but new_noise "
                f"is {new_noise!r}; give new_noise and stochastic_sampling=None."
            )
        shares = [float(share) for share in shares]
        self.register_to_config(
            new_noise=shares if is_list else shares[0],
            stochastic_sampling=True if all(share == 1 for share in shares) else None,
        )
        return shares

    @property
    def num_experts(self) -> int:
        """K, the number of experts."""
        return len(self.config.expert_boundaries) - 1

    @property
    def order(self) -> int:
        """Evaluations of the model in a step."""
        return 2 if self.config.solver == "heun" else 1

    @property
    def step_index(self) -> int | None:
        """The index of the next evaluation in `timesteps`; `None` before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first evaluation, if `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of `timesteps`, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        steps_per_expert: Sequence[int] | None = None,
    ) -> None:
        """Set the steps by their number, by their sigmas or timesteps, or by a number for each expert.

        This sets `timesteps` (n,), `sigmas` (n + 1,) with a last sigma of 0, and `experts` (a list of n). With Heun,
        all sigmas but the first and the last appear twice: where a step ends, and where the next one starts.

        Args:
            num_inference_steps (`int`, *optional*):
                n steps at sigmas 1, 1 - 1/n, ..., 1/n, then shifted. (Chosen: as in diffusers' flow-matching
                pipelines, so that no step is spent between sigma 1/n and 1/1000.)
            device (`str` or `torch.device`, *optional*): the device of `timesteps`. `sigmas` stay on the CPU.
            sigmas (`list[float]`, *optional*): falling sigmas in (0, 1], before the shift.
            timesteps (`list[float]`, *optional*):
                Falling timesteps in (0, `num_train_timesteps`], not shifted (same as diffusers: used as they are).
            steps_per_expert (`list[int]`, *optional*):
                The number of steps of each expert, evenly spaced in its interval and not shifted. 0 skips an expert:
                the step before it then crosses its interval.

        Raises:
            `ValueError`: if not exactly one of the four is given (`num_inference_steps` may go with `sigmas` or
                `timesteps` of that length), or a value is out of range.
        """
        num_given = sum(given is not None for given in (sigmas, timesteps, steps_per_expert))
        by_number = num_inference_steps is not None
        if num_given > 1 or (not num_given and not by_number) or (steps_per_expert is not None and by_number):
            raise ValueError("give one of num_inference_steps, sigmas, timesteps and steps_per_expert.")
        if steps_per_expert is not None:
            new_sigmas = self._sigmas_per_expert(steps_per_expert)
        elif timesteps is not None:
            new_sigmas = self._falling("timesteps", timesteps, self.config.num_train_timesteps, num_inference_steps)
        elif sigmas is not None:
            new_sigmas = self._shift(self._falling("sigmas", sigmas, 1, num_inference_steps))
        else:
            assert num_inference_steps is not None
            check_num_inference_steps(num_inference_steps)
            even_sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
            new_sigmas = self._shift(torch.from_numpy(even_sigmas).float())
        self.num_inference_steps = len(new_sigmas)
        self._set_sigmas(new_sigmas, device)

    @staticmethod
    def _falling(name: str, values: Sequence[float], highest: int, num_values: int | None) -> torch.Tensor:
        """Values that fall strictly inside (0, `highest`], as sigmas (n,)."""
        found = np.array(values).astype(np.float32)
        is_list = found.ndim == 1 and len(found) > 0
        if not is_list or not (found[0] <= highest and found[-1] > 0 and (np.diff(found) < 0).all()):
            raise ValueError(f"{name} must fall strictly inside (0, {highest}], got {np.array(values).tolist()}.")
        if num_values not in (None, len(found)):
            raise ValueError(f"{name} must be {num_values} (num_inference_steps), got {len(found)}.")
        return torch.from_numpy(found) / highest

    def _sigmas_per_expert(self, steps_per_expert: Sequence[int]) -> torch.Tensor:
        num_steps = check_steps_per_expert(steps_per_expert, self.num_experts)
        return sigmas_per_expert(self.config.expert_boundaries, num_steps)

    def _shift(self, sigmas: torch.Tensor) -> torch.Tensor:
        shift = self.config.shift
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _set_sigmas(self, sigmas: torch.Tensor, device: str | torch.device | None = None) -> None:
        if self.config.solver == "heun":
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self._step_index = None
        self._begin_index = None
        # What Heun's solver keeps of the first evaluation of a step.
        self._previous_velocity: torch.Tensor | None = None
        self._previous_sample: torch.Tensor | None = None

    @property
    def experts(self) -> list[int]:
        """The expert of each evaluation; Heun's second one belongs to the expert of the step that it ends."""
        return [self._expert_at(index) for index in range(len(self.timesteps))]

    def _expert_at(self, index: int) -> int:
        ends_step = self.config.solver == "heun" and index % 2 == 1
        return expert_of_sigma(self.sigmas[index].item(), self.config.expert_boundaries, ends_step=ends_step)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample unchanged: flow matching does not scale the model's input."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LatteFlowSchedulerOutput | tuple[torch.Tensor]:
        """Move the sample to the next sigma, in float32. The formula is that of the solver.

        Args:
            model_output (`torch.Tensor`): the velocity (noise - data) at `sample`.
            timestep (`float` or `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor`): x at this timestep.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of new noise, with `new_noise`.
            return_dict (`bool`, defaults to `True`): a [`LatteFlowSchedulerOutput`] or a tuple.

        Raises:
            `ValueError`: if `set_timesteps` was not called, `timestep` is an index or not one of `timesteps`, or there
                is no step left.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step.")
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of `scheduler.timesteps`, not an index, got {timestep}.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done; call set_timesteps first.")
        sample = sample.to(torch.float32)
        if self.config.solver == "heun":
            prev_sample = self._heun_step(model_output, sample, index)
        elif share := self.noise_shares[self._expert_at(index)]:
            prev_sample = self._stochastic_euler_step(model_output, sample, index, share, generator)
        else:
            prev_sample = self._euler_step(model_output, sample, index)
        prev_sample = prev_sample.to(model_output.dtype)
        self._step_index += 1
        return LatteFlowSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _width(self, index: int) -> torch.Tensor:
        """h_i = sigma_(i + 1) - sigma_i, below zero."""
        return self.sigmas[index + 1] - self.sigmas[index]

    def _euler_step(self, velocity: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """x_(i + 1) = x_i + h_i * v_i."""
        return sample + self._width(index) * velocity

    def _stochastic_euler_step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        index: int,
        share: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Euler's step with a share s of the noise replaced by new noise e, its variance kept.

        data = x_i - sigma_i * v_i, noise = data + v_i
        x_(i + 1) = (1 - sigma_(i + 1)) * data + sigma_(i + 1) * (sqrt(1 - s) * noise + sqrt(s) * e)
        """
        data = data_from_velocity(sample, velocity, self.sigmas[index])
        new_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        noise = (1.0 - share) ** 0.5 * (data + velocity) + share**0.5 * new_noise
        return interpolate(data, noise, self.sigmas[index + 1])

    def _heun_step(self, velocity: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """Predict by Euler's step, evaluate there, and correct with the mean of both velocities.

        x' = x_i + h * v_i, then x_(i + 1) = x_i + h * (v_i + v') / 2. The last step has no corrector, which would
        evaluate the model at sigma 0.
        """
        if self._previous_velocity is None or self._previous_sample is None:
            if index + 1 < len(self.timesteps):
                self._previous_velocity, self._previous_sample = velocity, sample
            return self._euler_step(velocity, sample, index)
        mean_velocity = 0.5 * (self._previous_velocity + velocity)
        start = self._previous_sample
        self._previous_velocity = self._previous_sample = None
        return self._euler_step(mean_velocity, start, index - 1)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The index of `timestep`. Of Heun's two evaluations at a timestep, it is the one that starts a step.

        Raises:
            `ValueError`: if `timestep` is not one of `timesteps`.
        """
        indices = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(indices) == 0:
            raise ValueError(f"timestep must be one of `scheduler.timesteps`, got {float(timestep)}.")
        return int(indices[-1])

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_sigma = (1 - sigma) * data + sigma * noise with sigma = timestep / num_train_timesteps, (B,)."""
        sigma = timesteps.to(original_samples.device, torch.float32) / self.config.num_train_timesteps
        return interpolate(original_samples, noise, sigma)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Same as `add_noise`, with the name and the order of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_num_inference_steps(num_inference_steps: int) -> None:
    """
    Raises:
        `ValueError`: if `num_inference_steps` is not a positive whole number.
    """
    is_whole = isinstance(num_inference_steps, (int, np.integer)) and not isinstance(num_inference_steps, bool)
    if not is_whole or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a positive whole number, got {num_inference_steps!r}.")
