# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoint: a small model that knows the tiny world, made by `recipes/tinyworld/checkpoint.yaml`."""

from pathlib import Path


def tiny_checkpoint() -> str:
    """The folder of the embedded checkpoint, for `LatteFlowPipeline.from_pretrained`."""
    return str(Path(__file__).parent / "tinyworld")
