# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""LaTtE-Flow (arXiv 2506.06952) for transformers and diffusers.

Importing this package registers its classes with the Auto classes and with diffusers. The imports are eager because
diffusers refuses to import a module that a checkpoint names.
"""

# ruff: noqa: E402
import logging


# transformers imports torchao where it is installed; it then warns, each time, of kernels for other versions of torch.
logging.getLogger("torchao").setLevel(logging.ERROR)

import diffusers

# The base classes stand here too: for a library it knows, diffusers looks for them beside the class that it loads.
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin  # noqa: F401
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,  # noqa: F401
    ProcessorMixin,  # noqa: F401
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .checkpoints import tiny_checkpoint
from .modeling.configuration_latte_flow import LatteFlowConfig
from .modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from .modeling.processing_latte_flow import LatteFlowProcessor
from .pipelines.auto_pipelines import register_auto_pipelines
from .pipelines.modular_latte_flow import MODEL_NAME, LatteFlowBlocks, LatteFlowModularPipeline
from .pipelines.pipeline_latte_flow import LatteFlowPipeline
from .pipelines.pipeline_latte_flow_img2img import LatteFlowImg2ImgPipeline
from .pipelines.pipeline_latte_flow_inpaint import LatteFlowInpaintPipeline
from .pipelines.pipeline_output import LatteFlowPipelineOutput
from .schedulers.scheduling_latte_flow import LatteFlowScheduler
from .version import __version__


__all__ = [
    "LatteFlowConfig",
    "LatteFlowForConditionalGeneration",
    "LatteFlowImg2ImgPipeline",
    "LatteFlowInpaintPipeline",
    "LatteFlowModularPipeline",
    "LatteFlowPipeline",
    "LatteFlowPipelineOutput",
    "LatteFlowProcessor",
    "LatteFlowScheduler",
    "__version__",
    "tiny_checkpoint",
]

AutoConfig.register("latte_flow", LatteFlowConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(LatteFlowConfig, LatteFlowForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LatteFlowConfig, LatteFlowProcessor, exist_ok=True)
# Pipelines and `transformers serve` look types of models up by name.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names["latte_flow"] = LatteFlowForConditionalGeneration.__name__
# transformers' own demands torchvision of every model that takes images.
PIPELINE_REGISTRY.supported_tasks["any-to-any"]["impl"] = "latte_flow_hf.pipelines.any_to_any.AnyToAnyPipeline"
LatteFlowForConditionalGeneration.pipeline_class = LatteFlowPipeline
# `DiffusionPipeline.from_pretrained` looks a pipeline's class up as an attribute of diffusers.
for pipeline_class in (LatteFlowPipeline, LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline):
    setattr(diffusers, pipeline_class.__name__, pipeline_class)
register_auto_pipelines()
# So are modular pipelines and their blocks, by the name that all pipelines of one model share.
diffusers.LatteFlowModularPipeline, diffusers.LatteFlowBlocks = LatteFlowModularPipeline, LatteFlowBlocks
MODULAR_PIPELINE_MAPPING[MODEL_NAME] = lambda config=None: LatteFlowModularPipeline.__name__
# Components from the hub are rejected unless their library is known.
LOADABLE_CLASSES.setdefault("latte_flow_hf", {})
