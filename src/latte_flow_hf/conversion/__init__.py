# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Conversion of checkpoints. Each function returns a [`Plan`], with a dry run `describe()` and `write(output)`."""

from .extract import extract_backbone
from .initialize import initialize
from .original import KeyTable, from_original, to_original
from .plan import Plan
from .regroup import regroup
from .single_file import from_single_file, to_single_file


__all__ = [
    "KeyTable",
    "Plan",
    "extract_backbone",
    "from_original",
    "from_single_file",
    "initialize",
    "regroup",
    "to_original",
    "to_single_file",
]
