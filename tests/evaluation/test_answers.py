"""An answerer gives what the stock class gives, for a pipeline and for its extracted backbone."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CLOSE
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from latte_flow_hf.evaluation.answers import Answerer, generation_arguments


@pytest.fixture(scope="module")
def stock_folder(backbone, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(pipeline) -> Answerer:
    return Answerer(pipeline, max_new_tokens=8)


@pytest.fixture(scope="module")
def stock(stock_folder) -> Answerer:
    answerer = Answerer(stock_folder, max_new_tokens=8)
    assert type(answerer.model) is Qwen2VLForConditionalGeneration
    return answerer


def user(*parts) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture
def questions(picture) -> list[list[dict]]:
    """Of different lengths; without an image, with one, with two among the words."""
    turned = picture.rotate(90)
    return [user("what is this?"), user(picture, "which digit is this?"), user("is", picture, "left of", turned, "?")]


def test_answers_are_those_of_the_stock_backbone(ours, stock, questions, model, processor):
    answers = [it.answer([it.conversation(question) for question in questions]) for it in (ours, stock)]
    assert answers[0] == answers[1] and len(set(answers[0])) == 3
    # Each alone, through another way in.
    assert answers[0][1] == model.chat(processor, questions[1], do_sample=False, max_new_tokens=8)


def test_losses_are_those_of_labels(ours, stock, questions, backbone, processor):
    answers = ["yes", "a red circle", "no"]
    conversations = [ours.conversation(question) for question in questions]
    batch = ours.losses(conversations, answers)
    assert batch == stock.losses([stock.conversation(question) for question in questions], answers)
    for (loss, is_greedy), conversation, answer in zip(batch, conversations, answers):
        inputs = processor.encode_conversations([conversation])
        tokens = processor.tokenizer(answer, return_tensors="pt").input_ids
        num_prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, tokens.shape[1]))
        labels = inputs["input_ids"].clone()
        labels[:, :num_prompt] = -100
        with torch.no_grad():
            output = backbone(**inputs, labels=labels)
        torch.testing.assert_close(torch.tensor(loss), output.loss, **CLOSE)
        assert is_greedy == torch.equal(output.logits[:, num_prompt - 1 : -1].argmax(-1), tokens)


def test_the_most_likely_answer_is_greedy(ours, questions):
    conversation = ours.conversation(questions[1])
    inputs = ours.processor.encode_conversations([conversation])
    with torch.no_grad():
        ranked = ours.model(**inputs).logits[0, -1].argsort(descending=True)
    tokenizer = ours.processor.tokenizer
    words = [tokenizer.decode(token) for token in ranked]
    single = [word for word in words if tokenizer(word).input_ids == [tokenizer.convert_tokens_to_ids(word)]]
    first, last = ours.losses([conversation] * 2, [single[0], single[-1]])
    assert first[1] == (single[0] == words[0]) and not last[1] and first[0] < last[0]


def test_an_answer_ends_before_the_first_stop(ours, questions):
    conversation = ours.conversation(questions[1])
    (whole,) = ours.answer([conversation])
    stop = whole[len(whole) // 2]
    assert ours.answer([conversation], {"until": [stop, "nowhere in it"]}) == [whole.split(stop)[0].strip()]
    assert ours.answer([conversation], {"until": []}) == [whole]
    (short,) = ours.answer([conversation], {"max_new_tokens": 2})
    assert whole.startswith(short) and len(short) < len(whole)


def test_the_system_prompt_stands_first(stock, stock_folder, questions):
    answerer = Answerer(stock_folder, system_prompt="say no.")
    conversation = answerer.conversation(questions[0])
    assert [message["role"] for message in conversation] == ["system", "user"]
    system = [{"role": "system", "content": "say no."}]
    assert conversation == stock.conversation([*system, *questions[0]])
    with pytest.raises(ValueError, match=r"a system prompt of its own; leave out system_prompt='say no\.'"):
        answerer.conversation([*system, *questions[0]])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (user(""), "must have text or an image"),
        (user(" ", "\n"), "must have text or an image"),
        ([*user("a"), {"role": "assistant", "content": "b"}], "must end with a message of the user, got one of 'assi"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "must be text or an image"),
        (user(Path("nowhere.png"), "what is this?"), "nowhere.png"),
        (user(None, "what is this?"), "NoneType|str or None"),
    ],
)
def test_conversations_that_cannot_be_answered(ours, messages, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ours.conversation(copy.deepcopy(messages))


def test_settings_become_arguments():
    greedy = {"temperature": None, "top_p": None, "top_k": None, "do_sample": False}
    assert generation_arguments({}) == greedy
    # As lmms-eval's tasks have it.
    given = {"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1}
    expected = {**greedy, "max_new_tokens": 16, "num_beams": 1, "stop_strings": ["\n\n"]}
    assert generation_arguments({**given, "do_sample": False}) == expected
    assert generation_arguments({**given, "do_sample": None, "until": None}) == {
        name: value for name, value in expected.items() if name != "stop_strings"
    }
    assert generation_arguments({"temperature": 0.5}) == {"temperature": 0.5, "do_sample": True}
    assert generation_arguments({"do_sample": True, "top_k": 3}) == {"do_sample": True, "top_k": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 3, "seed": 0}, r"the settings \['max_tokens', 'seed'\] of a generation are not supported"),
        ({"until": "\n"}, r"until must be a list of strings that are not empty, got '\\n'"),
        ({"until": [""]}, "until must be a list"),
        ({"until": [3]}, "until must be a list"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a positive integer, got 2.5"),
        ({"num_beams": True}, "num_beams must be a positive integer, got True"),
        ({"temperature": -1}, "temperature must be a number of at least 0, got -1"),
        ({"temperature": "hot"}, "temperature must be a number of at least 0, got 'hot'"),
        ({"do_sample": "no"}, "do_sample must be true or false, got 'no'"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample needs a temperature above 0"),
    ],
)
def test_settings_that_cannot_be_followed(settings, message):
    with pytest.raises(ValueError, match=message):
        generation_arguments(settings)


def test_answers_to_measure_must_have_tokens(ours, questions):
    with pytest.raises(ValueError, match="at least one token, got ''"):
        ours.losses([ours.conversation(question) for question in questions[:2]], ["yes", ""])


def test_checkpoints_that_cannot_answer(stock_folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'auto'"):
        Answerer(stock_folder, dtype="auto")
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        Answerer(stock_folder, max_new_tokens=0)
    shutil.copytree(stock_folder, tmp_path / "no-template")
    (tmp_path / "no-template" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        Answerer(tmp_path / "no-template")
    shutil.copytree(stock_folder, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, which would be random: .*layers\.1\.mlp\.up_proj"):
        Answerer(tmp_path / "truncated")


def test_logits_that_are_not_finite_are_no_answer(stock, questions):
    broken = copy.copy(stock)
    broken.model = copy.deepcopy(stock.model)
    broken.model.lm_head.weight.data.fill_(float("nan"))
    conversations = [broken.conversation(questions[0])]
    with pytest.raises(ValueError, match="logits are not finite"):
        broken.answer(conversations)
    with pytest.raises(ValueError, match="logits are not finite"):
        broken.losses(conversations, ["yes"])
