# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Hashes of what decides an image: weights, configurations and active adapters, wherever they were loaded from."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..modeling.adapters import adapter_modules


def hash_module(module: torch.nn.Module) -> str:
    """SHA-256 of the configuration of a module, of its parameters and buffers, and of which adapters are active."""
    digest = _hash_tensors(module.state_dict(), _config_of(module))
    for name, layer in module.named_modules():
        # A layer with PEFT adapters: which are active, and how strong, is not in its tensors.
        if hasattr(layer, "active_adapters") and hasattr(layer, "merged_adapters"):
            adapters = (layer.active_adapters, layer.merged_adapters, layer.disable_adapters)
            digest.update(f"{name} {adapters} {getattr(layer, 'scaling', None)}".encode())
    return digest.hexdigest()


def hash_without_adapters(module: torch.nn.Module) -> str:
    """What [`hash_module`] is for the module without its adapters, whatever is loaded and active. Fused adapters are
    in the weights, and so in the hash."""
    wrappers = {f"{name}." for name, _ in adapter_modules(module)}
    plain = {}
    for name, tensor in module.state_dict().items():
        parts = name.split(".")
        is_base = [
            parts[depth] in ("base_layer", "original_module")
            for depth in range(1, len(parts))
            if ".".join(parts[:depth]) + "." in wrappers
        ]
        if all(is_base):
            plain[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    return _hash_tensors(plain, _config_of(module)).hexdigest()


def hash_adapter(model: Any, name: str) -> str:
    """SHA-256 of a loaded adapter: its method, its scale and its weights, but neither its name nor where it lay."""
    config = model.peft_config[name].to_dict()
    settings = {key: config.get(key) for key in _ADAPTER_SETTINGS}
    return _hash_tensors(model.get_adapter_state_dict(name), settings).hexdigest()


# Of PEFT's configurations, what multiplies or combines the weights of an adapter.
_ADAPTER_SETTINGS = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)


def _hash_tensors(tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> "hashlib._Hash":
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_tensors(tensor.detach()):
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest


def _config_of(module: torch.nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", {})
    return _relevant_config(config.to_dict() if hasattr(config, "to_dict") else dict(config))


def _relevant_config(config: dict) -> dict:
    """A configuration without what does not affect the output, such as paths and versions."""
    return {
        str(key): _relevant_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in ("transformers_version", "trained_words")
    }


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors in which a quantized one, such as torchao's, stores its values; others as they are."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def hash_processor(processor: Any) -> str:
    """SHA-256 of what decides the tokens of a prompt: vocabulary, chat template, treatment of control tokens."""
    content = json.dumps(
        [processor.tokenizer.get_vocab(), processor.chat_template, processor.sanitize_control_tokens], sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()


def pipeline_fingerprint(pipe: Any, hash_model: Callable[[torch.nn.Module], str] = hash_module) -> dict[str, str]:
    """What the images of a pipeline depend on besides the arguments of the call, by component.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        hash_model (`Callable`): how the model is hashed, with its adapters ([`hash_module`]) or without them
            ([`hash_without_adapters`]).
    """
    scheduler = json.dumps(
        [type(pipe.scheduler).__name__, _relevant_config(dict(pipe.scheduler.config))], sort_keys=True, default=str
    )
    return {
        "model": hash_model(pipe.model),
        "autoencoder": hash_module(pipe.vae),
        "scheduler": hashlib.sha256(scheduler.encode()).hexdigest(),
        "processor": hash_processor(pipe.processor),
    }
