# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A server for many users at once, with OpenAI's interface. The engine alone needs no web packages."""

from .engine import Engine, EngineClosedError, GeneratedImages, GenerationError, Preview, QueueFullError
from .running_image import ImageRequest


__all__ = [
    "Engine",
    "EngineClosedError",
    "GeneratedImages",
    "GenerationError",
    "ImageRequest",
    "Preview",
    "QueueFullError",
]
