# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline with K experts -> a pipeline with another number of experts.

Same as `latte-flow convert regroup`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_regroup


if __name__ == "__main__":
    typer.run(convert_regroup)
