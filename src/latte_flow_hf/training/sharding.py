# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""FSDP2: the weights of the tower sharded over processes. This is what the stock Trainer and accelerate do not do.

A frozen backbone is not sharded: each process encodes its own prompts with it, outside the training step.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ..files import write_json
from ..pipelines.loading import write_root_config


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has sharded the weights of the model over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight in this process, sharing its memory: all of it, or its shard under FSDP2."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """A weight on the CPU, gathered from all processes if it is sharded. All processes must call it."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu()


def check_sharding() -> None:
    """Check accelerate's settings for FSDP.

    Raises:
        `ValueError`: if accelerate would shard in a way that trains from wrong weights.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate's fsdp_version must be 2; see recipes/accelerate/fsdp2.yaml.")
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "accelerate's fsdp_cpu_ram_efficient_loading must be false: otherwise only the first process loads the "
            "backbone, which every process needs; see recipes/accelerate/fsdp2.yaml."
        )
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        # Without accelerators accelerate ignores FSDP2 and trains unsharded, without a warning. torch supports it on
        # CPUs.
        state.distributed_type = DistributedType.MULTI_GPU


class UnshardedBackboneCallback(TrainerCallback):
    """Excludes a frozen backbone from FSDP2; without FSDP2 it does nothing.

    Args:
        trainer (`Trainer`): the trainer that it is added to, before training.
        backbone (`torch.nn.Module`): the module that is not sharded.
    """

    def __init__(self, trainer: Trainer, backbone: torch.nn.Module):
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            plugin.ignored_modules = [backbone]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # FSDP takes the first module that runs for the root. accelerate also wraps modules of the backbone, which runs
        # first, when it encodes the prompts of the first batch.
        if isinstance(model, FSDPModule):
            model._get_fsdp_state()._lazy_init()


def save_sharded_pipeline(pipe: Any, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Same as `pipe.save_pretrained(folder)`, but for a pipeline whose model is sharded. All processes must call it.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        folder (`Path`): where the first process writes to.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): the largest weights file; the first process holds one in
            main memory at a time.
    """
    # Not torch's `get_model_state_dict(full_state_dict=True)`, which gathers the whole model in one process, and not
    # its `HuggingFaceStorageWriter`, which writes all weights twice: first the shards, then the consolidated files.
    model, is_first = pipe.model, PartialState().is_main_process
    weights = model.state_dict()
    for tied in model.all_tied_weights_keys:
        weights.pop(tied, None)
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.numel() * weight.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
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
        write_root_config(folder)
    for filename, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = full_tensor(weights[name])
            if is_first:
                shard[name] = tensor.contiguous()
        if is_first:
            save_file(shard, folder / "model" / filename, metadata={"format": "pt"})
    if is_first and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, folder / "model" / "model.safetensors.index.json")
