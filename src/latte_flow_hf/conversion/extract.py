# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The untouched backbone of a pipeline -> a stock transformers folder."""

import json
from pathlib import Path

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, apply_renamings
from transformers.modeling_utils import PreTrainedModel

from ..modeling.processing_latte_flow import LatteFlowProcessor
from .card import backbone_card
from .folders import MODEL, read_pipeline, saved
from .plan import Plan
from .streaming import module_tensors


def extract_backbone(source: str | Path) -> Plan:
    """Plan the backbone's folder: its tensors byte for byte under the names that it is published with.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if it is another kind of model, or its weights do not fit its configuration.
    """
    pipeline = read_pipeline(source)
    vlm = pipeline.model.vlm
    prefix = "vlm."
    original = _original_names([n.removeprefix(prefix) for n in pipeline.weights[MODEL] if n.startswith(prefix)], vlm)
    class_name = type(vlm).__name__
    vlm_config = pipeline.config.vlm_config
    vlm_config.architectures = [class_name]
    processor = LatteFlowProcessor.from_pretrained(pipeline.folder / "processor")
    processor.tokenizer.chat_template = processor.chat_template
    texts = {
        "README.md": backbone_card(pipeline.name, class_name),
        **saved(vlm_config.save_pretrained),
        **saved(processor.tokenizer.save_pretrained),
        **saved(processor.image_processor.save_pretrained),
    }
    # Without a name of ours in it, transformers takes the backbone's own processor class.
    tokenizer_config = json.loads(texts["tokenizer_config.json"])
    tokenizer_config.pop("processor_class", None)
    texts["tokenizer_config.json"] = json.dumps(tokenizer_config, indent=2).encode() + b"\n"
    if "model/generation_config.json" in pipeline.texts:
        texts["generation_config.json"] = pipeline.texts["model/generation_config.json"]
    tensors = {original[n.removeprefix(prefix)]: t for n, t in pipeline.weights[MODEL].items() if n.startswith(prefix)}

    def check(written: dict) -> str:
        module_tensors(written["model"], vlm, "the backbone as written")
        return f"names and shapes are those of {class_name}"

    return Plan(texts, {"model": tensors}, check)


def _original_names(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """The names that `save_pretrained` stores, by the module's own."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    back = [t.reverse_transform() for t in reversed(transforms) if not isinstance(t, PrefixChange)]
    return {name: apply_renamings(name, back) for name in names}
