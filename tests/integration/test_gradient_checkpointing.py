# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Gradient checkpointing: the losses and gradients are the same, and the layers run a second time."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from latte_flow_hf.training import expert_lora_config, train_only_experts
from latte_flow_hf.training.adapters import set_trainable
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
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls.clear()
    again, recomputed = loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 2)
    assert torch.equal(again, loss)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items()), "a weight has no gradient"
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
    model.activation_checkpointing_disable()
    calls.clear()
    loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 1)


TRAINABLE = {
    "lora": lambda model: get_peft_model(model, expert_lora_config(model, [0, 1], r=2, init_lora_weights=False)),
    "add_adapter": lambda model: model.add_adapter(expert_lora_config(model, [0, 1], r=2, init_lora_weights=False)),
    "experts": lambda model: train_only_experts(model, [0, 1]),
    "head": lambda model: get_peft_model(
        model,
        LoraConfig(
            r=2,
            init_lora_weights=False,
            target_modules=r"tower\.layers\.\d+\.mlp\.\w+_proj",
            modules_to_save=["tower.head"],
        ),
    ),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_gradients_are_the_same_where_the_embedding_is_frozen(make_model, encode, trainable, use_reentrant):
    """Reentrant checkpointing passes gradients on only if an input of the layer needs some."""
    torch.manual_seed(0)
    model = make_model()
    TRAINABLE[trainable](model)
    model.train()
    inputs = encode("a red circle", "a blue square", "a small green cross above a handwritten seven", "")
    loss, gradients = loss_and_gradients(model, inputs)
    calls = count_attentions(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again, recomputed = loss_and_gradients(model, inputs)
    assert calls == dict.fromkeys(range(4), 2) and torch.equal(again, loss)
    trained = [name for name, parameter in model.tower.named_parameters() if parameter.requires_grad]
    assert len(trained) > 20
    for name in trained:
        assert gradients[name].abs().max() > 0
        torch.testing.assert_close(recomputed[name], gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_trained_backbone_is_checkpointed_too(make_model, encode, use_reentrant):
    """With `labels`; the prompts of the images are encoded without gradients and with a cache."""
    model = make_model()
    set_trainable(model, "vlm")
    inputs = encode("a red circle", "a blue square", "a green cross", "a handwritten seven")
    inputs["labels"] = inputs["input_ids"]
    decoder, runs = model.vlm.get_decoder(), Counter()
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.update([index]))

    def gradients():
        runs.clear()
        loss = loss_and_gradients(model, inputs)[0]
        return loss, {name: p.grad for name, p in decoder.named_parameters()}, dict(runs)

    model.train()
    assert decoder.training
    loss, expected, plain_runs = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again, recomputed, checkpointed_runs = gradients()
    torch.testing.assert_close(again, loss)
    assert checkpointed_runs == {index: count + 1 for index, count in plain_runs.items()} and len(plain_runs) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
    assert decoder.training and not model.eval().vlm.training


def test_a_frozen_backbone_stays_in_evaluation_mode(make_model):
    model = make_model().train()
    assert model.tower.training and not any(module.training for module in model.vlm.modules())


def test_nothing_is_recomputed_without_training(make_model, encode):
    model = make_model()
    model.activation_checkpointing_enable()
    calls = count_attentions(model.eval())
    loss_and_gradients(model, encode("a red circle", "a blue square", "a green cross", ""))
    assert calls == dict.fromkeys(range(4), 1)


def test_the_trainer_has_the_same_losses(model, processor, tmp_path):
    losses, calls = [], []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model)
        contexts = encode_prompts(trained, processor, ["a red circle", ""])
        arguments = TrainingArguments(
            dataloader_pin_memory=False,
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            activation_checkpointing=checkpointing,
        )
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        data = [{"latents": item, "prompt": 0} for item in latents] * 3
        calls.append(count_attentions(trained))
        trainer = Trainer(trained, arguments, train_dataset=data, data_collator=TextToImageCollator(contexts, 0.0))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert calls == [dict.fromkeys(range(4), 3), dict.fromkeys(range(4), 6)]
