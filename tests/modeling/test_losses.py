# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The training losses: recomputed by definition, and which weights learn from them."""

import copy
from collections import Counter

import pytest
import torch
from helpers import noise, same_bytes

from latte_flow_hf.modeling.flow_matching import draw_expert_sigmas


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_flow_loss_is_the_sum_over_experts_recomputed(model, encode, batch):
    prompts = ["a red circle", "a cross", "a blue square", "a handwritten seven", "a cross above a circle"][:batch]
    inputs, data, start = encode(*prompts), noise(batch, 4, 4, 4, seed=1), noise(batch, 4, 4, 4, seed=2)
    with torch.no_grad():
        output = model(**inputs, latents=data, noise=start, generator=torch.Generator().manual_seed(7))
        # By the definition: example i goes to expert i mod K; too few examples are gone through again.
        generator, context, expected = torch.Generator().manual_seed(7), model.encode_context(**inputs), []
        for expert in range(2):
            rows = torch.tensor([i % batch for i in range(max(batch, 2)) if i % 2 == expert])
            high, low = model.config.expert_boundaries[expert : expert + 2]
            sigma = draw_expert_sigmas(len(rows), (high, low), generator)
            s = sigma[:, None, None, None]
            noisy = (1 - s) * data[rows] + s * start[rows]
            velocity = model.predict_velocity(noisy, 1000 * sigma, context.select(rows))
            expected.append((velocity - (start[rows] - data[rows])).square().mean().item())
    assert output.expert_losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert output.flow_loss.item() == pytest.approx(sum(expected), rel=1e-5)
    assert torch.equal(output.loss, output.flow_loss)
    assert output.lm_loss is None and output.logits is None


def test_folded_guidance_changes_the_target_by_the_model_s_own_difference(model, encode):
    prompts = ["a red circle", "a cross", "", "a handwritten seven"]
    inputs, data, start = encode(*prompts), noise(4, 4, 4, 4, seed=1), noise(4, 4, 4, 4, seed=2)
    context, empty = model.encode_context(**inputs), model.encode_context(**encode(""))
    with torch.no_grad():
        output = model(
            **inputs,
            latents=data,
            noise=start,
            generator=torch.Generator().manual_seed(7),
            negative_context=empty,
            guidance_scale=4.0,
        )
        generator, expected = torch.Generator().manual_seed(7), []
        for expert in range(2):
            rows = torch.tensor([expert, expert + 2])
            sigma = draw_expert_sigmas(2, model.config.expert_boundaries[expert : expert + 2], generator)
            s = sigma[:, None, None, None]
            noisy = (1 - s) * data[rows] + s * start[rows]
            velocity = model.predict_velocity(noisy, 1000 * sigma, context.select(rows))
            uncond = model.predict_velocity(noisy, 1000 * sigma, empty.select(torch.zeros(2, dtype=torch.int64)))
            target = start[rows] - data[rows] + 0.75 * (velocity - uncond)
            expected.append((velocity - target).square().mean().item())
            if expert == 0:
                # The third prompt is the empty one: its target is that of ordinary training.
                torch.testing.assert_close(target[1], start[2] - data[2], atol=1e-5, rtol=1e-5)
                assert (target[0] - (start[0] - data[0])).abs().max() > 1e-3
    assert output.expert_losses.tolist() == pytest.approx(expected, rel=1e-4)
    # The empty prompt as the arguments of `encode_context`, as for a backbone that is trained.
    with torch.no_grad():
        again = model.flow_loss(
            data, inputs, start, torch.Generator().manual_seed(7), negative_context=encode(""), guidance_scale=4.0
        )
    torch.testing.assert_close(again[1], output.expert_losses, atol=1e-5, rtol=1e-5)


def test_the_added_target_has_no_gradient(model, encode):
    """With a scale of almost 1 the gradient is that of ordinary training."""
    data, context, empty = noise(2, 4, 4, 4), encode("a red circle", "a cross"), encode("")
    gradients = []
    for scale in (1.0 + 1e-12, 4.0):
        model.zero_grad()
        loss, _ = model.flow_loss(
            data, context, data, torch.Generator().manual_seed(1), negative_context=empty, guidance_scale=scale
        )
        loss.backward()
        gradients.append(model.tower.head.proj.bias.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1])
    plain = model.flow_loss(data, context, data, torch.Generator().manual_seed(1))[0]
    model.zero_grad()
    plain.backward()
    torch.testing.assert_close(model.tower.head.proj.bias.grad, gradients[0])


