"""The formulas against torch: its counter of operations, and the bytes of tensors that real steps keep."""

import pytest
import torch
from backbones import BACKBONES, MORE_BACKBONES, tiny_backbone
from measured_steps import LiveBytes, count_flops, measured_bytes, measured_flops, new_batch, new_model
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from latte_flow_hf import LatteFlowForConditionalGeneration
from latte_flow_hf.training.adapters import expert_lora_config, set_trainable
from latte_flow_hf.training.costs import (
    KNOWN_OPTIMIZERS,
    Examples,
    Flops,
    Precision,
    context_bytes,
    expert_activations,
    expert_flops,
    half_precision_weights,
    optimizer_bytes,
    optimizer_work_bytes,
    prefill_flops,
)
from latte_flow_hf.training.shapes import decoder_shape, tower_shape


# Different experts, widths, batches and lengths of prompts: model, images, prompt tokens, side of the latents.
SIZES = [
    ({}, 8, 11, 8),
    ({"hidden_size": 128, "intermediate_size": 320, "num_layers": 8, "num_heads": 8, "num_experts": 4}, 12, 30, 6),
    ({"hidden_size": 96, "num_layers": 3, "num_experts": 1, "latent_patch_size": 2, "latent_channels": 8}, 3, 50, 16),
]


def counts(num_images, num_experts):
    """Images of each expert on one device."""
    return [len(range(position, num_images, num_experts)) for position in range(num_experts)]


def examples_of(model, batch, num_context):
    latents = batch["latents"]
    num_tokens = latents.shape[2] * latents.shape[3] // model.config.latent_patch_size**2
    experts = model.training_experts
    return [
        (expert, Examples(number, num_tokens, num_context))
        for expert, number in zip(experts, counts(len(latents), len(experts)))
    ]


def predicted_flops(model, batch, num_context, checkpointing=False, evaluations=0):
    tower, flops = tower_shape(model), Flops()
    for expert, examples in examples_of(model, batch, num_context):
        flops += expert_flops(tower, expert, examples, checkpointing, evaluations)
    return flops


def predicted_bytes(model, batch, num_context, is_mixed=False, checkpointing=False):
    """What the forward pass leaves."""
    tower, decoder = tower_shape(model), decoder_shape(model.vlm)
    width = model.dtype.itemsize
    precision = Precision(width, min(width, 2) if is_mixed else width)
    total = 0
    for expert, examples in examples_of(model, batch, num_context):
        total += expert_activations(tower, expert, examples, precision, checkpointing)
        if tower.residual_attention == "scores" or checkpointing:
            kept_width = width if checkpointing else precision.product
            num_layers = len(tower.experts[expert])
            total += context_bytes(decoder, examples.num_images, num_context, kept_width, num_layers)
    # Checkpointing keeps no copies of weights after the forward pass.
    return total + (0 if checkpointing else half_precision_weights(tower, model.training_experts, precision))


@pytest.mark.parametrize(
    ("size", "residual_attention"),
    [(0, "scores"), (0, "probabilities"), (0, None), (1, "scores"), (2, "scores"), (2, None)],
)
def test_a_step_costs_what_torch_counts_and_keeps(size, residual_attention):
    config, num_images, num_context, side = SIZES[size]
    model = new_model(**config, residual_attention=residual_attention)
    batch = new_batch(model, num_images, num_context, side)
    forward, total = measured_flops(model, batch)
    flops = predicted_flops(model, batch, num_context)
    assert flops.forward == pytest.approx(forward, rel=0.02)
    assert flops.total == pytest.approx(total, rel=0.02)
    assert predicted_bytes(model, batch, num_context) == pytest.approx(measured_bytes(model, batch).kept, rel=0.1)


