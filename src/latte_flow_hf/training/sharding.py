# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tower's weights spread over processes by FSDP2: what the stock Trainer and accelerate leave to do.

A frozen backbone stays whole in every process: prompts are encoded outside of a training step, by each its own.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ..conversion.plan import MAX_SHARD_SIZE, split_weights
from ..conversion.streaming import stored_names


def check_sharding() -> None:
    """
    Raises:
        `ValueError`: if accelerate is to shard in a way that would train from wrong weights.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate's fsdp_version must be 2; recipes/accelerate/fsdp2.yaml would do.")
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "accelerate's fsdp_cpu_ram_efficient_loading must be false: with it the first process alone loads the "
            "backbone, which every process needs; recipes/accelerate/fsdp2.yaml would do."
        )
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate asks for FSDP2 where it finds accelerators, and else trains unsharded without a word; torch has it
        # for CPUs, too.
        state.distributed_type = DistributedType.MULTI_GPU


class WholeBackboneCallback(TrainerCallback):
    """Keeps a frozen backbone out of FSDP2; without FSDP2 it does nothing.

    Args:
        trainer (`Trainer`): the trainer that it is added to, before it trains.
        backbone (`torch.nn.Module`): what stays whole.
    """

    def __init__(self, trainer: Trainer, backbone: torch.nn.Module):
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            plugin.ignored_modules = [backbone]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # The first module to run counts as the root of all, and accelerate makes modules of its own in the backbone,
        # which runs first: it encodes prompts for the first batch.
        if isinstance(model, FSDPModule):
            model._get_fsdp_state()._lazy_init()


def save_sharded(pipe: Any, folder: Path) -> None:
    """`pipe.save_pretrained(folder)` of a pipeline whose model is sharded: one weights file at a time is whole.

    All processes must call it; the first one writes.
    """
    is_first = PartialState().is_main_process
    model = pipe.model
    (folder / "model").mkdir(parents=True, exist_ok=True)
    if is_first:
        for name, component in pipe.components.items():
            if name != "model":
                component.save_pretrained(folder / name)
        pipe.save_config(folder)
        # The class of a sharded module has another name.
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.dtype = model.dtype
        model.config.save_pretrained(folder / "model")
        model.generation_config.save_pretrained(folder / "model")
    weights = model.state_dict()
    split = split_weights("model", {name: weights[name] for name in stored_names(model)}, MAX_SHARD_SIZE)
    for name, keys in split.filename_to_tensors.items():
        shard = {}
        for key in keys:
            tensor = whole(weights[key])
            if is_first:
                shard[key] = tensor.contiguous()
        if is_first:
            save_file(shard, folder / "model" / name, {"format": "pt"})
    if is_first and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight on the CPU, put together by all processes if it is sharded."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu()
