# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' `ProcessorTesterMixin` on the embedded checkpoint's processor."""

import unittest
from pathlib import Path

from hf_suites import WholeTests
from hf_tests.transformers.test_processing_common import ProcessorTesterMixin

from latte_flow_hf import LatteFlowProcessor, tiny_checkpoint


class LatteFlowProcessorTest(WholeTests, ProcessorTesterMixin, unittest.TestCase):
    processor_class = LatteFlowProcessor
    model_id = str(Path(tiny_checkpoint()) / "processor")
    by_design = {}
