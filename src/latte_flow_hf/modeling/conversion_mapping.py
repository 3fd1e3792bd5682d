# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of earlier versions: how their weights become those of the present modules when transformers loads them.

Checkpoints used to hold the latent embedding as a linear map of flattened patches, `tower.latent_embedding.weight` of
shape (D, C * k * k). It is a convolution now, `tower.latent_embedding.proj.weight` of shape (D, C, k, k): the same
numbers in the same order.
"""

import math
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming


class LinearToConv2d(ConversionOps):
    """The weight of a linear map of flattened patches (D, C * k * k) as that of a convolution (D, C, k, k)."""

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (weight,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        kernel = (config.latent_channels, config.latent_kernel_size, config.latent_kernel_size)
        # A weight of another size keeps its shape, and transformers reports the mismatch.
        fits = weight[0].numel() == math.prod(kernel)
        return {target_patterns[0]: weight.unflatten(1, kernel) if fits else weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return Conv2dToLinear()


class Conv2dToLinear(ConversionOps):
    """The inverse of `LinearToConv2d`."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (weight,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        return {target_patterns[0]: weight.flatten(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return LinearToConv2d()


CHECKPOINT_CONVERSIONS = [
    WeightConverter("tower.latent_embedding.weight", "tower.latent_embedding.proj.weight", [LinearToConv2d()]),
    WeightRenaming("tower.latent_embedding.bias", "tower.latent_embedding.proj.bias"),
]
