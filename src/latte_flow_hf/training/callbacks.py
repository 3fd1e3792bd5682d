# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Callbacks for the stock Trainer: moving average, losses by expert, time, complete checkpoints, sample images."""

import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from ..files import hash_file, read_json, save_image, write_json
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from .sharding import is_sharded, local_tensor


EMA_FOLDER = "ema"
COMPLETE_FILE = "complete"

# The scalars in the state of diffusers' `EMAModel` that a checkpoint needs, with their types.
_EMA_SCALARS = {"optimization_step": int, "decay": float}


class EMACallback(TrainerCallback):
    """Keeps an exponential moving average (diffusers' `EMAModel`) of the trainable weights.

    It is saved with each checkpoint of the Trainer and loaded on resume. When training ends, the model has the
    averaged weights. The averages are updated, moved and saved layer by layer, so that the extra memory is that of one
    layer. Under FSDP2 each process averages and saves its local part of every weight; such a run must be resumed with
    the same number of processes.

    Args:
        decay (`float`): the share of the old average that a step keeps, after the warmup.
        device (`str`, *optional*): device of the averages, e.g. `"cpu"`; defaults to that of the weights.
    """

    def __init__(self, decay: float, device: str | None = None):
        self.decay, self.device = decay, device
        # By layer, filled when training begins.
        self.parameters: dict[str, dict[str, torch.nn.Parameter]] = {}
        self.averages: dict[str, EMAModel] = {}
        self.is_sharded = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters, self.is_sharded = {}, is_sharded(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                match = re.match(r".*?\b(layers|blocks)\.\d+", name)
                self.parameters.setdefault(match[0] if match else "shared", {})[name] = parameter
        self.averages = {
            layer: EMAModel(self._weights_on_device(layer), decay=self.decay, use_ema_warmup=True, power=3 / 4)
            for layer in self.parameters
        }
        if state.global_step:
            folder = self._folder(args, state)
            if not folder.exists():
                raise ValueError(
                    f"{folder} does not exist: resume with the number of processes and the sharding that the run was "
                    "started with."
                )
            for layer in self.parameters:
                self._load(layer, folder / f"{layer}.safetensors")

    def _folder(self, args, state, step: int | None = None) -> Path:
        """The folder of the averages in the checkpoint of a step; under FSDP2, of those of this process."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step if step is None else step}" / EMA_FOLDER
        return folder / f"{args.process_index + 1:05d}-of-{args.world_size:05d}" if self.is_sharded else folder

    def _weights_on_device(self, layer: str) -> list[torch.Tensor]:
        """The weights of a layer, on the device of the averages."""
        weights = [local_tensor(parameter) for parameter in self.parameters[layer].values()]
        # `EMAModel` only averages tensors that require gradients.
        return [(weight if self.device is None else weight.to(self.device)).requires_grad_() for weight in weights]

    def _load(self, layer: str, path: Path) -> None:
        try:
            saved = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise OSError(f"{path} is truncated or damaged ({error}); resume from another checkpoint.") from error
        with saved:
            if set(saved.keys()) != set(self.parameters[layer]):
                raise ValueError(f"{path} contains averages of other weights than the trainable ones.")
            scalars = {name: kind(saved.metadata()[name]) for name, kind in _EMA_SCALARS.items()}
            averages = [
                saved.get_tensor(name).to(average.device)
                for name, average in zip(self.parameters[layer], self.averages[layer].shadow_params)
            ]
        self.averages[layer].load_state_dict({**scalars, "shadow_params": averages})

    def on_step_end(self, args, state, control, **kwargs):
        for layer, average in self.averages.items():
            average.step(self._weights_on_device(layer))

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero and not self.is_sharded:
            return
        folder = self._folder(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        for layer, average in self.averages.items():
            tensors = {
                name: tensor.contiguous() for name, tensor in zip(self.parameters[layer], average.shadow_params)
            }
            scalars = {name: str(average.state_dict()[name]) for name in _EMA_SCALARS}
            save_file(tensors, folder / f"{layer}.safetensors", metadata=scalars)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            for layer in self.averages:
                self._load(layer, self._folder(args, state, state.best_global_step) / f"{layer}.safetensors")
        for layer, average in self.averages.items():
            average.copy_to([local_tensor(parameter) for parameter in self.parameters[layer].values()])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager in which the model has the averaged weights; its own weights are restored on exit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for layer, average in self.averages.items():
            for parameter, averaged in zip(self.parameters[layer].values(), average.shadow_params):
                weight = local_tensor(parameter)
                original = weight.clone()
                weight.copy_(averaged)
                averaged.copy_(original)


class IntervalWarmupCallback(TrainerCallback):
    """Trains each expert on all sigmas below the upper end of its interval at first, and narrows them to the interval.

    The lower end rises linearly from 0 to that of the interval over the first `num_steps` steps. (Chosen: because an
    expert trained on strong noise alone learns colours and averages for a long time, but no outlines. The lower sigmas
    contain the outlines.) The state depends on the global step alone, so that a run can be resumed.

    Args:
        num_steps (`int`): the number of steps after which each expert is trained on its own interval alone.

    Raises:
        `ValueError`: if `num_steps` is below 1.
    """

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._set_overlap(model, max(0.0, 1.0 - state.global_step / self.num_steps))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._set_overlap(model, 0.0)

    @staticmethod
    def _set_overlap(model: torch.nn.Module, overlap: float) -> None:
        for module in model.modules():
            if isinstance(module, LatteFlowForConditionalGeneration):
                module.interval_overlap = overlap


class LossCallback(TrainerCallback):
    """Logs the loss of each expert, and stops the run if a loss is not finite.

    It reads the output of the model with a forward hook, so that the stock Trainer can be used. The names of the
    examples in a batch of [`TextToImageCollator`] are removed before `forward` and appear in the error.

    Args:
        trainer (`Trainer`): the trainer that it is added to.

    Raises:
        `FloatingPointError`: during training, before the optimizer step, with the step, the expert and the examples.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._names: list[str] | None = None
        # One tensor per batch of the current step: the losses of the experts and, if there is one, of the backbone.
        self._batch_losses: list[torch.Tensor] = []
        # The means over the batches, per step since the last log.
        self._step_losses: list[torch.Tensor] = []
        self._num_experts = 0
        self._hooks: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        self._hooks = [
            model.register_forward_pre_hook(self._remove_names, with_kwargs=True),
            model.register_forward_hook(self._record_losses),
        ]

    def _remove_names(self, model, inputs, kwargs):
        self._names = kwargs.pop("names", None)
        return inputs, kwargs

    def _record_losses(self, model, inputs, output):
        losses = getattr(output, "expert_losses", None)
        if losses is None or not model.training:
            return
        self._num_experts = len(losses)
        lm_loss = [] if output.lm_loss is None else [output.lm_loss.detach()]
        self._batch_losses.append(torch.stack([*losses, *lm_loss]))
        if not torch.isfinite(output.loss.detach()):
            step = self.trainer.state.global_step + 1
            named_losses = {f"expert {expert}": loss for expert, loss in enumerate(losses.tolist())}
            if lm_loss:
                named_losses["understanding"] = lm_loss[0].item()
            # The sum may overflow although all of its terms are finite.
            wrong = {name: loss for name, loss in named_losses.items() if not math.isfinite(loss)} or named_losses
            self._remove_hooks()
            batch = "" if self._names is None else f"; the batch is {_shorten(self._names)}"
            raise FloatingPointError(
                f"step {step}: the loss of {', '.join(f'{name} is {loss}' for name, loss in wrong.items())}{batch}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._batch_losses:
            self._step_losses.append(torch.stack(self._batch_losses).mean(dim=0))
            self._batch_losses = []
        if not control.should_log or not self._step_losses:
            return
        means = torch.stack(self._step_losses).mean(dim=0)
        means = self.trainer.accelerator.reduce(means, reduction="mean").tolist()
        self._step_losses = []
        # The loss of an expert that is not trained is zero.
        logs = {f"expert_{expert}_loss": loss for expert, loss in enumerate(means[: self._num_experts]) if loss}
        if len(means) > self._num_experts:
            logs["lm_loss"] = means[-1]
        self.trainer.log(logs)
        # `Trainer.log` resets it, but the Trainer still has to log its own values.
        control.should_log = True

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _shorten(names: Sequence[str], max_names: int = 16) -> str:
    rest = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + rest


class TimeCallback(TrainerCallback):
    """Adds the time since training began to each entry of the log, over all starts of a run that was resumed.

    `seconds` is the time on the clock, `processor_seconds` the time of all threads of this process. What was trained
    after the last checkpoint before a stop, and is trained again, is counted once.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        last: dict = next((entry for entry in reversed(state.log_history) if "seconds" in entry), {})
        self.clock = time.perf_counter() - last.get("seconds", 0.0)
        self.processor_clock = time.process_time() - last.get("processor_seconds", 0.0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.clock, 2)
        state.log_history[-1]["processor_seconds"] = round(time.process_time() - self.processor_clock, 2)


class CheckpointCallback(TrainerCallback):
    """Marks complete checkpoints, so that a run can be killed at any moment and resumed. It must be added last.

    The Trainer writes a checkpoint file by file. This callback marks it as complete, with the hashes of its files for
    [`check_checkpoint`], when all files are written and all weights are finite. Only then it removes older ones, but
    never the best one; leave the Trainer's `save_total_limit` unset. [`last_checkpoint`] finds the last complete one.
    On resume the callback also restores what the Trainer does not: the epoch of the dataset, and with
    `ignore_data_skip` the random state.

    Args:
        trainer (`Trainer`): the trainer that it is added to.
        num_checkpoints (`int`, defaults to 2): how many checkpoints are kept.
    """

    def __init__(self, trainer: Trainer, num_checkpoints: int = 2):
        self.trainer, self.num_checkpoints = trainer, num_checkpoints
        self.is_saving = False  # from the end of a step until its checkpoint is complete
        self._resumed_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._resumed_at = state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's data loaders do so only with a single process, and not in a resumed epoch.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        # The Trainer restores it before the data loader starts, which draws from it.
        if args.ignore_data_skip and state.global_step == self._resumed_at > 0:
            self.trainer._load_rng_state(str(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    def on_step_end(self, args, state, control, **kwargs):
        self.is_saving = control.should_save

    def on_save(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(local_tensor(parameter)).all():
                self.is_saving = False
                raise FloatingPointError(f"step {state.global_step}: {name} is not finite.")
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(_hash_files(checkpoint), checkpoint / COMPLETE_FILE)
            kept = {checkpoint.name, f"checkpoint-{state.best_global_step}"}
            for folder in _checkpoints(Path(args.output_dir))[: -self.num_checkpoints]:
                if folder.name not in kept:
                    (folder / COMPLETE_FILE).unlink(missing_ok=True)
                    shutil.rmtree(folder)
        self.is_saving = False


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in `run_dir`, oldest first, complete or not."""
    checkpoints = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint in `run_dir` that [`CheckpointCallback`] marked as complete, or `None`."""
    complete = [path for path in _checkpoints(run_dir) if (path / COMPLETE_FILE).exists()]
    return complete[-1] if complete else None


def check_checkpoint(checkpoint: Path) -> None:
    """Check the files of a complete checkpoint. The Trainer would go on without its optimizer or random state.

    Args:
        checkpoint (`Path`): see [`last_checkpoint`].

    Raises:
        `OSError`: naming the files that are missing or damaged.
    """
    expected, actual = read_json(checkpoint / COMPLETE_FILE), _hash_files(checkpoint)
    problems = {
        "has no": [name for name in expected if name not in actual],
        "has a damaged": [name for name in expected if actual.get(name) not in (None, expected[name])],
    }
    found = " and ".join(f"{words} {', '.join(names)}" for words, names in problems.items() if names)
    if found:
        raise OSError(f"checkpoint {checkpoint} {found}; remove this folder to resume from the checkpoint before it.")


def _hash_files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint, by their path in it."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE_FILE]
    return {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in paths}


def remove_incomplete_checkpoints(run_dir: Path) -> None:
    """Remove what a killed run or a full disk left of a checkpoint."""
    for checkpoint in _checkpoints(run_dir):
        if not (checkpoint / COMPLETE_FILE).exists():
            shutil.rmtree(checkpoint)


class SampleCallback(TrainerCallback):
    """Generates images for fixed prompts from fixed noise during training, and saves them as a grid.

    Args:
        pipe ([`LatteFlowPipeline`]): a pipeline with the model that is trained.
        prompts (`list[str]`): one image is generated for each.
        every_steps (`int`): the number of steps between two grids.
        folder (`Path`): the folder for the grids, `step-N.png`.
        seed (`int`, defaults to 0): of the noise.
        ema ([`EMACallback`], *optional*): if given, its averaged weights are used.
        call: further arguments of the pipeline, e.g. `num_inference_steps=20`.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        every_steps: int,
        folder: Path,
        seed: int = 0,
        ema: EMACallback | None = None,
        **call: Any,
    ):
        self.pipe, self.prompts, self.every_steps, self.folder = pipe, prompts, every_steps, folder
        self.seed, self.ema, self.call = seed, ema, call

    def on_step_end(self, args, state, control, **kwargs):
        # Under FSDP2 all processes must generate, because each has a part of the weights; the first one saves.
        is_first = state.is_world_process_zero
        if state.global_step % self.every_steps or not (is_first or is_sharded(self.pipe.model)):
            return
        if self.ema is None:
            self._generate(state.global_step, is_first)
        else:
            with self.ema.averaged():
                self._generate(state.global_step, is_first)

    def _generate(self, step: int, save: bool) -> None:
        was_training = self.pipe.model.training
        self.pipe.model.eval()
        generators = [torch.Generator().manual_seed(self.seed + number) for number in range(len(self.prompts))]
        images = self.pipe(self.prompts, generator=generators, **self.call).images
        self.pipe.model.train(was_training)
        if not save:
            return
        columns = min(len(images), 4)
        blank = Image.new("RGB", images[0].size)
        images += [blank] * (-len(images) % columns)
        save_image(make_image_grid(images, len(images) // columns, columns), self.folder / f"step-{step}.png")
