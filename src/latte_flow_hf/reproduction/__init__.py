# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The paper's comparisons on the tiny world: trained, measured and judged by one command."""

from .reproduce import reproduce
from .settings import Reproduction


__all__ = ["Reproduction", "reproduce"]
