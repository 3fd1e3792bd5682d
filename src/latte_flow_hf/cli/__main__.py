# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`accelerate launch -m latte_flow_hf.cli train ...`"""

from latte_flow_cli import app


app()
