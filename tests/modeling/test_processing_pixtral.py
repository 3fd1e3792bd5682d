# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tokens of an image in rows; where torchvision is installed, those of transformers' class."""

import pytest
from PIL import Image
from processors import tiny_processor
from transformers.utils import is_torchvision_available

from latte_flow_hf.modeling.processing_latte_flow import adapter_of
from latte_flow_hf.modeling.processing_pixtral import PixtralProcessor


@pytest.fixture(scope="module")
def processor():
    adapted = tiny_processor("mistral3")
    return PixtralProcessor(adapted.image_processor, adapted.tokenizer, 8, 2, adapted.chat_template)


@pytest.mark.parametrize(("size", "rows"), [((32, 32), (2, 2)), ((32, 16), (1, 2)), ((16, 32), (2, 1))])
def test_rows_of_tokens(processor, size, rows):
    image = Image.new("RGB", size)
    inputs = processor(text="a [IMG] b", images=image, return_tensors="pt", return_mm_token_type_ids=True)
    row = "[IMG]" * rows[1]
    expected = "[IMG_BREAK]".join([row] * rows[0]) + "[IMG_END]"
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == f"a {expected} b"
    assert inputs["image_sizes"].tolist() == [[size[1], size[0]]]
    assert int(inputs["mm_token_type_ids"].sum()) == rows[0] * (rows[1] + 1)
    assert "image_sizes" in processor.model_input_names


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers' own class needs torchvision")
def test_equals_the_stock_class(processor):
    stock_class = adapter_of("PixtralProcessor").stock_class
    assert stock_class is not PixtralProcessor
    stock = stock_class(processor.image_processor, processor.tokenizer, 8, 2, processor.chat_template)
    images = [Image.new("RGB", size) for size in ((32, 32), (32, 16))]
    found, expected = (one(text="[IMG] a [IMG]", images=images, return_tensors="pt") for one in (processor, stock))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
