# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler


GENERATE = """
import sys
import numpy as np
import torch
torch.set_num_threads(int(sys.argv[1]))

def generate(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe("a red circle", output_type="np", **arguments).images
"""

# A process in which the package is not installed.
WITHOUT_PACKAGE = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "latte_flow_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
try:
    import latte_flow_hf
    raise SystemExit("the package is there")
except ModuleNotFoundError:
    pass
"""


@pytest.fixture(scope="package")
def pipe(model, processor, vae):
    """Not to be changed."""
    pipe = LatteFlowPipeline(
        model, processor, vae, LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="package")
def saved(pipe, tmp_path_factory) -> Path:
    """The whole pipeline in a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("loading") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def generate():
    """The same call in every process."""
    scope: dict = {"__name__": "generate"}
    exec(GENERATE.replace("torch.set_num_threads(int(sys.argv[1]))", ""), scope)
    return scope["generate"]


@pytest.fixture(scope="package")
def expected(pipe, generate) -> np.ndarray:
    return generate(pipe)


@pytest.fixture(scope="package")
def run_child():
    """Run a script in a fresh process; `generate` is defined, and the arguments are in `sys.argv[2:]`."""

    def run(script: str, *arguments, package: bool = True, **environment) -> str:
        script = GENERATE + ("" if package else WITHOUT_PACKAGE) + script
        done = subprocess.run(
            [sys.executable, "-c", script, str(torch.get_num_threads()), *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run
