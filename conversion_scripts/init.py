# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A backbone and an autoencoder -> a new pipeline.

Same as `latte-flow convert init`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_init


if __name__ == "__main__":
    typer.run(convert_init)