def test_folded_guidance_that_cannot_be_learned_is_refused(model, encode):
    data, context = noise(2, 4, 4, 4), encode("a red circle", "a cross")
    for given, message in (
        ({"guidance_scale": 4.0}, "together"),
        ({"negative_context": encode("")}, "together"),
        ({"guidance_scale": 1.0, "negative_context": encode("")}, "must be above 1"),
        ({"guidance_scale": 4.0, "negative_context": encode("", "a cross")}, "one prompt, which serves all"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**context, latents=data, **given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_overlap_widens_the_intervals_in_training_alone(make_model, encode, monkeypatch, overlap, training):
    model = make_model().train(training)
    model.interval_overlap = overlap
    drawn = []

    def draw(count, interval, generator=None, sampling="uniform"):
        drawn.append(interval)
        return draw_expert_sigmas(count, interval, generator, sampling)

    monkeypatch.setattr("latte_flow_hf.modeling.flow_matching.draw_expert_sigmas", draw)
    with torch.no_grad():
        model(**encode("a red circle", "a cross"), latents=noise(2, 4, 4, 4))
    assert drawn == [(1.0, pytest.approx(0.5 * (1 - overlap if training else 1))), (0.5, 0.0)]


def test_labels_add_the_backbone_s_own_loss(model, backbone, encode):
    inputs, labels = encode("a red circle", "a cross"), encode("a red circle", "a cross")["input_ids"]
    with torch.no_grad():
        output = model(**inputs, labels=labels, latents=noise(2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        alone = model(**inputs, latents=noise(2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        stock = backbone(**inputs, labels=labels)
    assert torch.equal(output.lm_loss, stock.loss) and torch.equal(output.logits, stock.logits)
    assert torch.equal(output.flow_loss, alone.flow_loss)
    assert torch.equal(output.loss, alone.flow_loss + stock.loss)


def test_shifted_labels_replace_labels(model, backbone, encode):
    # As parallelism over the sequence gives them, whose `labels` may all be out of this process's part.
    inputs = encode("a red circle", "a cross")
    shifted = torch.nn.functional.pad(inputs["input_ids"][:, 1:], (0, 1), value=-100)
    labels = torch.full_like(shifted, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels, shift_labels=shifted, latents=noise(2, 4, 4, 4))
        stock = backbone(**inputs, labels=labels, shift_labels=shifted)
    assert stock.loss > 0 and torch.equal(output.lm_loss, stock.loss)


@pytest.mark.parametrize(
    "prompts", [["a red circle", "a cross"], ["a cross", "a red circle above a blue square", "a"]]
)
def test_given_context_replaces_the_prompt(model, encode, prompts):
    # Equal up to rounding: without one, each expert's prompts are prefilled on their own.
    inputs, data = encode(*prompts), noise(len(prompts), 4, 4, 4)
    with torch.no_grad():
        one = model(**inputs, latents=data, generator=torch.Generator().manual_seed(0))
        other = model(context=model.encode_context(**inputs), latents=data, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.expert_losses, other.expert_losses, rtol=1e-5, atol=0)


def test_loss_follows_its_generator_and_may_be_a_tuple(model, encode):
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    with torch.no_grad():
        losses = [
            model(**inputs, latents=data, return_dict=False, generator=torch.Generator().manual_seed(seed))[0]
            for seed in (0, 0, 1)
        ]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_loss_with_a_picture_in_the_prompt(model, encode, picture):
    output = model(**encode("a red circle", "a cross", image=picture), latents=noise(2, 4, 4, 4))
    assert torch.isfinite(output.loss) and output.loss.requires_grad


def test_what_the_trainer_adds_is_taken(model, encode):
    # The stock Trainer hands this to every forward that takes keyword arguments.
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    output = model(**inputs, latents=data, num_items_in_batch=torch.tensor(2), logits_to_keep=1, use_cache=False)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("mode", ["scores", "probabilities", None])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_tower_parameter_learns_in_one_step_and_nothing_else(make_model, encode, batch, mode):
    model = make_model(residual_attention=mode).train()
    inputs = encode(*["a red circle", "a cross", "a blue square"][:batch])
    model(**inputs, latents=noise(batch, 4, 4, 4), generator=torch.Generator().manual_seed(0)).loss.backward()
    idle = [name for name, p in model.tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Key biases too: they move the scores on latents, not those on the context.
    assert idle == []
    assert all(p.grad is None for p in model.vlm.parameters())
    assert not any(p.requires_grad for p in model.vlm.parameters())


def test_each_expert_learns_from_its_own_share(trainable, encode):
    # The same loss, but of one expert: no gradient may reach the layers of the other.
    context = trainable.encode_context(**encode("a red circle"))
    trainable.predict_velocity(noise(1, 4, 4, 4), 210.0, context).square().sum().backward()
    with_gradient = {i for i, layer in enumerate(trainable.tower.layers) if layer.modulation.weight.grad is not None}
    assert with_gradient == {2, 3}


def test_training_step_runs_each_layer_once_and_prefills_as_deep_as_it_reads(trainable, encode, count_layers):
    prompts = encode("a red circle", "a cross", "a blue square")
    rows = dict.fromkeys(range(4), 0)

    def count(index):
        def add(module, inputs, output):
            rows[index] += len(inputs[0])

        return add

    handles = [
        layer.register_forward_hook(count(index))
        for index, layer in enumerate(trainable.vlm.model.language_model.layers)
    ]
    with count_layers(trainable) as calls:
        trainable(**prompts, latents=noise(3, 4, 4, 4))
    assert calls == dict.fromkeys(range(4), 1)
    # Two prompts for the first expert, which reads two layers; one for the second, which reads the layers above.
    assert rows == {0: 3, 1: 3, 2: 1, 3: 1}

    context = trainable.encode_context(**prompts)
    rows = dict.fromkeys(range(4), 0)
    trainable(context=context, latents=noise(3, 4, 4, 4))
    assert rows == dict.fromkeys(range(4), 0)
    for handle in handles:
        handle.remove()


def test_a_tower_of_some_layers_prefills_as_deep_as_it_reads(make_model, encode):
    model = make_model(num_experts=2, tower_layers=[0, 2, 3], layers_per_expert=[2, 1]).train()
    rows = Counter()
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: rows.update({index: len(inputs[0])}))
    model(**encode("a red circle", "a cross", "a white square"), latents=noise(3, 4, 4, 4)).loss.backward()
    # Two prompts for the first expert, whose last layer reads layer 2 of the backbone.
    assert rows == {0: 3, 1: 3, 2: 3, 3: 1}
    assert all(parameter.grad is not None for parameter in model.tower.parameters())


def test_new_model_learns(make_model, encode):
    # From exact zero: the head's zeros must not stop all that is behind them for ever.
    model = make_model(filled=False).train()
    inputs, data, start = encode("a red circle", "a cross"), noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    before = copy.deepcopy(model.vlm)
    fresh = copy.deepcopy(model.tower)
    optimizer = torch.optim.Adam(model.tower.parameters(), lr=5e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs, latents=data, noise=start, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2 * (start - data).square().mean().item(), rel=0.5)
    assert losses[-1] < 0.5 * losses[0]
    assert same_bytes(model.vlm, before)
    old = dict(fresh.named_parameters())
    unmoved = [name for name, p in model.tower.named_parameters() if torch.equal(p, old[name])]
    assert unmoved == []


def test_gradient_checkpointing_gives_the_same_gradients(make_model, encode):
    inputs, data = encode("a red circle", "a cross"), noise(2, 4, 4, 4)
    found = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, latents=data, generator=torch.Generator().manual_seed(0)).loss.backward()
        found.append({name: p.grad for name, p in model.tower.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_train_keeps_the_backbone_in_eval(make_model):
    model = make_model()
    assert model.train() is model
    assert model.training and model.tower.training and model.tower.layers[0].training
    assert not any(module.training for module in model.vlm.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
