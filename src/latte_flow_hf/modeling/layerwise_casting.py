# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Layerwise casting of the tower: linear maps are stored in 8 bits and cast to the compute dtype while they run.

The hooks are those of diffusers. The backbone is not cast: text through the model stays that of the backbone, bit for
bit, and a prompt is encoded once while the tower runs at every step.
"""

from typing import Any

import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn
from transformers.utils import is_peft_available

from .adapters import peft


_HOOK = "layerwise_casting"


def is_layerwise_cast(module: nn.Module) -> bool:
    """Whether any weight of `module` is stored in another dtype than the one in which it is used."""
    return any(
        "_diffusers_hook" in submodule.__dict__ and _HOOK in submodule._diffusers_hook.hooks
        for submodule in module.modules()
    )


class LatteFlowLayerwiseCastingMixin:
    """`enable_layerwise_casting`, and errors for what would use the stored weights as if they were exact."""

    tower: nn.Module
    # Not cast, beside norms: small, and the size of every layer's output depends on them. (Same as for quantization.)
    _skip_layerwise_casting_patterns = (
        r"^(timestep_embedding|latent_embedding|head)\.",
        r"\.(modulation|residual_gate)$",
    )

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Same as diffusers' `ModelMixin.enable_layerwise_casting`, for the linear maps of the tower's attention and
        feed-forward layers. It cannot be undone: the weights are rounded. Load adapters (LoRA) before, and enable
        off-loading after it. The tower can then be neither trained nor saved.

        Args:
            storage_dtype (`torch.dtype`): the dtype of the stored weights, smaller than `compute_dtype`.
            compute_dtype (`torch.dtype`, *optional*): the dtype of the tower, which is the default.
            skip_modules_pattern (`tuple[str]`, *optional*): regular expressions for names in the tower of what is not
                cast; defaults to those of diffusers. Norms of the default aside, embeddings, modulations, gates and
                the head are never cast.
            skip_modules_classes (`tuple[type]`, *optional*): classes that are not cast.
            non_blocking (`bool`, defaults to `False`): whether weights are cast without waiting.

        Raises:
            `ValueError`: if the dtypes do not fit, a weight is too large for `storage_dtype`, the tower is quantized,
                off-loaded or cast already, or an adapter is not plain LoRA.
        """
        own_dtype = self.tower.head.norm.weight.dtype
        compute_dtype = own_dtype if compute_dtype is None else compute_dtype
        if compute_dtype != own_dtype:
            raise ValueError(
                f"compute_dtype must be the dtype of the tower, {own_dtype}, got {compute_dtype}; load the model with "
                "dtype=compute_dtype."
            )
        if not storage_dtype.is_floating_point or storage_dtype.itemsize >= compute_dtype.itemsize:
            raise ValueError(f"storage_dtype must be a smaller float than {compute_dtype}, got {storage_dtype}.")
        self._check_not_cast("enable_layerwise_casting")
        if getattr(self, "is_quantized", False):
            raise ValueError("the model is quantized, and its weights cannot be cast; load it without quantization.")
        if getattr(self.tower, "expert_offload", None) is not None or any(
            "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__ for module in self.tower.modules()
        ):
            raise ValueError("enable layerwise casting before any off-loading, which keeps weights of its own.")
        patterns = DEFAULT_SKIP_MODULES_PATTERN if skip_modules_pattern is None else tuple(skip_modules_pattern)
        patterns += self._skip_layerwise_casting_patterns
        if is_peft_available():
            patterns += self._adapter_patterns()
        largest = torch.finfo(storage_dtype).max
        for name, weight in self.tower.named_parameters():
            if weight.abs().max() > largest:
                raise ValueError(f"tower.{name} has values above {largest:g}, the largest of {storage_dtype}.")
        # Gradients of rounded weights train nothing.
        self.tower.requires_grad_(False)
        apply_layerwise_casting(self.tower, storage_dtype, compute_dtype, patterns, skip_modules_classes, non_blocking)

    def _adapter_patterns(self) -> tuple[str, ...]:
        """The names of LoRA's own weights, which stay as they are. Other methods compute with the stored weights."""
        for name, config in (getattr(self, "peft_config", None) or {}).items():
            method = getattr(config.peft_type, "value", config.peft_type)
            if method != "LORA" or getattr(config, "use_dora", False):
                raise ValueError(
                    f"adapter {name!r} ({'DoRA' if method == 'LORA' else method}) computes with the weights of the "
                    "tower, which layerwise casting stores in another dtype; fuse it, or use LoRA."
                )
        return tuple(rf"\.{name}(\.|$)" for name in peft.tuners.lora.LoraLayer.adapter_layer_names)

    def _check_not_cast(self, method: str) -> None:
        if is_layerwise_cast(self.tower):
            raise ValueError(
                f"{method} is not possible after enable_layerwise_casting: the stored weights are rounded. Load the "
                "model again, and do this before."
            )

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # `to`, `half`, `float` and others end here. Another device is fine, another dtype is not.
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in (torch.float32, torch.bfloat16)):
            self._check_not_cast("another dtype")
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._check_not_cast("load_state_dict")
        super()._load_from_state_dict(*args)  # type: ignore[misc]
