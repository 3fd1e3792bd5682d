"""Labels must be the assistant's words and nothing else; encoded prompts must be what encoding them anew gives."""

import pytest
import torch

from latte_flow_hf.tinyworld.datasets import Conversations
from latte_flow_hf.training.collator import ConversationCollator, TextToImageCollator, encode_prompts


def test_labels_are_the_assistants_words(processor):
    data = Conversations(0, 6)
    examples = [data[i] for i in range(6)]
    batch = ConversationCollator(processor)(examples)
    for row, example in zip(range(6), examples):
        labels = batch["labels"][row]
        kept = labels[labels != -100]
        said = [m["content"][0]["text"] + "<|im_end|>" for m in example["messages"] if m["role"] == "assistant"]
        assert processor.tokenizer.decode(kept) == "".join(said)
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


def test_encoded_prompts_paint_as_fresh_ones(model, processor):
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
