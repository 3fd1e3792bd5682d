# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Our pipelines in the tables of `AutoPipelineForText2Image` and the like.

The module with these tables imports all pipelines of diffusers, which takes a second and logs warnings about other
models. It is therefore not imported here: our pipelines are added when somebody else imports it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .pipeline_latte_flow import LatteFlowPipeline
from .pipeline_latte_flow_img2img import LatteFlowImg2ImgPipeline
from .pipeline_latte_flow_inpaint import LatteFlowInpaintPipeline


_MODULE = "diffusers.pipelines.auto_pipeline"


def register_auto_pipelines() -> None:
    """Add our pipelines to the tables, now or when their module is imported."""
    if _MODULE in sys.modules:
        _add_pipelines(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _AddsPipelinesOnImport())


def _add_pipelines(module: Any) -> None:
    # The pipelines of one model have the same key.
    module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["latte-flow"] = LatteFlowPipeline
    module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["latte-flow"] = LatteFlowImg2ImgPipeline
    module.AUTO_INPAINT_PIPELINES_MAPPING["latte-flow"] = LatteFlowInpaintPipeline


class _AddsPipelinesOnImport(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        exec_module = spec.loader.exec_module

        def exec_and_add(module: ModuleType) -> None:
            exec_module(module)
            _add_pipelines(module)

        spec.loader.exec_module = exec_and_add  # type: ignore[method-assign]
        return spec
