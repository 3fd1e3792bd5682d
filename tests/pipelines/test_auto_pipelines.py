# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""diffusers' `AutoPipelineFor...` from every pipeline and every saved folder."""

import importlib
import json
import sys

import pytest
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, LatteFlowPipeline
from latte_flow_hf.pipelines.auto_pipelines import register_auto_pipelines


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


def test_pipelines_are_added_when_the_tables_are_imported(monkeypatch):
    name = "diffusers.pipelines.auto_pipeline"
    before = importlib.import_module(name)
    assert before.AUTO_INPAINT_PIPELINES_MAPPING["latte-flow"] is LatteFlowInpaintPipeline
    monkeypatch.delitem(sys.modules, name)
    finders = list(sys.meta_path)
    register_auto_pipelines()
    assert len(sys.meta_path) == len(finders) + 1
    tables = importlib.import_module(name)
    assert tables is not before and tables.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["latte-flow"] is LatteFlowImg2ImgPipeline
    assert sys.meta_path == finders
    # And at once if they are imported already.
    del tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["latte-flow"]
    register_auto_pipelines()
    assert tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["latte-flow"] is LatteFlowPipeline
    assert sys.meta_path == finders
