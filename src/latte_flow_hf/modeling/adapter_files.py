# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Adapters as users have them: PEFT folders, single files and state dicts, with the key names of several libraries.

All of them become a PEFT configuration and a state dict with PEFT's names, `tower.layers.0.mlp.up_proj.lora_A.weight`.
"""

import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ..files import check_files, read_json


# PEFT is an extra. In `try`, or code that a checkpoint carries could not be loaded without it.
try:
    import peft
except ImportError:
    peft = None  # type: ignore[assignment]


CONFIG_NAME = "adapter_config.json"
# Of PEFT and of diffusers, which writes no configuration file.
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# The key of the metadata in which diffusers writes the configuration.
METADATA_KEY = "lora_adapter_metadata"
DOWNLOAD_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")

# What libraries put before the name of a module: PEFT, distributed training, torch.compile, diffusers, ComfyUI.
_WRAPPERS = ("base_model", "model", "module", "_orig_mod", "transformer", "unet", "diffusion_model")
# In kohya's scripts, a module's name has underscores in place of dots.
_KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_")
# Of diffusers and others, where a weight without an alpha has the scale 1. In PEFT, the configuration has the scale.
SCALED_LAYOUTS = ("transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", *_KOHYA_PREFIXES)
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.lora(?:_linear_layer)?[._]down\.(?=weight$|bias$)", ".lora_A."),
        (r"\.lora(?:_linear_layer)?[._]up\.(?=weight$|bias$)", ".lora_B."),
        # The name of the adapter, in the state dict of a model.
        (r"\.(lora_[AB])\.[^.]+\.(?=weight$|bias$)", r".\1."),
        (r"\.lora_magnitude_vector(\.[^.]+)*$", ".lora_magnitude_vector"),
        (r"\.dora_scale$", ".lora_magnitude_vector"),
        (r"\.default(?=$|\.weight$|\.bias$)", ""),
    )
]
_LORA_KEY = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_magnitude_vector)")


def read_adapter(
    source: str | os.PathLike | Mapping[str, torch.Tensor], weight_name: str | None = None, **download: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The weights of an adapter and its configuration, if it has one.

    Args:
        source (`str`, `os.PathLike` or `dict`): a folder, a hub id, a file, or a state dict.
        weight_name (`str`, *optional*): the weights file in the folder; defaults to the first of `WEIGHT_NAMES`.
        download: some of `DOWNLOAD_ARGUMENTS`, as in `from_pretrained`.

    Returns:
        The state dict as it is stored, and the content of `adapter_config.json` (beside the weights) or of the
        metadata that diffusers writes into a safetensors file; `None` if there is neither.

    Raises:
        `ValueError`: if an argument is unknown.
        `OSError`: if a file is missing, truncated or damaged.
    """
    unknown = sorted(set(download) - set(DOWNLOAD_ARGUMENTS))
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; an adapter is loaded with {list(DOWNLOAD_ARGUMENTS)}.")
    if isinstance(source, Mapping):
        return dict(source), None
    path = Path(source)
    if path.is_file():
        config_file = path.with_name(CONFIG_NAME)
        return _read_weights(path, config_file if config_file.is_file() else None)
    if path.is_dir():
        folder = path / (download.get("subfolder") or "")
        names = [weight_name] if weight_name else [name for name in WEIGHT_NAMES if (folder / name).is_file()]
        if not weight_name and (not names or names[0] in WEIGHT_NAMES[:2]):
            check_files(folder, CONFIG_NAME, "adapter_model.safetensors|adapter_model.bin")
        check_files(folder, names[0])
    elif path.is_absolute() or len(path.parts) > 2:
        raise OSError(f"there is no adapter {source}: no such file or folder, and no name of a hub repository.")
    else:
        names = [weight_name] if weight_name else list(WEIGHT_NAMES)

    def find(name: str) -> Path | None:
        file = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **download)
        return None if file is None else Path(file)

    weights = next((file for name in names if (file := find(name)) is not None), None)
    if weights is None:
        raise OSError(f"{source} has no {' or '.join(names)}; give its weights file by weight_name.")
    return _read_weights(weights, find(CONFIG_NAME))


