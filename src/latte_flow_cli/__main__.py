# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`python -m latte_flow_cli`, same as `latte-flow`."""

from . import app


app()
