"""Memory of a device by part, against real steps of small models."""

from dataclasses import replace

import pytest
import torch
from measured_steps import LiveBytes, measured_bytes, new_batch, new_model
from peft import get_peft_model

from latte_flow_hf.modeling.flow_matching import assign_examples_to_experts
from latte_flow_hf.training.adapters import expert_lora_config
from latte_flow_hf.training.memory import Setup, device_memory, rows_per_expert, without_memory
from latte_flow_hf.training.plan import model_shape


# No autoencoder: contexts and latents are prepared.
NO_VAE = torch.nn.Identity()

# As in test_costs.py: model, images, prompt tokens, side of the latents.
SIZES = [
    ({}, 8, 11, 8),
    ({"hidden_size": 128, "intermediate_size": 320, "num_layers": 8, "num_heads": 8, "num_experts": 4}, 12, 30, 6),
    ({"hidden_size": 96, "num_layers": 3, "num_experts": 1, "latent_patch_size": 2, "latent_channels": 8}, 3, 50, 16),
]


def make_setup(batch_size, num_tokens, num_context, **changes) -> Setup:
    setup = Setup(
        num_devices=1,
        is_sharded=False,
        batch_size=batch_size,
        accumulation=1,
        num_tokens=num_tokens,
        num_context=num_context,
        is_mixed=False,
        is_checkpointing=False,
        optimizer="adamw_torch_fused",
        has_ema=False,
        ema_on_device=False,
        contexts="cache",
    )
    return replace(setup, **changes)


def predict(model, setup):
    rows = rows_per_expert(setup.batch_size, len(model.training_experts))
    return device_memory(model_shape(model, NO_VAE), setup, rows)


def check(model, batch, setup):
    measured, memory = measured_bytes(model, batch, setup.is_mixed), predict(model, setup)
    assert memory.backbone + memory.tower == pytest.approx(measured.weights, rel=0.1)
    assert memory.gradients == measured.gradients
    assert memory.optimizer == pytest.approx(measured.optimizer, rel=0.1)
    # What a step keeps of the contexts is kept by its forward pass, the batch itself is an input.
    half = memory.half_precision * (not setup.is_checkpointing)
    kept = memory.activations + half + memory.contexts - measured.inputs
    assert kept == pytest.approx(measured.kept, rel=0.1)
    assert memory.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize(("config", "num_images", "num_context", "side"), SIZES)
def test_each_part_and_the_peak(config, num_images, num_context, side):
    model = new_model(**config)
    num_tokens = (side // model.config.latent_patch_size) ** 2
    batch = new_batch(model, num_images, num_context, side)
    check(model, batch, make_setup(num_images, num_tokens, num_context))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_checkpointing(is_mixed):
    model = new_model(num_layers=8)
    model.activation_checkpointing_enable()
    check(model, new_batch(model, 8, 11), make_setup(8, 64, 11, is_mixed=is_mixed, is_checkpointing=True))


def test_an_adapter():
    model = new_model()
    get_peft_model(model, expert_lora_config(model, [0, 1], r=4))
    check(model, new_batch(model, 8, 11), make_setup(8, 64, 11))


def test_accumulation_keeps_the_gradients_of_earlier_passes():
    """Two passes before the optimizer's step: gradients and activations exist at the same time."""
    model = new_model(num_layers=8, num_experts=1)
    batch = new_batch(model, 2, 11)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    inputs = [*batch["context"].keys, *batch["context"].values, batch["latents"]]
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        for _ in range(2):
            model(**batch).loss.backward()
    memory = predict(model, make_setup(2, 64, 11, accumulation=2, optimizer="sgd"))
    contexts = sum(tensor.nbytes for tensor in inputs[:-1])
    measured = sum(weight.nbytes for weight in model.parameters()) + 2 * contexts + live.peak
    assert memory.peak == pytest.approx(measured, rel=0.1)
    assert memory.peak > memory.tower + memory.backbone + memory.gradients + memory.activations
    assert memory.gradients == sum(weight.grad.nbytes for weight in trained)


def test_buckets_of_data_parallelism(tmp_path):
    """DistributedDataParallel keeps a second copy of all gradients."""
    model = new_model()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            found = live.live
            del parallel
    finally:
        torch.distributed.destroy_process_group()
    setup = make_setup(8, 64, 11)
    memory = predict(model, replace(setup, num_devices=2))
    assert memory.gradient_buckets == pytest.approx(found, rel=0.01)
    assert predict(model, setup).gradient_buckets == 0


def test_sharding_divides_what_is_the_towers():
    model = new_model()
    setup = make_setup(8, 64, 11, num_devices=4, has_ema=True, ema_on_device=True)
    whole, sharded = predict(model, setup), predict(model, replace(setup, is_sharded=True))
    for part in ("tower", "gradients", "optimizer", "ema"):
        assert getattr(sharded, part) == pytest.approx(getattr(whole, part) / 4, rel=1e-3)
    assert sharded.backbone == whole.backbone and sharded.gradient_buckets == 0
    assert sharded.peak < whole.peak


def test_averages_on_the_cpu():
    model = new_model()
    setup = make_setup(8, 64, 11, has_ema=True, ema_on_device=True)
    on_device, on_cpu = predict(model, setup), predict(model, replace(setup, ema_on_device=False))
    assert on_device.ema == on_cpu.host == on_device.gradients
    assert on_device.peak - on_cpu.peak == on_device.ema


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_the_batch_is_split_as_in_training(batch_size, num_experts, world_size):
    boundaries = [1 - k / num_experts for k in range(num_experts)] + [0.0]
    for rank in range(world_size):
        assigned = assign_examples_to_experts(
            batch_size, list(range(num_experts)), boundaries, rank=rank, world_size=world_size
        )
        expected = [len(examples.indices) for examples in assigned]
        assert rows_per_expert(batch_size, num_experts, rank, world_size) == expected


def test_every_switch_takes_less_or_is_not_offered():
    model = new_model()
    shape = model_shape(model, NO_VAE)
    setup = make_setup(
        64, 64, 11, num_devices=2, has_ema=True, ema_on_device=True, contexts="memory", num_kept_contexts=50
    )
    before = predict(model, setup).peak
    switches = dict(without_memory(setup, shape))
    assert len(switches) >= 7
    for name, changed in switches.items():
        assert predict(model, changed).peak < before, name
    used = replace(
        setup,
        batch_size=2,
        is_sharded=True,
        is_mixed=True,
        is_checkpointing=True,
        optimizer="adamw_8bit",
        ema_on_device=False,
        contexts="cache",
    )
    assert without_memory(used, shape) == []
