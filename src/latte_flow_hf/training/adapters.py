# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Which experts learn, and how: by low-rank adapters of peft, or in full."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..modeling.adapters import adapter_mark


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
    """An ordinary `peft.LoraConfig` over the linear maps of the chosen experts, and of nothing else.

    It goes to `peft.get_peft_model(model, config)` or `model.add_adapter(config)`; training then draws timesteps from
    the chosen experts' intervals alone. The saved `adapter_config.json` says which model it fits.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model, which is not changed.
        experts (`list[int]`): which ones; 0 owns the noisiest interval.
        r (`int`, defaults to 16): the adapters' rank.
        lora_alpha (`int`, *optional*): strength times `r`; `r` if not given (chosen: strength 1, as in diffusers).
        parts (`tuple[str]`): of each layer: `"attention"` (query, key, value, output), `"mlp"`, and `"modulation"`
            (what the timestep controls: the four modulation vectors and the gate of the residual attention).
        lora_config: more arguments of `LoraConfig`, such as `lora_dropout` and `use_dora`.

    Raises:
        `ValueError`: if there is no such expert or part, or none is given.
    """
    from peft import LoraConfig

    experts = _checked_experts(model, experts)
    if isinstance(parts, str) or not parts or not set(parts) <= set(ADAPTER_PARTS):
        raise ValueError(f"parts must be some of {list(ADAPTER_PARTS)}, got {parts!r}.")
    layers = [index for expert in experts for index in model.expert_layers(expert)]
    names = sorted({name for index in layers for name in _linears(model.tower.layers[index], parts)})
    return LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        # One expression, not a list of names: peft shortens long lists to endings, which the backbone's layers share.
        target_modules=(
            adapter_mark(model.config, experts)
            + rf"tower\.layers\.(?:{'|'.join(map(str, layers))})\.(?:{'|'.join(map(re.escape, names))})"
        ),
        **lora_config,
    )


def train_only_experts(
    model: "LatteFlowForConditionalGeneration", experts: Sequence[int]
) -> "LatteFlowForConditionalGeneration":
    """Leave the chosen experts' layers trainable and freeze all else; training then draws their timesteps alone.

    Frozen too is what all experts share (embedding of the latents and of the timestep, head): if it learned, the
    other experts would paint differently.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): changed in place, and returned.
        experts (`list[int]`): which ones; 0 owns the noisiest interval.

    Raises:
        `ValueError`: if there is no such expert, or none is given.
    """
    experts = _checked_experts(model, experts)
    model.requires_grad_(False)
    for expert in experts:
        for index in model.expert_layers(expert):
            model.tower.layers[index].requires_grad_(True)
    return model


def _checked_experts(model: "LatteFlowForConditionalGeneration", experts: Sequence[int]) -> list[int]:
    """The experts in rising order."""
    known = range(model.config.num_experts)
    if not isinstance(experts, Sequence) or not experts or any(expert not in known for expert in experts):
        raise ValueError(f"experts must be a list of some of {list(known)}, got {experts!r}.")
    return sorted(set(experts))


def _linears(layer: nn.Module, parts: Sequence[str]) -> list[str]:
    """The names of a layer's linear maps that belong to `parts`; other adapters around them do not count."""
    names = [
        name.removesuffix(".base_layer")
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]

    def part(name: str) -> str:
        if name == "modulation" or name.endswith("residual_gate"):
            return "modulation"
        return "attention" if name.startswith("self_attn.") else "mlp"

    return [name for name in names if part(name) in parts]
