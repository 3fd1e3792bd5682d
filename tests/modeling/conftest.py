# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
import pytest

from latte_flow_hf.modeling.context import LatteFlowContext


@pytest.fixture(scope="module")
def context(model, encode) -> LatteFlowContext:
    """Two prompts of different lengths, hence padded."""
    return model.encode_context(**encode("a red circle", "a small blue square above a handwritten seven"))


@pytest.fixture
def trainable(make_model):
    return make_model().train()
