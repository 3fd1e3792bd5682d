# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Folders that conversions read: pipelines, backbones, autoencoders. Only headers and small files are read here."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from ..files import check_files, read_json
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.context import LatteFlowContext
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..pipelines.pipeline_latte_flow import encode_pixels, spatial_compression
from .plan import Weights
from .streaming import StoredTensor, check_tensors, module_tensors, read_weights


# Where a pipeline's weights are, as `Plan.weights` has it.
MODEL, AUTOENCODER = "model/model", "vae/diffusion_pytorch_model"

_OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf")
_WEIGHTS = (".safetensors", ".safetensors.index.json", *_OTHER_WEIGHTS)


@dataclass
class PipelineFolder:
    """A pipeline on disk.

    Args:
        folder (`Path`): its folder.
        name (`str`): the folder's name, or the hub id.
        config ([`LatteFlowConfig`]): the model's configuration.
        model ([`LatteFlowForConditionalGeneration`]): the model on the meta device.
        small_files (`dict[str, bytes]`): contents of everything but weights, by path.
        weights (`Weights`): tensors of the model, under the module's own names, and of the autoencoder.
    """

    folder: Path
    name: str
    config: LatteFlowConfig
    model: LatteFlowForConditionalGeneration
    small_files: dict[str, bytes]
    weights: Weights


def local_folder(source: str | Path) -> Path:
    """Return `source` if it is a folder, else download that hub id (of its weights only safetensors).

    Raises:
        `OSError`: if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in _OTHER_WEIGHTS]))
    except (OSError, ValueError) as error:
        raise OSError(f"{source} is not a folder, and cannot be downloaded from the hub: {error}") from error


def source_name(source: str | Path) -> str:
    """The name of a source in a model card: without the local path."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def read_pipeline(source: str | Path) -> PipelineFolder:
    """Read a pipeline from a folder or the hub.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if it holds another model, or its weights do not fit its configuration.
    """
    folder = local_folder(source)
    check_files(folder, "model_index.json")
    for component in ("model", "vae", "scheduler", "processor"):
        check_files(folder / component, "*config.json")
    config = AutoConfig.from_pretrained(folder / "model")
    if not isinstance(config, LatteFlowConfig):
        raise ValueError(f"{source} holds a {config.model_type!r} model, not a 'latte_flow' one.")
    model = model_on_meta(config)
    _, autoencoder = read_autoencoder(folder / "vae")
    weights = {
        MODEL: module_tensors(read_weights(folder / "model", "model"), model, folder / "model"),
        AUTOENCODER: autoencoder,
    }
    return PipelineFolder(folder, source_name(source), config, model, read_small_files(folder), weights)


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Read every file that is neither weights nor hidden, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.endswith(_WEIGHTS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def files_saved_by(save_pretrained: Callable[[Path], Any], subfolder: str = "") -> dict[str, bytes]:
    """The files that a `save_pretrained` writes, by their path under `subfolder`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder, subfolder))
        return read_small_files(Path(folder))


def edit_json(content: bytes, **values: Any) -> bytes:
    """A JSON file with some values changed."""
    return json.dumps({**json.loads(content), **values}, indent=2).encode() + b"\n"


def model_on_meta(config: LatteFlowConfig) -> LatteFlowForConditionalGeneration:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return LatteFlowForConditionalGeneration(config)


def read_autoencoder(folder: Path) -> tuple[torch.nn.Module, dict[str, StoredTensor]]:
    """Read a diffusers autoencoder: the module on the meta device, and its tensors.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if it is not an autoencoder of images, or its weights do not fit its configuration.
    """
    check_files(folder, "config.json")
    vae = autoencoder_on_meta(read_json(folder / "config.json"), folder)
    tensors = read_weights(folder, "diffusion_pytorch_model")
    # What diffusers itself does to old checkpoints when it loads them.
    vae._fix_state_dict_keys_on_load(tensors)
    return vae, check_tensors(tensors, vae, folder)


def autoencoder_on_meta(config: dict[str, Any], where: Path) -> torch.nn.Module:
    """The autoencoder of a configuration, without memory for its weights.

    Raises:
        `ValueError`: if it does not encode images (batch, 3, height, width) as latents (batch, channels, height,
            width) and decode them.
    """
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if cls is None or not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise ValueError(f"{where} holds a {name!r}, which is not an autoencoder of diffusers; use AutoencoderDC.")
    with torch.device("meta"):
        try:
            vae = cls.from_config(config)
        except TypeError as error:
            raise ValueError(f"the configuration of the {name} in {where} is incomplete: {error}") from error
        for needed in ("latent_channels", "scaling_factor"):
            if not isinstance(getattr(vae.config, needed, None), (int, float)):
                raise ValueError(f"autoencoder {name} in {where} has no {needed}; use AutoencoderDC instead.")
        try:
            latents = encode_pixels(vae, torch.empty(1, 3, 256, 256))
            pixels = vae.decode(latents, return_dict=False)[0]
        except Exception as error:
            raise ValueError(f"autoencoder {name} in {where} does not encode and decode images: {error}") from error
    side = 256 // spatial_compression(vae)
    if (latents.shape, pixels.shape) != ((1, vae.config.latent_channels, side, side), (1, 3, 256, 256)):
        raise ValueError(
            f"autoencoder {name} in {where} encodes a 256x256 image as {tuple(latents.shape)} latents and decodes "
            f"them as {tuple(pixels.shape)}, which does not fit its configuration."
        )
    return vae


def check_velocity(config: LatteFlowConfig, tensors: dict[str, StoredTensor]) -> str:
    """Run the first expert once, on random latents and a random context; only its own weights are read.

    Raises:
        `ValueError`: if the velocity is not finite.
    """
    model = model_on_meta(config)
    dtype = tensors["tower.head.proj.weight"].dtype
    others = tuple(f"tower.layers.{i}." for k in range(1, config.num_experts) for i in model.expert_layers(k))
    used = {
        name: tensor.read().to(dtype)
        for name, tensor in tensors.items()
        if name.startswith("tower.") and not name.startswith(others)
    }
    model.load_state_dict(used, strict=False, assign=True)
    # Rotary frequencies are not stored, but computed when the module is made.
    model.tower.rotary_emb = type(model.tower.rotary_emb)(config=model.tower.rotary_emb.config)
    generator = torch.Generator().manual_seed(0)
    num_groups, head_dim = model.tower.layers[0].context_head_shape
    states = torch.randn(1, num_groups, 4, head_dim, generator=generator).to(dtype)
    layers = (states,) * config.text_config.num_hidden_layers
    context = LatteFlowContext(
        layers, layers, torch.ones(1, 4, dtype=torch.bool), torch.tensor([4]), has_padding=False
    )
    side = 2 * config.latent_patch_size
    latents = torch.randn(1, config.latent_channels, side, side, generator=generator).to(dtype)
    with torch.no_grad():
        velocity = model.predict_velocity(latents, 1000.0, context, expert=0)
    if velocity.shape != latents.shape or not velocity.isfinite().all():
        raise ValueError("the converted model's velocity is not finite: its weights are damaged.")
    return f"expert 0 predicts a finite velocity with root mean square {velocity.float().square().mean().sqrt():.3g}"
