# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline -> its unchanged backbone, a stock transformers folder.

Same as `latte-flow convert extract-backbone`; see `--help` for the options.
"""

import typer

from latte_flow_cli.checkpoints import convert_extract_backbone


if __name__ == "__main__":
    typer.run(convert_extract_backbone)