@pytest.mark.parametrize("residual_attention", ["scores", "probabilities", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_mixed_precision_and_checkpointing(residual_attention, checkpointing):
    model = new_model(residual_attention=residual_attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = new_batch(model, 8, 11)
    assert predicted_flops(model, batch, 11, checkpointing).total == pytest.approx(
        measured_flops(model, batch)[1], rel=0.02
    )
    predicted = predicted_bytes(model, batch, 11, is_mixed=True, checkpointing=checkpointing)
    assert predicted == pytest.approx(measured_bytes(model, batch, is_mixed=True).kept, rel=0.1)


def test_with_weights_in_half_precision():
    model = new_model().to(torch.bfloat16)
    batch = new_batch(model, 8, 11)
    assert predicted_bytes(model, batch, 11) == pytest.approx(measured_bytes(model, batch).kept, rel=0.1)


def test_eager_attention():
    model = new_model(residual_attention=None)
    model.set_attn_implementation("eager")
    batch = new_batch(model, 8, 11)
    assert not tower_shape(model).is_fused
    assert predicted_bytes(model, batch, 11) == pytest.approx(measured_bytes(model, batch).kept, rel=0.1)


@pytest.mark.parametrize(
    "setting",
    ["vlm", [1], {}, {"parts": ["attention"]}, {"parts": ["mlp"]}, {"parts": ["modulation"]}],
    ids=str,
)
def test_a_part_of_the_weights(setting):
    """Frozen weights have no gradients, and what only they would need is not kept."""
    model = new_model()
    if isinstance(setting, dict):
        get_peft_model(model, expert_lora_config(model, [0, 1], r=4, **setting))
    else:
        set_trainable(model, setting)
    batch = new_batch(model, 8, 11)
    assert predicted_flops(model, batch, 11).total == pytest.approx(measured_flops(model, batch)[1], rel=0.02)
    assert predicted_bytes(model, batch, 11) == pytest.approx(measured_bytes(model, batch).kept, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("name", [*BACKBONES, "ministral3", "llava_phi3"])
def test_other_backbones(name, is_mixed):
    torch.manual_seed(0)
    model = LatteFlowForConditionalGeneration.from_vlm(tiny_backbone(name), num_experts=2, latent_channels=8).train()
    batch = new_batch(model, 8, 11)
    assert predicted_flops(model, batch, 11).total == pytest.approx(measured_flops(model, batch)[1], rel=0.02)
    measured = measured_bytes(model, batch, is_mixed)
    assert predicted_bytes(model, batch, 11, is_mixed) == pytest.approx(measured.kept, rel=0.1)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_norms_of_heads(name):
    test_other_backbones(name, is_mixed=True)


@pytest.mark.parametrize(
    ("name", "message"), [("qwen3_vl_moe", "mixture of experts"), ("aya_vision", "memory of a Cohere2LayerNorm")]
)
def test_layers_whose_costs_are_not_known(name, message):
    assert name in MORE_BACKBONES
    model = LatteFlowForConditionalGeneration.from_vlm(tiny_backbone(name), num_experts=2, latent_channels=8)
    with pytest.raises(ValueError, match=message):
        tower_shape(model)


def test_prompts_without_a_cache():
    """A batch of prompts for the whole backbone, and inside of a step for the layers that each expert reads."""
    model = new_model(**SIZES[1][0])
    decoder = decoder_shape(model.vlm)
    prompts = new_batch(model, 12, 30, 6, cached=False)["context"]
    with count_flops() as counter:
        model.encode_context(**prompts)
    assert prefill_flops(decoder, 12, 30) == pytest.approx(counter.get_total_flops(), rel=0.02)
    batch = new_batch(model, 12, 30, 6, cached=False)
    flops = predicted_flops(model, batch, 30).total
    flops += sum(prefill_flops(decoder, 3, 30, num_layers) for num_layers in (2, 4, 6, 8))
    assert flops == pytest.approx(measured_flops(model, batch)[1], rel=0.02)


def test_guidance_in_the_weights_takes_one_more_evaluation():
    model = new_model()
    batch = new_batch(model, 8, 11)
    negative = new_batch(model, 1, 11)["context"]
    _, measured = measured_flops(model, {**batch, "negative_context": negative, "guidance_scale": 3.0})
    flops = predicted_flops(model, batch, 11, evaluations=1)
    assert flops.total == pytest.approx(measured, rel=0.02)
    assert flops.without_gradients == flops.forward


def test_unequal_experts():
    model = new_model(layers_per_expert=[3, 1])
    batch = new_batch(model, 6, 11)
    assert predicted_flops(model, batch, 11).total == pytest.approx(measured_flops(model, batch)[1], rel=0.02)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adagrad", "adafactor", "rmsprop", "sgd"])
def test_optimizers(name, tmp_path):
    """The state that the Trainer's own optimizer has after a step, and what the step needs for a moment."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.LayerNorm(96))
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class(model.parameters(), **settings)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    measured = sum(value.nbytes for value in states if value.numel() > 1)
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    assert optimizer_bytes(name, shapes, 4) == pytest.approx(measured, rel=0.1)
    assert optimizer_bytes(name, shapes, 2) in (optimizer_bytes(name, shapes, 4) // 2, 0)


def test_adamw_without_a_fused_kernel_needs_roots_of_all_weights():
    weights = [torch.nn.Parameter(torch.randn(40, 50)) for _ in range(4)]
    optimizer = torch.optim.AdamW(weights, foreach=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with LiveBytes([*weights, *(weight.grad for weight in weights), *states]) as live:
        optimizer.step()
    shapes = [tuple(weight.shape) for weight in weights]
    assert optimizer_work_bytes("adamw_torch", shapes, 4) == pytest.approx(live.peak, rel=0.1)
    assert optimizer_work_bytes("adamw_torch_fused", shapes, 4) == 0


def test_optimizers_of_eight_bits():
    shapes = [(1024, 1024), (1024,)]
    # One byte for each of two moments, a scale for each 256 of them; the bias keeps float32.
    assert optimizer_bytes("adamw_8bit", shapes, 4) == 2 * (1024**2 + 4 * 1024**2 // 256 + 4 * 1024)
    assert "adamw_8bit" in KNOWN_OPTIMIZERS


def test_an_optimizer_that_is_not_known():
    with pytest.raises(ValueError, match=r"'galore_adamw': the memory .* not known"):
        optimizer_bytes("galore_adamw", [(4, 4)], 4)
