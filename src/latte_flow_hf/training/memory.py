# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Memory of one device while a recipe trains, by part: pure functions of shapes and settings."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .costs import (
    DecoderShape,
    Examples,
    Precision,
    TowerShape,
    context_bytes,
    expert_activations,
    half_precision_weights,
    largest_layer_activations,
    layer_work_bytes,
    optimizer_bytes,
    optimizer_work_bytes,
)


@dataclass(frozen=True)
class ModelShape:
    """All that is on a device, and what of it is trained.

    Args:
        tower ([`TowerShape`]): the tower.
        decoder ([`DecoderShape`]): the backbone's decoder.
        experts (`tuple[int, ...]`): those that a step is split over.
        num_backbone, num_autoencoder, num_tower (`int`): numbers of weights; those of adapters count to the tower.
        trained (`tuple[tuple[int, ...], ...]`): the shapes of the weights that are trained.
        num_trained_tower (`int`): how many of them are the tower's.
        num_largest_layer (`int`): weights of the tower's largest layer.
        width, trained_width (`int`): bytes per weight, and per weight that is trained.
    """

    tower: TowerShape
    decoder: DecoderShape
    experts: tuple[int, ...]
    num_backbone: int
    num_autoencoder: int
    num_tower: int
    trained: tuple[tuple[int, ...], ...]
    num_trained: int
    num_trained_tower: int
    num_largest_layer: int
    width: int
    trained_width: int


