# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A server for many users at once, with OpenAI's interface. The engine alone needs no web packages.

`serve run latte_flow_hf.serving:app` starts it on Ray.
"""

from typing import Any

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


def __getattr__(name: str) -> Any:
    if name == "app":
        # Ray looks it up by this name. Nothing else needs Ray.
        from .ray_app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
