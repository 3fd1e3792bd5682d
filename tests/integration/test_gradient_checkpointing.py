# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Gradient checkpointing: the losses and gradients are the same, and the layers run a second time."""

import copy
from collections import Counter

import pytest
import torch
from transformers import Trainer, TrainingArguments

from latte_flow_hf.training.collator import TextToImageCollator, encode_prompts


def loss_and_gradients(model, inputs):
    model.zero_grad()
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    loss = model(**inputs, latents=latents, generator=torch.Generator().manual_seed(1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.tower.named_parameters()}


def count_attentions(model):
    """Hooks of the attention, because those of a checkpointed layer itself are not called when it is recomputed."""
    calls = Counter()
    for index, layer in enumerate(model.tower.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.update([index]))
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
def test_gradients_are_the_same_and_layers_run_twice(make_model, encode, mode, use_reentrant):
    # Two experts of two layers each: the gradient of the second layer reaches the first through residual attention.
    model = make_model(residual_attention=mode).train()
    inputs = encode("a red circle", "a blue square", "a small green cross above a handwritten seven", "")
    calls = count_attentions(model)
    loss, gradients = loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls.clear()
    again, recomputed = loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 2)
    assert torch.equal(again, loss)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items()), "a weight has no gradient"
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    calls.clear()
    loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 1)


def test_nothing_is_recomputed_without_training(make_model, encode):
    model = make_model()
    model.gradient_checkpointing_enable()
    calls = count_attentions(model.eval())
    loss_and_gradients(model, encode("a red circle", "a blue square", "a green cross", ""))
    assert calls == dict.fromkeys(range(4), 1)


def test_the_trainer_has_the_same_losses(model, processor, tmp_path):
    losses, calls = [], []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model)
        contexts = encode_prompts(trained, processor, ["a red circle", ""])
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=checkpointing,
        )
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        data = [{"latents": item, "prompt": 0} for item in latents] * 3
        calls.append(count_attentions(trained))
        trainer = Trainer(trained, arguments, train_dataset=data, data_collator=TextToImageCollator(contexts, 0.0))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert calls == [dict.fromkeys(range(4), 3), dict.fromkeys(range(4), 6)]
