# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The bound on the memory of a conversion."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_memory_at_the_size_of_qwen2_vl_2b(tmp_path):
    """Fails if the conversion takes more than its bound; about 15 GB of disk, 10 GB of memory and three minutes."""
    script = Path(__file__).parents[2] / "benchmarks" / "conversion_memory.py"
    result = subprocess.run([sys.executable, script, "--work-dir", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "peak" in result.stdout