@dataclass(frozen=True)
class Setup:
    """The settings that decide about memory.

    Args:
        num_devices (`int`): the number of devices.
        is_sharded (`bool`): whether the tower is sharded over them (FSDP2), or each one has all of it.
        batch_size, accumulation (`int`): images per device and pass, and passes per step.
        num_tokens, num_context (`int`): N and T.
        is_mixed (`bool`): whether matrix products are in half precision.
        is_checkpointing (`bool`): whether layers are computed once more in the backward pass.
        optimizer (`str`): see [`costs.optimizer_bytes`].
        has_ema (`bool`): whether weights are averaged.
        ema_on_device (`bool`): whether the averages are on the device.
        contexts (`str`): where the contexts of a batch come from: `"cache"`, `"memory"` (computed once and kept on
            the device) or `"step"` (computed inside of the step).
        num_kept_contexts (`int`): how many prompts are kept in memory.
    """

    num_devices: int
    is_sharded: bool
    batch_size: int
    accumulation: int
    num_tokens: int
    num_context: int
    is_mixed: bool
    is_checkpointing: bool
    optimizer: str
    has_ema: bool
    ema_on_device: bool
    contexts: str
    num_kept_contexts: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part.

    Args:
        backbone, autoencoder, tower (`int`): weights.
        gradients, gradient_buckets (`int`): gradients, and the copies that are exchanged between devices.
        optimizer, ema (`int`): state of the optimizer, and averages on the device.
        half_precision (`int`): copies of weights for matrix products in half precision.
        activations (`int`): what the forward pass keeps for the backward pass.
        contexts (`int`): keys and values of the prompts.
        work (`int`): what is needed for a moment at the peak.
        peak (`int`): the most at once: not all parts exist at the same time.
        peak_moment (`str`): when that is.
        host (`int`): averages in the memory of the machine, for this device.
    """

    backbone: int
    autoencoder: int
    tower: int
    gradients: int
    gradient_buckets: int
    optimizer: int
    ema: int
    half_precision: int
    activations: int
    contexts: int
    work: int
    peak: int
    peak_moment: str
    host: int

    @property
    def parts(self) -> dict[str, int]:
        names = [item.name for item in fields(self) if item.name not in ("peak", "peak_moment", "host")]
        return {name: getattr(self, name) for name in names}


def rows_per_expert(batch_size: int, num_experts: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """How many examples of one process each expert computes, as `flow_matching.assign_examples_to_experts` splits
    the batch of all processes: example i to expert i mod K, at least one each."""
    num_examples, first = world_size * batch_size, rank * batch_size
    # A batch smaller than the number of experts is repeated from its start.
    starts = range(0, max(num_examples, num_experts), num_examples)
    counts = []
    for expert in range(num_experts):
        rows = range(expert, max(num_examples, num_experts), num_experts)
        own = sum(_num_between(rows, start + first, start + first + batch_size) for start in starts)
        counts.append(max(own, 1))
    return counts


def _num_between(numbers: range, low: int, high: int) -> int:
    """How many of rising `numbers` are in [low, high)."""
    return bisect_left(numbers, high) - bisect_left(numbers, low)


def rows_of_devices(batch_size: int, num_experts: int, num_devices: int) -> Counter[tuple[int, ...]]:
    """The different results of [`rows_per_expert`], and how many devices have each."""
    return Counter(tuple(rows_per_expert(batch_size, num_experts, rank, num_devices)) for rank in range(num_devices))


def device_memory(model: ModelShape, setup: Setup, rows: Sequence[int]) -> Memory:
    """Memory of one device.

    Args:
        model ([`ModelShape`]): the model.
        setup ([`Setup`]): the settings.
        rows (`list[int]`): how many examples of a pass each of `model.experts` computes on this device.
    """
    tower, decoder, width = model.tower, model.decoder, model.width
    precision = Precision(width, min(width, 2) if setup.is_mixed else width)
    num_shards = setup.num_devices if setup.is_sharded else 1
    num_trained = model.num_trained - model.num_trained_tower + -(-model.num_trained_tower // num_shards)
    gradients = num_trained * model.trained_width
    optimizer = optimizer_bytes(setup.optimizer, model.trained, model.trained_width) // num_shards
    optimizer_work = optimizer_work_bytes(setup.optimizer, model.trained, model.trained_width) // num_shards
    averages = gradients * setup.has_ema
    exchanges = setup.num_devices > 1 and not setup.is_sharded
    # A sharded layer is gathered while it runs, its gradient until it is spread; the next layer is gathered ahead.
    gathered = 3 * model.num_largest_layer * width * setup.is_sharded
    half = 0 if setup.is_sharded else half_precision_weights(tower, model.experts, precision)

    activations = selected = recomputed = work = 0
    num_layers = len(decoder.layer_weights)
    for expert, num_images in zip(model.experts, rows):
        examples = Examples(num_images, setup.num_tokens, setup.num_context)
        activations += expert_activations(tower, expert, examples, precision, setup.is_checkpointing)
        recomputed = max(recomputed, largest_layer_activations(tower, expert, examples, precision))
        moment = layer_work_bytes(tower, expert, examples, precision)
        work = max(work, moment + context_bytes(decoder, num_images, setup.num_context, width, num_layers))
        if tower.residual_attention == "scores" or setup.is_checkpointing:
            kept_width = width if setup.is_checkpointing else precision.product
            num_own = len(tower.experts[expert])
            selected += context_bytes(decoder, num_images, setup.num_context, kept_width, num_own)
    prompt = context_bytes(decoder, 1, setup.num_context, width, num_layers)
    # The batches of all passes of a step are loaded together; without a cache the next one is computed ahead.
    num_batches = {"cache": setup.accumulation, "memory": setup.accumulation + 1, "step": 0}[setup.contexts]
    batches = prompt * (setup.batch_size * num_batches + setup.num_kept_contexts)

    resident = {
        "backbone": model.num_backbone * width,
        "autoencoder": model.num_autoencoder * width,
        "tower": -(-model.num_tower // num_shards) * width,
        "gradient_buckets": gradients * exchanges,
        "optimizer": optimizer,
        "ema": averages * setup.ema_on_device,
    }
    always = sum(resident.values()) + batches + gathered
    kept = activations + selected
    earlier = gradients * (setup.accumulation > 1)
    # Checkpointing keeps the copies of weights until the forward pass ends, the backward pass makes its own.
    backward_kept = kept + half * (not setup.is_checkpointing)
    moments = {
        "end of the forward pass": (kept + half + earlier, work),
        "backward pass": (
            backward_kept + gradients if earlier else max(backward_kept, gradients),
            recomputed * setup.is_checkpointing,
        ),
        "step of the optimizer": (gradients, optimizer_work),
    }
    moment_name = max(moments, key=lambda name: sum(moments[name]))
    return Memory(
        **resident,
        gradients=gradients,
        half_precision=half,
        activations=activations,
        contexts=batches + selected,
        work=moments[moment_name][1] + gathered,
        peak=always + sum(moments[moment_name]),
        peak_moment=moment_name,
        host=averages * (not setup.ema_on_device),
    )


def without_memory(setup: Setup, model: ModelShape) -> list[tuple[str, Setup]]:
    """The switches that can take less memory, each with the settings after it, from the cheapest to the dearest."""
    switches: list[tuple[str, Setup]] = []
    if setup.has_ema and setup.ema_on_device:
        switches.append(("ema: {device: cpu}", replace(setup, ema_on_device=False)))
    if setup.contexts == "memory":
        switches.append(("data: {cache: FOLDER}", replace(setup, contexts="cache", num_kept_contexts=0)))
    if not setup.is_mixed and model.width == 4:
        switches.append(("training: {bf16: true}", replace(setup, is_mixed=True)))
    if not setup.is_sharded and setup.num_devices > 1:
        switches.append(("accelerate: recipes/accelerate/fsdp2.yaml", replace(setup, is_sharded=True)))
    if not setup.is_checkpointing:
        switches.append(("training: {activation_checkpointing: true}", replace(setup, is_checkpointing=True)))
    if setup.optimizer in ("adamw_torch", "adamw_torch_fused"):
        switches.append(("training: {optim: adamw_8bit}", replace(setup, optimizer="adamw_8bit")))
    batch_size = setup.batch_size
    for divisor in (2, 4, 8, 16, 32, 64):
        # Still an image for each expert.
        if batch_size % divisor == 0 and batch_size // divisor >= len(model.experts):
            accumulation = setup.accumulation * divisor
            name = (
                f"training: {{per_device_train_batch_size: {batch_size // divisor}, gradient_accumulation_steps: "
                f"{accumulation}}}"
            )
            switches.append((name, replace(setup, batch_size=batch_size // divisor, accumulation=accumulation)))
    return switches
