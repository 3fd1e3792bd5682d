# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tests that transformers' `PipelineTesterMixin` runs for the tasks of a model, on the embedded checkpoint.

The mixin itself loads its models from the hub; what it calls is called here.
"""

import os

import hf_suites  # noqa: F401
import pytest
import torch
from hf_tests.transformers.pipelines import test_pipelines_any_to_any as any_to_any
from hf_tests.transformers.pipelines import test_pipelines_image_text_to_text as image_text_to_text

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowProcessor, tiny_checkpoint
from latte_flow_hf.pipelines.any_to_any import AnyToAnyPipeline


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "task_tests",
    [
        image_text_to_text.ImageTextToTextPipelineTests,
        pytest.param(
            any_to_any.AnyToAnyPipelineTests,
            marks=pytest.mark.xfail(strict=True, reason="a part of a message with the type 'images' is refused"),
        ),
    ],
)
def test_task(task_tests, dtype, monkeypatch):
    # The class that `pipeline("any-to-any")` makes, which works without torchvision.
    monkeypatch.setattr(any_to_any, "AnyToAnyPipeline", AnyToAnyPipeline)
    monkeypatch.chdir(os.path.join(os.environ["HF_TESTS"], "transformers"))
    model = LatteFlowForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=getattr(torch, dtype)).eval()
    processor = LatteFlowProcessor.from_pretrained(tiny_checkpoint())
    processor.tokenizer.image_token = processor.image_token  # which the suite puts into its prompts
    tests = task_tests()
    pipe, examples = tests.get_test_pipeline(
        model, processor.tokenizer, processor=processor, image_processor=processor.image_processor, dtype=dtype
    )
    assert len(list(pipe((example for example in examples * 5), batch_size=4))) == 5 * len(examples)
    tests.run_pipeline_test(pipe, examples)
