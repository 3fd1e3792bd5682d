"""Labels are the words of the assistant; contexts encoded in advance equal those encoded in the batch."""

import pytest
import torch

from latte_flow_hf.tinyworld.datasets import Conversations
from latte_flow_hf.training.collator import (
    ConversationCollator,
    ImagePromptEncoder,
    PromptTokenizer,
    TextToImageCollator,
    encode_prompts,
)


def test_labels_are_the_assistants_words(processor):
    data = Conversations(0, 6)
    examples = [data[i] for i in range(6)]
    batch = ConversationCollator(processor)(examples)
    for row, example in zip(range(6), examples):
        labels = batch["labels"][row]
        kept = labels[labels != -100]
        answers = [m["content"][0]["text"] + "<|im_end|>" for m in example["messages"] if m["role"] == "assistant"]
        assert processor.tokenizer.decode(kept) == "".join(answers)
        assert (labels[labels != -100] == batch["input_ids"][row][labels != -100]).all()
    assert batch["image_grid_thw"].shape[0] == sum(
        part["type"] == "image" for e in examples for m in e["messages"] for part in m["content"]
    )


def test_a_template_without_marks_is_refused(processor):
    import copy

    unmarked = copy.copy(processor)
    unmarked.chat_template = processor.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    with pytest.raises(ValueError, match="generation"):
        ConversationCollator(unmarked)([Conversations(0, 1)[0]])


def test_prompts_encoded_in_advance_give_the_same_velocity(model, processor):
    prompts = ["a red circle", "a blue square left of a green cross", "a handwritten two", ""]
    contexts = encode_prompts(model, processor, prompts, batch_size=2)
    collator = TextToImageCollator(contexts, prompt_dropout=0.0)
    latents = torch.randn(3, 4, 8, 8)
    batch = collator([{"latents": latents[i], "prompt": row} for i, row in enumerate((2, 0, 1))])
    assert torch.equal(batch["latents"], latents)
    inputs = processor.encode_conversations([processor.conversation(prompts[row]) for row in (2, 0, 1)])
    fresh = model.encode_context(**inputs)
    with torch.no_grad():
        cached = model.predict_velocity(latents, 900.0, batch["context"])
        expected = model.predict_velocity(latents, 900.0, fresh)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-4)


def test_dropped_prompts_become_the_unconditional_one(model, processor):
    contexts = encode_prompts(model, processor, ["a red circle", ""])
    examples = [{"latents": torch.zeros(4, 8, 8), "prompt": 0}] * 400
    torch.manual_seed(0)
    dropped = TextToImageCollator(contexts, prompt_dropout=0.25)(examples)["context"]
    unconditional = (dropped.next_position == contexts.next_position[1]).float().mean()
    assert contexts.next_position[0] != contexts.next_position[1]
    assert 0.18 < unconditional < 0.32
    assert (TextToImageCollator(contexts, 1.0)(examples)["context"].next_position == contexts.next_position[1]).all()


def test_separate_contexts_are_kept_and_independent_of_their_batch(pipe, monkeypatch):
    prompts = ["a red circle", "a blue square left of a green cross", ""]
    encoder = ImagePromptEncoder(pipe)
    contexts = encoder.separate_contexts(prompts)
    assert not any(context.has_padding for context in contexts)
    (alone,) = ImagePromptEncoder(pipe).separate_contexts(prompts[1:2])
    assert all(torch.equal(one, other) for one, other in zip(alone.keys, contexts[1].keys))
    assert encoder.separate_contexts(prompts[::-1])[0] is contexts[2]
    # The oldest contexts that the batch does not need are removed.
    monkeypatch.setattr(encoder, "max_contexts", 3)
    encoder.separate_contexts(["a green cross", ""])
    assert encoder.separate_contexts([""])[0] is contexts[2]
    assert encoder.separate_contexts(["a red circle"])[0] is not contexts[0]


def test_tokenized_prompts_are_encoded_by_the_model(model, processor):
    prompts = ["a red circle", "a blue square left of a green cross"]
    context = model.encode_context(**PromptTokenizer(processor)(prompts))
    expected = encode_prompts(model, processor, prompts)
    assert all(torch.equal(one, other) for one, other in zip(context.keys, expected.keys))


def test_conversations_are_drawn_for_each_batch(model, processor):
    contexts = encode_prompts(model, processor, ["a red circle", ""])
    conversations, drawn = Conversations(0, 50), []

    def collate(examples):
        drawn.append(len(examples))
        return ConversationCollator(processor)(examples)

    collator = TextToImageCollator(
        contexts, 0.0, conversations=conversations, conversation_collator=collate, conversation_share=0.5
    )
    examples = [{"latents": torch.zeros(4, 8, 8), "prompt": 0, "seed": seed} for seed in range(8)]
    batches = [collator(part) for part in (examples[:4], examples[4:], examples[:4], examples[:1])]
    assert drawn == [2, 2, 2, 1]
    assert torch.equal(batches[0]["labels"], batches[2]["labels"])
    assert batches[0]["labels"].shape != batches[1]["labels"].shape or not torch.equal(
        batches[0]["labels"], batches[1]["labels"]
    )
