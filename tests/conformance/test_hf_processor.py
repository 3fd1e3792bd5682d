# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' `ProcessorTesterMixin` on the embedded checkpoint's processor."""

import unittest
from pathlib import Path

import pytest
from hf_suites import WholeTests
from hf_tests.transformers import test_processing_common as suite

from latte_flow_hf import LatteFlowProcessor, tiny_checkpoint


class LatteFlowProcessorTest(WholeTests, suite.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LatteFlowProcessor
    model_id = str(Path(tiny_checkpoint()) / "processor")
    by_design = {
        "test_init_arguments_not_in_processor_kwargs": "sanitize_control_tokens is saved, and a call may change it",
    }

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = processor.image_token  # and no token of videos, which are left out

    @pytest.fixture(autouse=True)
    def local_picture(self, picture, tmp_path, monkeypatch):
        """The suite would download its picture."""
        picture.save(tmp_path / "picture.png")
        path = str(tmp_path / "picture.png")
        monkeypatch.setattr(suite, "url_to_local_path", lambda url: path)
        monkeypatch.setitem(suite.MODALITY_INPUT_DATA, "images", [path, path])
