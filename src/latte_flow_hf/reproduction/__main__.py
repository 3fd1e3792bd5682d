# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One run in a process of its own: `python -m latte_flow_hf.reproduction FOLDER RUN`, started by `reproduce`."""

import sys
from pathlib import Path

from .runs import run


run(Path(sys.argv[1]), sys.argv[2])
