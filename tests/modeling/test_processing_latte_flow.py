# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Conversations in all their forms, pictures from everywhere, and what is no picture; the processor is a real one."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from latte_flow_hf import LatteFlowProcessor
from latte_flow_hf.modeling.processing_latte_flow import load_rgb_image


QUESTION = "what is this?"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def same_inputs(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Conversations.


def test_string_is_a_user_s_turn(processor):
    assert processor.conversation(QUESTION) == [{"role": "user", "content": [text(QUESTION)]}]
    assert processor.conversation("") == [{"role": "user", "content": [text("")]}]


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_go_before_the_words(processor, picture, count):
    (message,) = processor.conversation(QUESTION, [picture] * count)
    assert [part["type"] for part in message["content"]] == ["image"] * count + ["text"]


def test_one_picture_needs_no_list(processor, picture):
    one, listed = (processor.conversation(QUESTION, given) for given in (picture, [picture]))
    assert np.array_equal(one[0]["content"][0]["image"], listed[0]["content"][0]["image"])
    assert processor.conversation(QUESTION, []) == processor.conversation(QUESTION)


def test_messages_keep_their_turns_and_the_caller_s_own(processor, picture):
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "image", "image": picture}, text(QUESTION)]},
        {"role": "assistant", "content": [text("a circle")]},
        {"role": "user", "content": "what colour?"},
    ]
    given = copy.copy(messages)
    found = processor.conversation(messages)
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"]
    assert found[0]["content"] == [text("be short")] and found[3]["content"] == [text("what colour?")]
    assert found[2] == messages[2]
    assert messages == given and messages[0]["content"] == "be short"
    assert processor.conversation(tuple(messages))[1:3] == found[1:3]


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_picture_of_a_part_comes_under_each_name_of_transformers(processor, picture, tmp_path, key):
    path = tmp_path / "picture.png"
    picture.save(path)
    (message,) = processor.conversation([{"role": "user", "content": [{"type": "image", key: str(path)}]}])
    assert np.array_equal(message["content"][0]["image"], picture)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a string or a non-empty list of messages, got []."),
        (None, "messages must be a string or a non-empty list of messages, got None."),
        (7, "messages must be a string or a non-empty list of messages, got 7."),
        ({"role": "user", "content": "x"}, "messages must be a string or a non-empty list of messages, got {"),
        (["a red circle"], "a message must be a dict with `role` and `content`, got 'a red circle'."),
        ([{"role": "user"}], "a message must be a dict with `role` and `content`, got {'role': 'user'}."),
        ([{"content": "x"}], "a message must be a dict with `role` and `content`, got {'content': 'x'}."),
        (
            [{"role": "user", "content": None}],
            "the content of a message must be a string or a list of parts, got None.",
        ),
        (
            [{"role": "user", "content": ["x"]}],
            "the content of a message must be a string or a list of parts, got ['x'].",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "a part of a message must be text or an image, got {'type': 'text'}",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            "a part of a message must be text or an image, got",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}],
            "a part of a message must be text or an image, got",
        ),
        ([{"role": "user", "content": [{}]}], "a part of a message must be text or an image, got {}"),
        ([{"role": "user", "content": [{"type": "image"}]}], "an image must be a PIL image"),
        ([{"role": "user", "content": [{"type": "image", "image": None}]}], "got NoneType"),
    ],
)
def test_conversation_refuses(processor, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor.conversation(messages)


def test_images_go_with_a_string_only(processor, picture):
    with pytest.raises(ValueError, match="images can only be given with a string"):
        processor.conversation([{"role": "user", "content": QUESTION}], [picture])


# Pictures.


def test_picture_from_everywhere_is_the_same(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    for source in (picture, path, str(path), array, torch.from_numpy(array.copy())):
        found = load_rgb_image(source)
        assert isinstance(found, Image.Image) and found.mode == "RGB"
        assert np.array_equal(found, array)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_picture_of_another_mode_becomes_rgb(picture, tmp_path, mode):
    other = picture.convert(mode)
    path = tmp_path / "picture.png"
    other.save(path)
    for source in (other, path):
        assert np.array_equal(load_rgb_image(source), other.convert("RGB"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, "NoneType"),
        (7, "int"),
        (b"bytes", "bytes"),
        ({"a": 1}, "dict"),
        (np.zeros((8, 8, 3)), "ndarray of float64, (8, 8, 3)"),
        (np.zeros((8, 8, 3), np.int64), "ndarray of int64, (8, 8, 3)"),
        (np.zeros((8, 8), np.uint8), "ndarray of uint8, (8, 8)"),
        (np.zeros((8, 8, 4), np.uint8), "ndarray of uint8, (8, 8, 4)"),
        (np.zeros((3, 8, 8), np.uint8), "ndarray of uint8, (3, 8, 8)"),
        (torch.zeros(8, 8, 3), "Tensor of float32, (8, 8, 3)"),
        (torch.zeros(8, 8, 3, dtype=torch.bfloat16), "Tensor of"),
        (torch.zeros(8, 8, 3, requires_grad=True), "Tensor of"),
        (np.zeros((0, 0, 3), np.uint8), "ndarray of uint8, (0, 0, 3)"),
    ],
    ids=range(13),
)
def test_what_is_no_picture_is_refused(source, found):
    expected = f"an image must be a PIL image, a path, a URL, or uint8 of shape (height, width, 3), got {found}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_rgb_image(source)


@pytest.mark.parametrize("as_type", [str, Path])
def test_file_that_is_no_picture_is_refused(text_file, as_type):
    with pytest.raises(ValueError, match=re.escape(f"image {str(text_file)!r} cannot be read")):
        load_rgb_image(as_type(text_file))


def test_truncated_file_is_refused(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=re.escape(f"image {str(path)!r} cannot be read")):
        load_rgb_image(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_path_without_a_picture_is_refused(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "missing.png"
    with pytest.raises(ValueError, match=re.escape(f"image {str(path)!r} cannot be read")):
        load_rgb_image(path)


# Encoding.


def test_prompts_end_where_the_answer_begins(processor):
    inputs = processor.encode_conversations([processor.conversation(QUESTION)])
    words = processor.tokenizer.decode(inputs["input_ids"][0])
    assert words.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    assert inputs["attention_mask"].all() and not inputs["mm_token_type_ids"].any()


def test_batches_are_padded_on_the_left(processor):
    prompts = ["a cross", "a small blue square above a handwritten seven"]
    alone = [processor.encode_conversations([processor.conversation(p)]) for p in prompts]
    batch = processor.encode_conversations([processor.conversation(p) for p in prompts])
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert batch["input_ids"].shape == (2, max(lengths)) and lengths[0] < lengths[1]
    for row, (one, length) in enumerate(zip(alone, lengths)):
        assert torch.equal(batch["input_ids"][row, -length:], one["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (max(lengths) - length) + [1] * length


@pytest.mark.parametrize("count", [1, 2])
def test_a_token_for_each_merged_patch(processor, picture, count):
    inputs = processor.encode_conversations([processor.conversation(QUESTION, [picture] * count)])
    # 64 pixels / 8 a patch / 2 merged = 4 a side, whatever the model does later.
    is_picture = inputs["input_ids"] == processor.image_token_id
    assert is_picture.sum() == 16 * count
    assert torch.equal(inputs["mm_token_type_ids"] == 1, is_picture)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * count
    assert inputs["pixel_values"].shape[0] == 64 * count


def test_pictures_of_a_batch_keep_their_rows(processor, picture):
    conversations = [processor.conversation(QUESTION, images) for images in (None, picture, [picture, picture])]
    inputs = processor.encode_conversations(conversations)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 16, 32]
    assert inputs["image_grid_thw"].shape == (3, 3)


def test_pixels_are_the_image_processor_s(processor, picture):
    inputs = processor.encode_conversations([processor.conversation(QUESTION, picture)])
    expected = processor.image_processor([picture], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_names_of_the_inputs(processor, picture):
    inputs = processor.encode_conversations([processor.conversation(QUESTION, picture)])
    assert set(inputs) <= set(processor.model_input_names)
    assert {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"} == set(inputs)


# Saving and loading.


def test_save_and_load(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    conversation = processor.conversation(QUESTION, picture)
    expected = processor.encode_conversations([conversation])
    for loaded in (LatteFlowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is LatteFlowProcessor
        assert loaded.chat_template == processor.chat_template
        assert same_inputs(loaded.encode_conversations([conversation]), expected)


def test_template_of_the_tokenizer_serves_if_none_is_given(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    made = LatteFlowProcessor(processor.image_processor, tokenizer)
    conversation = processor.conversation(QUESTION)
    assert same_inputs(made.encode_conversations([conversation]), processor.encode_conversations([conversation]))
