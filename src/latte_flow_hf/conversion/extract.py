# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline -> its unchanged backbone, a stock transformers folder."""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, apply_renamings
from transformers.modeling_utils import PreTrainedModel

from ..cards import backbone_card
from ..modeling.processing_latte_flow import STOCK_CLASS, LatteFlowProcessor
from .folders import MODEL, files_saved_by, read_pipeline
from .plan import Plan
from .streaming import module_tensors


def extract_backbone(source: str | Path) -> Plan:
    """Plan the backbone's folder: its tensors bit for bit, under the names that the backbone is published with.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if it holds another model, or its weights do not fit its configuration.
    """
    pipeline = read_pipeline(source)
    vlm = pipeline.model.vlm
    prefix = "vlm."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in pipeline.weights[MODEL].items()
        if name.startswith(prefix)
    }
    published = published_names(tensors, vlm)
    class_name = type(vlm).__name__
    vlm_config = pipeline.config.vlm_config
    vlm_config.architectures = [class_name]
    processor = LatteFlowProcessor.from_pretrained(pipeline.folder / "processor")
    small_files = {
        "README.md": backbone_card(pipeline.name, class_name),
        **files_saved_by(vlm_config.save_pretrained),
        **files_saved_by(processor.save_pretrained),
        # Also where the stock class looks for the settings of its video processor.
        **files_saved_by(processor.image_processor.save_pretrained),
    }
    for name in ("processor_config.json", "tokenizer_config.json"):
        content = {**json.loads(small_files[name]), "processor_class": processor.stock_class.__name__}
        for ours in (STOCK_CLASS, "background", "sanitize_control_tokens"):
            content.pop(ours, None)
        small_files[name] = json.dumps(content, indent=2).encode() + b"\n"
    if "model/generation_config.json" in pipeline.small_files:
        small_files["generation_config.json"] = pipeline.small_files["model/generation_config.json"]

    def check(written: dict) -> str:
        module_tensors(written["model"], vlm, "the written backbone")
        return f"names and shapes are those of {class_name}"

    return Plan(small_files, {"model": {published[name]: tensor for name, tensor in tensors.items()}}, check)


def published_names(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The names under which `save_pretrained` stores tensors, by the module's own names."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    back = [t.reverse_transform() for t in reversed(transforms) if not isinstance(t, PrefixChange)]
    return {name: apply_renamings(name, back) for name in names}
