# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the stock Trainer needs to train a LaTtE-Flow model: examples -> batches, and callbacks."""

from .callbacks import EMACallback
from .collator import ConversationCollator, PaintingCollator, encode_prompts


__all__ = ["ConversationCollator", "EMACallback", "PaintingCollator", "encode_prompts"]
