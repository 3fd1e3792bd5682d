# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Callbacks for the stock Trainer: what its checkpoints lack, what it does not log, when it must stop."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration


EMA_FOLDER = "ema"
COMPLETE_FILE = "complete"

# What an EMA's state holds beside the averages, and diffusers' type for each.
_EMA_SCALARS = {"optimization_step": int, "decay": float}


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has spread the model's weights over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _own_part(weight: torch.Tensor) -> torch.Tensor:
    """What of a weight lies in this process, and shares its memory: all of it, or its shard under FSDP2."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


class EMACallback(TrainerCallback):
    """Keeps diffusers' exponential moving average of what learns, and leaves it in the model when training ends.

    It is saved in every checkpoint of the Trainer and read back on resume. The averages are held, moved and saved in
    shards, one for each layer: saving and an average on another device never need more than a shard besides. Under
    FSDP2 each process averages and saves its own part of every weight, and a run goes on with as many processes.

    Args:
        decay (`float`): the share of the old average that a step keeps, once warmed up.
        device (`str`, *optional*): where the averages live, e.g. `"cpu"`; beside the weights if not given.
    """

    def __init__(self, decay: float, device: str | None = None):
        self.decay, self.device = decay, device
        self.shards: dict[str, dict[str, torch.nn.Parameter]] = {}  # made when training begins
        self.averages: dict[str, EMAModel] = {}
        self.sharded = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shards, self.sharded = {}, is_sharded(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                layer = re.match(r".*?\b(layers|blocks)\.\d+", name)
                self.shards.setdefault(layer[0] if layer else "shared", {})[name] = parameter
        self.averages = {
            shard: EMAModel(self._on_device(shard), decay=self.decay, use_ema_warmup=True, power=3 / 4)
            for shard in self.shards
        }
        if state.global_step:
            folder = self._folder(args, state)
            if not folder.exists():
                raise ValueError(
                    f"there is no {folder}: go on with as many processes, sharded or not, as the run began with."
                )
            for shard in self.shards:
                self._load(shard, folder / f"{shard}.safetensors")

    def _folder(self, args, state) -> Path:
        """Where a checkpoint keeps the averages: under FSDP2, those of this process."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FOLDER
        return folder / f"{args.process_index + 1:05d}-of-{args.world_size:05d}" if self.sharded else folder

    def _on_device(self, shard: str) -> list[torch.Tensor]:
        """The shard's weights where its averages are; the weights themselves if that is the same device."""
        weights = [_own_part(parameter) for parameter in self.shards[shard].values()]
        # `EMAModel` averages only what asks for gradients.
        return [(weight if self.device is None else weight.to(self.device)).requires_grad_() for weight in weights]

    def _load(self, shard: str, path: Path) -> None:
        with safe_open(path, framework="pt") as saved:
            if set(saved.keys()) != set(self.shards[shard]):
                raise ValueError(f"{path} holds averages of other weights than those that learn now.")
            scalars = {name: kind(saved.metadata()[name]) for name, kind in _EMA_SCALARS.items()}
            averages = [
                saved.get_tensor(name).to(average.device)
                for name, average in zip(self.shards[shard], self.averages[shard].shadow_params)
            ]
        self.averages[shard].load_state_dict({**scalars, "shadow_params": averages})

    def on_step_end(self, args, state, control, **kwargs):
        for shard, average in self.averages.items():
            average.step(self._on_device(shard))

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero and not self.sharded:
            return
        folder = self._folder(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        for shard, average in self.averages.items():
            tensors = {name: tensor.contiguous() for name, tensor in zip(self.shards[shard], average.shadow_params)}
            scalars = {name: str(average.state_dict()[name]) for name in _EMA_SCALARS}
            save_file(tensors, folder / f"{shard}.safetensors", metadata=scalars)

    def on_train_end(self, args, state, control, **kwargs):
        for shard, average in self.averages.items():
            average.copy_to([_own_part(parameter) for parameter in self.shards[shard].values()])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards its own weights again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, average in self.averages.items():
            for parameter, kept in zip(self.shards[shard].values(), average.shadow_params):
                part = _own_part(parameter)
                weight = part.clone()
                part.copy_(kept)
                kept.copy_(weight)


class IntervalWarmupCallback(TrainerCallback):
    """Begins with experts that learn every sigma below their interval's upper end, and narrows them to the interval.

    The lower end of an interval rises linearly from 0 to its place over the first `num_steps` steps. Chosen: because
    an expert that sees nothing but strong noise learns colours and averages for a long time, and no outlines; the
    sigmas below show it what there is to find. A resumed run goes on where it was.

    Args:
        num_steps (`int`): after so many steps each expert learns its own interval alone.
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
    """Logs each expert's loss, and stops the run at the first loss that is no number.

    It reads the model's output by a hook, so that the Trainer stays as it is: `trainer.add_callback(LossCallback(
    trainer))`. The names of a batch, which [`TextToImageCollator`] sends along, end here.

    Args:
        trainer (`Trainer`): the trainer that it is added to.

    Raises:
        `FloatingPointError`: in the step, before any weight changes, with the step, the expert and the examples.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._names: list[str] | None = None
        self._losses: list[torch.Tensor] = []  # of the running step's batches: the experts', and the backbone's
        self._steps: list[torch.Tensor] = []  # of the steps since the last log
        self._num_experts = 0
        self._hooks: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        self._hooks = [
            model.register_forward_pre_hook(self._take_names, with_kwargs=True),
            model.register_forward_hook(self._watch),
        ]

    def _take_names(self, model, inputs, kwargs):
        self._names = kwargs.pop("names", None)
        return inputs, kwargs

    def _watch(self, model, inputs, output):
        losses = getattr(output, "expert_losses", None)
        if losses is None or not model.training:
            return
        self._num_experts = len(losses)
        spoken = [] if output.lm_loss is None else [output.lm_loss.detach()]
        self._losses.append(torch.stack([*losses, *spoken]))
        if not torch.isfinite(output.loss.detach()):
            step = self.trainer.state.global_step + 1
            found = {f"expert {expert}": loss for expert, loss in enumerate(losses.tolist())}
            if spoken:
                found["understanding"] = spoken[0].item()
            wrong = {name: loss for name, loss in found.items() if not abs(loss) < float("inf")} or found
            self._remove_hooks()
            batch = "" if self._names is None else f"; the batch is {_shortened(self._names)}"
            raise FloatingPointError(
                f"step {step}: the loss of {', '.join(f'{name} is {loss}' for name, loss in wrong.items())}{batch}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._losses:
            self._steps.append(torch.stack(self._losses).mean(dim=0))
            self._losses = []
        if not control.should_log or not self._steps:
            return
        means = self.trainer.accelerator.reduce(torch.stack(self._steps).mean(dim=0), reduction="mean").tolist()
        self._steps = []
        # It is zero for an expert that does not learn.
        logs = {f"expert_{expert}_loss": loss for expert, loss in enumerate(means[: self._num_experts]) if loss}
        if len(means) > self._num_experts:
            logs["lm_loss"] = means[-1]
        self.trainer.log(logs)
        # Logging crosses out the wish to log, and the Trainer has its own to say.
        control.should_log = True

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _shortened(names: Sequence[str], most: int = 16) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class CheckpointCallback(TrainerCallback):
    """Makes a run safe to kill at any moment; add it last.

    The Trainer writes a checkpoint file by file. This callback marks it once everything is in it, refuses to mark
    weights that are no numbers, and only then removes older ones: leave the Trainer's `save_total_limit` unset.
    [`last_checkpoint`] finds the newest marked one. On resume it sees to two things that the Trainer leaves undone:
    the dataset's own epoch, and the random state where the data is not passed over by the Trainer.

    Args:
        trainer (`Trainer`): the trainer that it is added to.
        keep (`int`, defaults to 2): how many checkpoints stay.
    """

    def __init__(self, trainer: Trainer, keep: int = 2):
        self.trainer, self.keep = trainer, keep
        self.saving = False  # between a step's end and the end of its saving
        self._resumed_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._resumed_at = state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's loaders tell a dataset its epoch, but not over several processes, nor in a resumed epoch.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        # The Trainer restores it before the loader starts, which draws from it.
        if args.ignore_data_skip and state.global_step == self._resumed_at > 0:
            self.trainer._load_rng_state(str(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    def on_step_end(self, args, state, control, **kwargs):
        self.saving = control.should_save

    def on_save(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(_own_part(parameter)).all():
                self.saving = False
                raise FloatingPointError(f"step {state.global_step}: {name} is not finite any more.")
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()
            for folder in _checkpoints(Path(args.output_dir))[: -self.keep]:
                (folder / COMPLETE_FILE).unlink(missing_ok=True)
                shutil.rmtree(folder)
        self.saving = False


def _checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in `run_dir`, oldest first, finished or not."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint in `run_dir` that [`CheckpointCallback`] finished, or `None`."""
    finished = [path for path in _checkpoints(run_dir) if (path / COMPLETE_FILE).exists()]
    return finished[-1] if finished else None


class SampleCallback(TrainerCallback):
    """Paints fixed prompts from fixed noise every so many steps, into one picture a time that appears whole.

    Args:
        pipe ([`LatteFlowPipeline`]): a pipeline around the model that learns.
        prompts (`list[str]`): one picture each.
        every_steps (`int`): how often.
        folder (`Path`): where `step-N.png` goes.
        seed (`int`, defaults to 0): of the noise.
        ema ([`EMACallback`], *optional*): then its averages paint, as they will in the end.
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
        # Under FSDP2 every process paints, since each holds a part of the weights; the first one keeps the pictures.
        is_first = state.is_world_process_zero
        if state.global_step % self.every_steps or not (is_first or is_sharded(self.pipe.model)):
            return
        if self.ema is None:
            self._paint(state.global_step, is_first)
        else:
            with self.ema.averaged():
                self._paint(state.global_step, is_first)

    def _paint(self, step: int, keep: bool) -> None:
        from ..files import save_image

        was_training = self.pipe.model.training
        self.pipe.model.eval()
        generators = [torch.Generator().manual_seed(self.seed + number) for number in range(len(self.prompts))]
        images = self.pipe(self.prompts, generator=generators, **self.call).images
        self.pipe.model.train(was_training)
        if not keep:
            return
        columns = min(len(images), 4)
        blank = images[0].copy()
        blank.paste((0, 0, 0), (0, 0, *blank.size))
        images += [blank] * (-len(images) % columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(make_image_grid(images, len(images) // columns, columns), self.folder / f"step-{step}.png")
