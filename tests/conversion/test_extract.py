# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""An extracted backbone is the one that the pipeline was made from."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from latte_flow_hf import LatteFlowProcessor
from latte_flow_hf.conversion import extract_backbone, initialize


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def extracted(backbone_folder, vae_folder, tmp_path):
    initialize(backbone_folder, vae_folder, 2).write(tmp_path / "pipeline")
    extract_backbone(tmp_path / "pipeline").write(tmp_path / "backbone", "60KB")
    return tmp_path / "backbone"


def test_names_and_weights_are_unchanged(extracted, backbone_folder):
    before, after = stored(backbone_folder), stored(extracted)
    assert before.keys() == after.keys() and "model.layers.0.mlp.up_proj.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(extracted.glob("*.safetensors"))) > 2


def test_the_stock_class_loads_it(extracted, backbone, encode, picture):
    loaded, info = Qwen2VLForConditionalGeneration.from_pretrained(extracted, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.generation_config.eos_token_id == backbone.generation_config.eos_token_id
    inputs = encode("what is this?", image=picture)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, backbone(**inputs).logits)


def test_the_processor_is_the_stock_one(extracted, processor, picture):
    """Only the card names this package; `AutoProcessor` itself needs torchvision for Qwen2-VL's videos."""
    for file in extracted.glob("*.json"):
        assert "latte" not in file.read_text().lower(), file
    tokenizer, images = AutoTokenizer.from_pretrained(extracted), AutoImageProcessor.from_pretrained(extracted)
    assert tokenizer("a red circle").input_ids == processor.tokenizer("a red circle").input_ids
    assert tokenizer.chat_template == processor.chat_template
    pixels = [p(picture, return_tensors="pt").pixel_values for p in (images, processor.image_processor)]
    assert torch.equal(*pixels)
    message = [[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]]
    encoded = [p.encode_conversations(message) for p in (LatteFlowProcessor.from_pretrained(extracted), processor)]
    assert torch.equal(encoded[0].input_ids, encoded[1].input_ids)
