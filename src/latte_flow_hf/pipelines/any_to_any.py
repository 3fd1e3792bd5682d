# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' pipeline for the task `any-to-any`, which answers and generates images, without torchvision."""

from typing import Any

from transformers import AnyToAnyPipeline as TransformersAnyToAnyPipeline
from transformers import Pipeline

from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration


class AnyToAnyPipeline(TransformersAnyToAnyPipeline):
    """Same as transformers' `AnyToAnyPipeline`, which demands torchvision for models with image input; our processor
    works without. Nothing changes for other models."""

    def __init__(self, *args: Any, **kwargs: Any):
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, LatteFlowForConditionalGeneration):
            Pipeline.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
