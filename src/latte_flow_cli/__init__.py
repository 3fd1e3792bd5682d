# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The command `latte-flow`. Every verb calls functions that can be imported on their own.

This package is not part of `latte_flow_hf`, and its verbs import that inside. Importing any module of it registers its
classes with transformers and diffusers, which takes seconds; help and usage errors need none of that.
"""

# Each module registers its verbs; `latte-flow --help` lists them in this order.
from . import generation, services, training, evaluation, reproduction, checkpoints  # noqa: I001
from .verbs import app


__all__ = ["app", "checkpoints", "evaluation", "generation", "reproduction", "services", "training"]
