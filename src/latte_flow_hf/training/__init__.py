# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Parts for training with the stock Trainer: collators, callbacks, and which weights are trained."""

from .adapters import expert_lora_config, train_only_experts
from .callbacks import (
    CheckpointCallback,
    EMACallback,
    IntervalWarmupCallback,
    LossCallback,
    SampleCallback,
    TimeCallback,
    last_checkpoint,
)
from .collator import ConversationCollator, ImagePromptEncoder, TextToImageCollator, encode_prompts


__all__ = [
    "CheckpointCallback",
    "ConversationCollator",
    "EMACallback",
    "ImagePromptEncoder",
    "IntervalWarmupCallback",
    "LossCallback",
    "SampleCallback",
    "TextToImageCollator",
    "TimeCallback",
    "encode_prompts",
    "expert_lora_config",
    "last_checkpoint",
    "train_only_experts",
]
