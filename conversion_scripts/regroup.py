# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline of K experts -> another K.

The same as `latte-flow convert regroup`; `--help` tells the options.
"""

import typer

from latte_flow_hf.cli import convert_regroup


if __name__ == "__main__":
    typer.run(convert_regroup)
