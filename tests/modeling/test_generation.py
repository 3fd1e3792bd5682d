# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Text through `generate` and `chat`."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    GenerationConfig,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from latte_flow_hf import LatteFlowForConditionalGeneration


class Listener(TextStreamer):
    """A stock streamer that keeps what it would print."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


def say(model, processor, inputs, **how) -> str:
    tokens = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_chat_with_a_string(model, processor, encode, picture):
    for image in (None, picture):
        answer = model.chat(processor, "what is this?", images=image, max_new_tokens=6)
        expected = say(model, processor, encode("what is this?", image=image), max_new_tokens=6)
        assert answer == expected and answer


def test_chat_over_several_turns(model, processor, picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "what colour is it?"},
    ]
    given = copy.deepcopy(messages)
    answer = model.chat(processor, messages, max_new_tokens=6)
    inputs = processor(
        text=[
            processor.apply_chat_template(processor.conversation(messages), add_generation_prompt=True, tokenize=False)
        ],
        images=[picture],
        return_tensors="pt",
    )
    assert answer == say(model, processor, inputs, max_new_tokens=6)
    assert answer != model.chat(processor, messages[:1], max_new_tokens=6)
    # The conversation is the caller's.
    assert [m["role"] for m in messages] == [m["role"] for m in given] and messages[1] == given[1]


def test_chat_streams_what_it_answers(model, processor, picture):
    listener = Listener(processor.tokenizer)
    answer = model.chat(processor, "what is this?", images=[picture], streamer=listener, max_new_tokens=8)
    assert "".join(listener.pieces).strip() == answer
    assert len([piece for piece in listener.pieces if piece]) > 1


def test_chat_answers_at_most_256_tokens_unless_told(make_model, processor):
    model = make_model()
    model.generation_config.eos_token_id = None
    counts = []
    model.vlm.register_forward_hook(lambda *_: counts.append(1))
    model.chat(processor, "what is this?")
    assert len(counts) == 256


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.int64), 7, {"no": "picture"}])
def test_chat_refuses_what_is_no_picture(model, processor, image):
    with pytest.raises(ValueError, match=f"an image must be .*{type(image).__name__}"):
        model.chat(processor, "what is this?", images=image)


def test_chat_refuses_a_file_that_is_no_picture(model, processor, text_file):
    with pytest.raises(ValueError, match=f"image .*{re.escape(str(text_file))}.* cannot be read"):
        model.chat(processor, "what is this?", images=str(text_file))


@pytest.mark.parametrize(
    ("call", "config", "checkpoint", "expected"),
    [
        ({}, None, {}, 256),
        ({}, None, {"max_new_tokens": 7}, 7),
        ({}, {}, {"max_new_tokens": 7}, 7),
        ({}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, 5),
        ({"max_new_tokens": 3}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, 3),
        ({"max_new_tokens": np.int64(3)}, None, {}, 3),
        ({"max_length": 40}, {"max_new_tokens": 5}, {"max_new_tokens": 7}, "up to 40"),
        ({}, {"max_length": 40}, {"max_new_tokens": 7}, "up to 40"),
    ],
    ids=range(8),
)
def test_chat_takes_its_length_from_the_nearest_config(make_model, processor, call, config, checkpoint, expected):
    model = make_model()
    model.generation_config.update(eos_token_id=None, **checkpoint)
    counts = []
    model.vlm.register_forward_hook(lambda *_: counts.append(1))
    generation_config = None if config is None else GenerationConfig(**config)
    model.chat(processor, "what is this?", generation_config=generation_config, **call)
    if expected == "up to 40":
        expected = 40 - processor.encode_conversations([processor.conversation("what is this?")])["input_ids"].shape[1]
    assert len(counts) == expected


def test_a_given_generation_config_is_completed_by_the_checkpoint_s(make_model, encode):
    model = make_model()
    inputs = encode("what is this?")
    tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(tokens[0])
    model.vlm.generation_config.eos_token_id = None
    given = GenerationConfig(max_new_tokens=8)
    assert model.generate(**inputs, generation_config=given).shape[1] == inputs["input_ids"].shape[1] + 1
    assert given.eos_token_id is None


def test_chat_answers_with_every_form_of_output(model, processor, picture):
    question = "what is this?"
    expected = model.chat(processor, question, picture, max_new_tokens=6)
    assert model.chat(processor, question, picture, max_new_tokens=6, return_dict_in_generate=True) == expected
    given = GenerationConfig(max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert model.chat(processor, question, picture, generation_config=given) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"generation_mode": "image"}, "generation_mode must be 'text' in chat, got 'image'; use generate for images"),
        ({"generation_config": {"max_new_tokens": 2}}, "generation_config must be a GenerationConfig, got {'max_new"),
    ],
)
def test_chat_refuses_what_it_would_ignore(model, processor, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        model.chat(processor, "what is this?", **arguments)


def test_numbers_of_numpy_are_numbers(model, processor, encode):
    arguments = {"max_new_tokens": 4, "do_sample": True, "temperature": 0.5, "top_k": 3}
    of_numpy = {
        "max_new_tokens": np.int64(4),
        "do_sample": np.bool_(True),
        "temperature": np.float32(0.5),
        "top_k": np.int32(3),
    }
    answers = []
    for given in (arguments, of_numpy):
        torch.manual_seed(0)
        answers.append(model.generate(**encode("what is this?"), **given))
    assert torch.equal(*answers)


@pytest.mark.parametrize("several", [{"num_return_sequences": 2}, {"generation_config": 2}])
def test_chat_refuses_several_answers(model, processor, several):
    if "generation_config" in several:
        several = {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)}
    with pytest.raises(ValueError, match="num_return_sequences must be 1 in chat, got 2"):
        model.chat(processor, "what is this?", **several)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_chat_refuses_a_backbone_that_overflows(make_model, processor, value, do_sample):
    model = make_model()
    with torch.no_grad():
        model.vlm.get_decoder().norm.weight.fill_(value)
    with pytest.raises(ValueError, match=r"the backbone's logits are not finite in dtype torch\.float32"):
        model.chat(processor, "what is this?", do_sample=do_sample)


def test_forbidden_tokens_are_no_overflow(model, processor):
    plain = model.chat(processor, "what is this?", max_new_tokens=4)
    forbidden = processor.tokenizer(plain)["input_ids"]
    assert model.chat(processor, "what is this?", max_new_tokens=4, suppress_tokens=forbidden) != plain


@pytest.fixture
def warned(caplog):
    """What has been logged; what is logged once is logged again in each test."""
    transformers_logging.warning_once.cache_clear()
    return caplog


def test_a_prompt_beyond_the_positions_is_warned_of_once(make_model, processor, encode, picture, warned):
    model = make_model()
    model.config.text_config.max_position_embeddings = 40
    long = "a red circle " * 20
    model.encode_context(**encode("a red circle"))
    # 16 tokens of an image take 4 positions.
    inputs = encode("what is this?", image=picture)
    assert inputs["input_ids"].shape[1] > 40
    model.encode_context(**inputs)
    assert warned.messages == []
    model.encode_context(**encode(long))
    model.encode_context(**encode("a red circle", long))
    model.chat(processor, long, max_new_tokens=1)
    assert ["more tokens than the 40 positions" in message for message in warned.messages].count(True) == 1


def test_unknown_words_are_warned_of_if_the_checkpoint_tells_its_own(make_model, processor, warned):
    model = make_model()
    model.chat(processor, "what is a dog?", max_new_tokens=1)
    assert warned.messages == []
    model.config.trained_words = ["a", "circle", "is", "red", "what"]
    model.chat(processor, "What is a red, red circle?", max_new_tokens=1)
    assert warned.messages == []
    model.chat(processor, [{"role": "user", "content": "What is a Dog near a cat?"}], max_new_tokens=1)
    (message,) = warned.messages
    assert message.startswith(
        "The model never learned the words ['dog', 'near', 'cat']: expect a wrong answer or image."
    )
    assert message.endswith("It knows a, circle, is, red, what.")


def test_an_adapter_may_have_taught_other_words(make_model, processor, warned):
    model = make_model()
    model.config.trained_words = ["circle"]
    model.add_adapter(LoraConfig(target_modules=r"tower\..*q_proj"))
    model.chat(processor, "a dog", max_new_tokens=1)
    assert not any("never learned" in message for message in warned.messages)


def test_forward_names_what_the_processor_returns(processor):
    # The Trainer removes the inputs that the signature does not name.
    assert set(processor.model_input_names) <= set(
        inspect.signature(LatteFlowForConditionalGeneration.forward).parameters
    )


def test_image_features_are_the_backbone_s(model, backbone, encode, picture):
    inputs = encode("what is this?", image=picture)
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    found, expected = (one.get_image_features(**vision).pooler_output for one in (model, backbone))
    assert len(found) == 1 and torch.equal(found[0], expected[0])
    as_tuple = model.get_image_features(**vision, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1][0], expected[0])


def test_image_features_follow_the_configuration(make_model, encode, picture):
    model = make_model()
    model.config.return_dict = False
    inputs = encode("what is this?", image=picture)
    assert isinstance(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]), tuple)


def test_chat_refuses_nothing_to_say(model, processor):
    with pytest.raises(ValueError, match=r"messages must be a string or a non-empty list of messages, got \[\]"):
        model.chat(processor, [])
