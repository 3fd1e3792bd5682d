# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A backbone, an autoencoder and K -> a pipeline whose tower starts from the backbone's own layers."""

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ..cards import pipeline_card
from ..files import check_files
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from .folders import (
    AUTOENCODER,
    MODEL,
    check_velocity,
    files_saved_by,
    local_folder,
    model_on_meta,
    read_autoencoder,
    source_name,
)
from .plan import Plan
from .streaming import StoredTensor, module_tensors, read_weights, stored_names


def initialize(
    backbone: str | Path, autoencoder: str | Path, num_experts: int = 4, seed: int = 0, **config: Any
) -> Plan:
    """Plan a new pipeline: the result of `from_vlm` and `save_pretrained`, but without loading the model.

    Args:
        backbone (`str` or `Path`): folder or hub id of a vision-language model of transformers, such as Qwen2-VL.
        autoencoder (`str` or `Path`): folder or hub id of an autoencoder of diffusers, such as DC-AE f32c32.
        num_experts (`int`, defaults to 4): K.
        seed (`int`, defaults to 0):
            Seed of the weights that are neither copied nor constant: the embeddings of latents and timesteps.
        config: other arguments of [`LatteFlowConfig`], except `latent_channels`, which is the autoencoder's.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if the backbone, the autoencoder and K do not fit together, or weights do not fit their
            configuration.
    """
    backbone_folder, autoencoder_folder = local_folder(backbone), local_folder(autoencoder)
    vae, vae_tensors = read_autoencoder(autoencoder_folder)
    check_files(backbone_folder, "config.json")
    vlm_config = AutoConfig.from_pretrained(backbone_folder)
    stored = read_weights(backbone_folder, "model")
    dtype = vlm_config.dtype or next(tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point)
    vlm_config._name_or_path = ""
    vlm_config.dtype = dtype
    model = model_on_meta(
        LatteFlowConfig(
            vlm_config=vlm_config, num_experts=num_experts, latent_channels=vae.config.latent_channels, **config
        )
    )
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    vlm_config.architectures = vlm_config.architectures or [type(model.vlm).__name__]
    tensors = module_tensors(stored, model.vlm, backbone_folder)

    processor = LatteFlowProcessor.from_pretrained(backbone_folder)
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    pipeline = LatteFlowPipeline(model, processor, vae, scheduler)
    generation_config = model.vlm.generation_config
    if (backbone_folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(backbone_folder)
    origin = (
        f"The backbone of `{source_name(backbone)}`, the autoencoder of `{source_name(autoencoder)}`, and a tower "
        "that starts from the backbone's layers: it answers, but must be trained before it generates images."
    )
    small_files = {
        "README.md": pipeline_card(model.config, origin),
        **files_saved_by(model.config.save_pretrained, "model"),
        **files_saved_by(generation_config.save_pretrained, "model"),
        **files_saved_by(processor.save_pretrained, "processor"),
        **files_saved_by(scheduler.save_pretrained, "scheduler"),
        "vae/config.json": (autoencoder_folder / "config.json").read_bytes(),
        **files_saved_by(pipeline.save_config),
    }
    weights = {MODEL: _model_tensors(model, tensors, dtype, seed), AUTOENCODER: vae_tensors}
    return Plan(small_files, weights, lambda written: check_velocity(model.config, written[MODEL]))


def _model_tensors(
    model: LatteFlowForConditionalGeneration, backbone: dict[str, StoredTensor], dtype: torch.dtype, seed: int
) -> dict[str, StoredTensor]:
    """The backbone's tensors, the tower's copies of them, and what is new, in the model's order."""
    decoder = model.get_decoder()
    layers = next(name for name, module in model.vlm.named_modules() if module is decoder) + ".layers"
    copies = {
        f"tower.layers.{index}.{ours}.{leaf}": backbone[f"{layers}.{layer.source_index}.{theirs}.{leaf}"]
        for index, layer in enumerate(model.tower.layers)
        for ours, theirs in layer.copied_modules.items()
        for leaf in decoder.layers[layer.source_index].get_submodule(theirs).state_dict()
    }
    known = {f"vlm.{name}": tensor for name, tensor in backbone.items()} | copies
    names = stored_names(model)
    new = new_tensors(model, (name for name in names if name not in known), dtype, seed)
    return {name: known.get(name) or new[name] for name in names}


def new_tensors(
    model: LatteFlowForConditionalGeneration, names: Iterable[str], dtype: torch.dtype, seed: int = 0
) -> dict[str, StoredTensor]:
    """Parameters of `model` as it initialises them, each module's when they are read.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): on the meta device.
        names (iterable of `str`): the parameters' names.
        dtype (`torch.dtype`): their type; they are drawn in float32.
        seed (`int`, defaults to 0): seed of the first module; each further one has the next seed.
    """
    new = [name.rpartition(".")[::2] for name in names]
    seeds = {module: seed + number for number, module in enumerate(dict(new))}

    @functools.lru_cache(maxsize=1)
    def initialized(name: str) -> torch.nn.Module:
        on_meta = model.get_submodule(name)
        module = copy.deepcopy(on_meta).to_empty(device="cpu").float()
        # The whole model is initialised, since some weights depend on the module's place in it, but this module alone
        # is not on the meta device. transformers skips modules that it has initialised before.
        module._is_hf_initialized = False
        model.set_submodule(name, module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds[name])
            model.initialize_weights()
        model.set_submodule(name, on_meta)
        return module.to(dtype).requires_grad_(False)

    def stored(module: str, leaf: str) -> StoredTensor:
        shape = tuple(model.get_submodule(module).get_parameter(leaf).shape)
        return StoredTensor(dtype, shape, lambda: initialized(module).get_parameter(leaf))

    return {f"{module}.{leaf}": stored(module, leaf) for module, leaf in new}