def _read_weights(path: Path, config_file: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    config = None if config_file is None else read_json(config_file)
    try:
        if path.suffix != ".safetensors":
            return dict(torch.load(path, map_location="cpu", weights_only=True)), config
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            if config is None and metadata is not None:
                # Of the component `transformer`, or of `model`, the one in this package.
                config = {key.partition(".")[2]: value for key, value in json.loads(metadata).items()}
            return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise OSError(f"{path} is truncated or damaged ({error}); save or download it again.") from error


def convert_adapter_keys(
    state_dict: Mapping[str, torch.Tensor], module_names: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Rename the keys of an adapter to PEFT's, without a prefix and without the adapter's name.

    Known are those of PEFT, with or without `base_model.model.` and the name of the adapter, of diffusers
    (`transformer.`, `unet.`, `lora.down`, `lora.up`), and of kohya's scripts (`lora_unet_tower_layers_0_...`,
    `lora_down`, `lora_up`, `dora_scale`, `alpha`). A key of another kind is returned as it is.

    Args:
        state_dict (`dict[str, torch.Tensor]`): the adapter.
        module_names (`list[str]`): the names of the model's modules.

    Returns:
        The renamed state dict, and by module the values of `alpha`, which PEFT has in its configuration.

    Raises:
        `ValueError`: if two keys have the same meaning, or a weight is no tensor.
    """
    with_underscores = {name.replace(".", "_"): name for name in module_names}
    converted: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the weights of an adapter must be tensors, got {key}: {type(tensor).__name__}.")
        name = key
        while name.partition(".")[0] in _WRAPPERS:
            name = name.partition(".")[2]
        for prefix in _KOHYA_PREFIXES:
            if name.startswith(prefix):
                module, _, rest = name.removeprefix(prefix).partition(".")
                name = f"{with_underscores.get(module, module)}.{rest}"
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
            continue
        if name in converted:
            raise ValueError(f"the adapter has {name} twice, the second time as {key}.")
        is_column = name.endswith(".lora_magnitude_vector") and tensor.ndim == 2 and tensor.shape[1] == 1
        converted[name] = tensor[:, 0] if is_column else tensor
    return converted, alphas


def infer_lora_config(
    state_dict: Mapping[str, torch.Tensor], alphas: Mapping[str, float], module_names: list[str]
) -> "peft.PeftConfig":
    """The `LoraConfig` of an adapter that came without one: ranks from the shapes, the scale of a module
    alpha / rank, and 1 if it has no alpha (as in diffusers).

    Args:
        state_dict (`dict[str, torch.Tensor]`), alphas (`dict[str, float]`): as `convert_adapter_keys` returns them.
        module_names (`list[str]`): the names of the model's modules.

    Raises:
        `ValueError`: if it is empty, or has keys that are not those of LoRA, or belong to no module.
    """

    matches = {key: _LORA_KEY.fullmatch(key) for key in state_dict}
    others = sorted(key for key, match in matches.items() if match is None)
    if others or not state_dict:
        raise ValueError(
            f"the adapter has no {CONFIG_NAME}, and without it only LoRA weights can be loaded; got "
            f"{others[:3] if others else 'no weights'}. Give its configuration as peft_config."
        )
    ranks: dict[str, int] = {}
    for key, match in matches.items():
        if match and match[2] in ("lora_A.weight", "lora_B.weight"):
            ranks.setdefault(match[1], state_dict[key].shape[0 if match[2] == "lora_A.weight" else 1])
    if not ranks:
        raise ValueError(f"the adapter has no LoRA matrices, only {sorted(state_dict)[:3]}.")
    unknown = sorted({*ranks, *alphas} - set(module_names))
    if unknown:
        raise ValueError(
            f"the adapter has weights for {len(unknown)} modules that the model does not have, such as {unknown[:2]}."
        )
    r = Counter(ranks.values()).most_common(1)[0][0]
    scaled = {module: alphas.get(module, rank) for module, rank in ranks.items()}
    return peft.LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={re.escape(module): rank for module, rank in ranks.items() if rank != r},
        alpha_pattern={re.escape(module): alpha for module, alpha in scaled.items() if alpha != r},
        use_dora=any(key.endswith("lora_magnitude_vector") for key in state_dict),
        lora_bias=any(key.endswith(".bias") for key in state_dict),
    )
