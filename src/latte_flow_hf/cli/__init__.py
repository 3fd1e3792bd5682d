# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The command `latte-flow` as a module of the package. It is defined outside, see `latte_flow_cli`."""

from latte_flow_cli import app


__all__ = ["app"]
