# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Which weights are trained: low-rank adapters (PEFT) of some experts, all weights of some experts, or the tower."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..modeling.adapter_files import read_adapter
from ..modeling.adapters import adapter_mark, check_adapter_config, remove_sampling_mark


if TYPE_CHECKING:
    from peft import LoraConfig

    from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration


ADAPTER_PARTS = ("attention", "mlp", "modulation")


def expert_lora_config(
    model: "LatteFlowForConditionalGeneration",
    experts: Sequence[int],
    r: int = 16,
    lora_alpha: int | None = None,
    parts: Sequence[str] = ADAPTER_PARTS,
    **lora_config: Any,
) -> "LoraConfig":
    """A `peft.LoraConfig` whose target modules are the linear layers of some experts.

    Pass it to `peft.get_peft_model(model, config)` or `model.add_adapter(config)`. Training then samples timesteps
    from the intervals of these experts only. The saved `adapter_config.json` records the model that it belongs to.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model, which is not changed.
        experts (`list[int]`): the experts; 0 owns the noisiest interval.
        r (`int`, defaults to 16): the rank of the adapters.
        lora_alpha (`int`, *optional*): the scale of the adapters times `r`; defaults to `r` (chosen: scale 1, as in
            diffusers).
        parts (`tuple[str]`): of each layer: `"attention"` (query, key, value, output), `"mlp"`, and `"modulation"`
            (which depends on the timestep: the four modulation vectors and the gate of the residual attention).
        lora_config: further arguments of `LoraConfig`, such as `lora_dropout` and `use_dora`.

    Raises:
        `ValueError`: if an expert or part does not exist, none is given, or a setting cannot be used (DoRA on the
            modulation of a new tower, which is zero).
    """
    from peft import LoraConfig

    experts = _check_experts(model, experts)
    if isinstance(parts, str) or not parts or not set(parts) <= set(ADAPTER_PARTS):
        raise ValueError(f"parts must be some of {list(ADAPTER_PARTS)}, got {parts!r}.")
    layers = [index for expert in experts for index in model.expert_layers(expert)]
    names = sorted({name for index in layers for name in _linear_names(model.tower.layers[index], parts)})
    config = LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        # A regular expression and not a list of names: peft shortens long lists to suffixes, which also match layers
        # of the backbone.
        target_modules=(
            adapter_mark(model.config, experts)
            + rf"tower\.layers\.(?:{'|'.join(map(str, layers))})\.(?:{'|'.join(map(re.escape, names))})"
        ),
        **lora_config,
    )
    check_adapter_config(model, config, "default")
    return config


def read_starting_weights(source: str, config: "LoraConfig") -> dict[str, Any]:
    """The weights of a saved adapter from which a new one with `config` is trained further.

    Args:
        source (`str`): the folder or hub id of the saved adapter.
        config (`LoraConfig`): of the new adapter, from `expert_lora_config`.

    Returns:
        `dict`: for `peft.set_peft_model_state_dict`.

    Raises:
        `ValueError`: if the saved adapter belongs to another model, or to other layers, or has another rank or scale.
        `OSError`: if a file is missing or damaged.
    """
    weights, saved = read_adapter(source)
    if saved is None:
        raise ValueError(f"lora: weights: {source} has no adapter_config.json, which tells what its weights are.")
    own = config.to_dict()
    for name in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules"):
        values = [own[name], saved.get(name)]
        if name == "target_modules":
            values = [remove_sampling_mark(value) for value in values]
        if values[0] != values[1]:
            raise ValueError(
                f"lora: weights: {source} has {name} {values[1]!r}, but the adapter that is trained has {values[0]!r}."
            )
    return weights


def train_only_experts(
    model: "LatteFlowForConditionalGeneration", experts: Sequence[int]
) -> "LatteFlowForConditionalGeneration":
    """Make only the layers of some experts trainable. Training then samples timesteps from their intervals only.

    The modules that all experts share (embeddings of latents and timestep, head) are frozen too, because training them
    would change the output of the other experts.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model, changed in place and returned.
        experts (`list[int]`): the experts; 0 owns the noisiest interval.

    Raises:
        `ValueError`: if an expert does not exist, or none is given.
    """
    experts = _check_experts(model, experts)
    model.requires_grad_(False)
    for expert in experts:
        for index in model.expert_layers(expert):
            model.tower.layers[index].requires_grad_(True)
    return model


def set_trainable(model: "LatteFlowForConditionalGeneration", trainable: str | Sequence[int]) -> None:
    """Make trainable what a recipe's `trainable` names, and freeze the rest.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model, changed in place.
        trainable (`str` or `list[int]`): `"experts"`, the whole tower; a list of experts, see `train_only_experts`; or
            `"vlm"`, the tower and the language model of the backbone.

    Raises:
        `ValueError`: if an expert does not exist, or none is given.
    """
    if not isinstance(trainable, str):
        train_only_experts(model, trainable)
        return
    model.requires_grad_(False)
    model.tower.requires_grad_(True)
    if trainable == "vlm":
        model.vlm.get_decoder().requires_grad_(True)


def _check_experts(model: "LatteFlowForConditionalGeneration", experts: Sequence[int]) -> list[int]:
    """The experts, sorted and without duplicates."""
    known = range(model.config.num_experts)
    if not isinstance(experts, Sequence) or not experts or any(expert not in known for expert in experts):
        raise ValueError(f"experts must be a list of some of {list(known)}, got {experts!r}.")
    return sorted(set(experts))


def _linear_names(layer: nn.Module, parts: Sequence[str]) -> list[str]:
    """The names of the linear layers in the given parts of a layer, without those of adapters."""
    names = [
        name.removesuffix(".base_layer")
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]

    def part_of(name: str) -> str:
        if name == "modulation" or name.endswith("residual_gate"):
            return "modulation"
        return "attention" if name.startswith("self_attn.") else "mlp"

    return [name for name in names if part_of(name) in parts]
