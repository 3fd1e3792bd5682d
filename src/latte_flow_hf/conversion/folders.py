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
from accelerate.hooks import attach_align_device_hook
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from ..files import check_files
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.context import LatteFlowContext
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..pipelines.pipeline_latte_flow import encode_pixels, spatial_compression
from .plan import Weights
from .streaming import StoredTensor, check_tensors, module_tensors, read_weights


MODEL, AUTOENCODER = "model/model", "vae/diffusion_pytorch_model"

# Weights; whatever else lies in a pipeline's folder is small and is taken along as it is.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass
class PipelineFolder:
    """A pipeline on disk.

    Args:
        folder (`Path`): where it lies.
        name (`str`): the folder's name, or the hub id.
        config ([`LatteFlowConfig`]): the model's.
        model ([`LatteFlowForConditionalGeneration`]): on the meta device.
        texts (`dict[str, bytes]`): everything but weights, by path.
        weights (`Weights`): of the model, under the module's own names, and of the autoencoder.
    """

    folder: Path
    name: str
    config: LatteFlowConfig
    model: LatteFlowForConditionalGeneration
    texts: dict[str, bytes]
    weights: Weights


def local_folder(source: str | Path) -> Path:
    """`source` if it is a folder, else what the hub holds under that id (weights in safetensors alone).

    Raises:
        `OSError`: if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in _WEIGHTS[2:]]))
    except (OSError, ValueError) as error:
        raise OSError(f"{source} is no folder, and cannot be fetched from the hub: {error}") from error


def source_name(source: str | Path) -> str:
    """How a model card calls it: where a folder lies is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def read_pipeline(source: str | Path) -> PipelineFolder:
    """A pipeline's folder or hub id.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if it is another kind of model, or its weights do not fit its configuration.
    """
    folder = local_folder(source)
    check_files(folder, "model_index.json")
    for component in ("model", "vae", "scheduler", "processor"):
        check_files(folder / component, "*config.json")
    config = AutoConfig.from_pretrained(folder / "model")
    if not isinstance(config, LatteFlowConfig):
        raise ValueError(f"{source} holds a {config.model_type!r} model, not a 'latte_flow' one.")
    model = meta_model(config)
    _, autoencoder = read_autoencoder(folder / "vae")
    weights = {
        MODEL: module_tensors(read_weights(folder / "model", "model"), model, folder / "model"),
        AUTOENCODER: autoencoder,
    }
    return PipelineFolder(folder, source_name(source), config, model, read_texts(folder), weights)


def read_texts(folder: Path) -> dict[str, bytes]:
    """Every file that is neither weights nor hidden, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.endswith(_WEIGHTS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def saved(save: Callable[[Path], Any]) -> dict[str, bytes]:
    """The files that a `save_pretrained` of the libraries makes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return read_texts(Path(folder))


def under(folder: str, texts: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{path}": text for path, text in texts.items()}


def edited(text: bytes, **values: Any) -> bytes:
    """A JSON file with some values changed."""
    return json.dumps({**json.loads(text), **values}, indent=2).encode() + b"\n"


def meta_model(config: LatteFlowConfig) -> LatteFlowForConditionalGeneration:
    """The model without its weights."""
    with torch.device("meta"):
        return LatteFlowForConditionalGeneration(config)


def read_autoencoder(folder: Path) -> tuple[torch.nn.Module, dict[str, StoredTensor]]:
    """A diffusers autoencoder: the module on the meta device, and its tensors.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if it is no autoencoder that turns latents (batch, channels, height, width) into pictures, or its
            weights do not fit its configuration.
    """
    check_files(folder, "config.json")
    vae = meta_autoencoder(json.loads((folder / "config.json").read_text()), folder)
    tensors = read_weights(folder, "diffusion_pytorch_model")
    # What diffusers itself does to old checkpoints when it loads them.
    vae._fix_state_dict_keys_on_load(tensors)
    return vae, check_tensors(tensors, vae, folder)


def meta_autoencoder(settings: dict[str, Any], where: Path) -> torch.nn.Module:
    """The autoencoder of a configuration, on the meta device.

    Raises:
        `ValueError`: if it is no autoencoder that turns latents (batch, channels, height, width) into pictures.
    """
    name = str(settings.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"{where} holds a {name!r}, which is no autoencoder of diffusers; AutoencoderDC would do.")
    with torch.device("meta"):
        try:
            vae = kind.from_config(settings)
        except TypeError as error:
            raise ValueError(f"the configuration of the {name} in {where} is not whole: {error}") from error
        for needed in ("latent_channels", "scaling_factor"):
            if not isinstance(getattr(vae.config, needed, None), (int, float)):
                raise ValueError(f"the autoencoder {name} in {where} has no {needed}; AutoencoderDC would do.")
        try:
            latents = encode_pixels(vae, torch.empty(1, 3, 256, 256))
            pixels = vae.decode(latents, return_dict=False)[0]
        except Exception as error:
            raise ValueError(
                f"the autoencoder {name} in {where} does not encode and decode pictures: {error}"
            ) from error
    side = 256 // spatial_compression(vae)
    if (latents.shape, pixels.shape) != ((1, vae.config.latent_channels, side, side), (1, 3, 256, 256)):
        raise ValueError(
            f"the autoencoder {name} in {where} makes {tuple(pixels.shape)} of {tuple(latents.shape)} latents of a "
            "256x256 picture, which is not what its configuration says."
        )
    return vae


def one_velocity(config: LatteFlowConfig, tensors: dict[str, StoredTensor]) -> str:
    """Run the first expert once, on random latents and a random context, its weights read module by module.

    Raises:
        `ValueError`: if the velocity is not finite.
    """
    model = meta_model(config)
    dtype = tensors["tower.head.proj.weight"].dtype
    model.tower.to(dtype)
    # The rotary frequencies are stored nowhere: they are worked out anew, out of accelerate's sight.
    rotary, model.tower.rotary_emb = model.tower.rotary_emb, torch.nn.Identity()
    attach_align_device_hook(model.tower, torch.device("cpu"), offload=True, weights_map=_Lazy(tensors, "tower."))
    model.tower.rotary_emb = type(rotary)(config=rotary.config)
    attention = model.tower.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    shape = (1, attention.num_heads // attention.num_key_value_groups, 4, attention.head_dim)
    states = torch.randn(shape, generator=generator).to(dtype)
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
    return f"expert 0 gives a finite velocity, {velocity.float().square().mean().sqrt():.3g} in the root mean square"


class _Lazy(dict):
    """Tensors by name for accelerate, read when they are asked for."""

    def __init__(self, tensors: dict[str, StoredTensor], prefix: str):
        super().__init__({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).read()
