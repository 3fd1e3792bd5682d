# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the stock Trainer needs to train a LaTtE-Flow model: examples -> batches, and callbacks."""

from .callbacks import CheckpointCallback, EMACallback, LossCallback, SampleCallback, last_checkpoint
from .collator import ConversationCollator, PaintingCollator, PictureEncoder, encode_prompts


__all__ = [
    "CheckpointCallback",
    "ConversationCollator",
    "EMACallback",
    "LossCallback",
    "PaintingCollator",
    "PictureEncoder",
    "SampleCallback",
    "encode_prompts",
    "last_checkpoint",
]
