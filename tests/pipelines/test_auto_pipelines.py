# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""diffusers' `AutoPipelineFor...` from every pipeline and every saved folder."""

import json
import os
import subprocess
import sys

import pytest
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, LatteFlowPipeline


CLASSES = {
    AutoPipelineForText2Image: LatteFlowPipeline,
    AutoPipelineForImage2Image: LatteFlowImg2ImgPipeline,
    AutoPipelineForInpainting: LatteFlowInpaintPipeline,
}


@pytest.mark.parametrize("origin", CLASSES.values())
def test_from_pipe_shares_components(pipe, origin):
    start = origin.from_pipe(pipe)
    for auto, expected in CLASSES.items():
        for made in (auto.from_pipe(start), expected.from_pipe(start)):
            assert type(made) is expected
            assert {name: id(part) for name, part in made.components.items()} == {
                name: id(part) for name, part in pipe.components.items()
            }


@pytest.mark.parametrize("origin", CLASSES.values())
def test_from_pretrained_of_every_folder(pipe, origin, tmp_path):
    origin.from_pipe(pipe).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == origin.__name__
    assert index["model"][1] == "LatteFlowForConditionalGeneration" and index["vae"][1] == "AutoencoderDC"
    for auto, expected in CLASSES.items():
        assert type(auto.from_pretrained(tmp_path)) is expected


def test_the_import_order_does_not_matter():
    """The tables of diffusers are not imported with the package: that takes long, and warns of other models."""
    script = """
import sys
import latte_flow_hf
assert "diffusers.pipelines.auto_pipeline" not in sys.modules
from diffusers import AutoPipelineForInpainting
from diffusers.pipelines import auto_pipeline as tables
assert tables.AUTO_INPAINT_PIPELINES_MAPPING["latte-flow"] is latte_flow_hf.LatteFlowInpaintPipeline
assert type(tables.__spec__.loader).__name__ == "SourceFileLoader"
assert not any("latte_flow_hf" in type(finder).__module__ for finder in sys.meta_path)
for name in [name for name in sys.modules if name.startswith("latte_flow_hf")]:
    del sys.modules[name]
del tables.AUTO_INPAINT_PIPELINES_MAPPING["latte-flow"]
import latte_flow_hf
assert tables.AUTO_INPAINT_PIPELINES_MAPPING["latte-flow"] is latte_flow_hf.LatteFlowInpaintPipeline
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
