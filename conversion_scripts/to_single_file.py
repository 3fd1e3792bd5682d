# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline -> one safetensors file.

Same as `latte-flow convert to-single-file`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_to_single_file


if __name__ == "__main__":
    typer.run(convert_to_single_file)
