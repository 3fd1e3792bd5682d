# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline -> a flat training state dict.

Same as `latte-flow convert to-original`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_to_original


if __name__ == "__main__":
    typer.run(convert_to_original)
