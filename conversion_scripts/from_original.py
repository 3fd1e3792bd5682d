# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A flat training state dict -> a pipeline.

Same as `latte-flow convert from-original`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_from_original


if __name__ == "__main__":
    typer.run(convert_from_original)
