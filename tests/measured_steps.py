# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Real training steps of small models, and what torch measures of them: the oracle of the formulas of a plan."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte_flow_hf import LatteFlowForConditionalGeneration


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that are made inside the block and still alive, and the most at once.

    (Not torch's own `MemTracker`, which fails on weights that are frozen.)
    """

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self._known: Any = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)
        self.live = self.peak = 0

    def _remove(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage)
                weakref.finalize(storage, self._remove, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return output


@dataclass
class MeasuredBytes:
    """Bytes of a step: of weights, of what is given to it, of gradients and of the optimizer's state, what the forward
    pass leaves, and the most at once, all of these included."""

    weights: int
    inputs: int
    gradients: int
    optimizer: int
    kept: int
    peak: int


def new_model(
    hidden_size: int = 64,
    intermediate_size: int = 160,
    num_layers: int = 4,
    num_heads: int = 4,
    num_experts: int = 2,
    latent_channels: int = 32,
    **config: Any,
) -> LatteFlowForConditionalGeneration:
    """A random model of the classes of the paper's, with 2 key-value heads."""
    half = hidden_size // num_heads // 2
    text_config = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half - 2 * (half // 4), half // 4, half // 4],
        },
    }
    vision_config = {"depth": 1, "embed_dim": 32, "hidden_size": hidden_size, "num_heads": 4}
    torch.manual_seed(0)
    backbone = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text_config, vision_config=vision_config))
    return LatteFlowForConditionalGeneration.from_vlm(
        backbone, num_experts=num_experts, latent_channels=latent_channels, **config
    ).train()


def new_batch(
    model: LatteFlowForConditionalGeneration, num_images: int, num_context: int, side: int = 8, cached: bool = True
) -> dict[str, Any]:
    """Latents, and prompts of which the first one is shorter; `cached` encodes them before the step."""
    generator = torch.Generator().manual_seed(1)
    # Every small backbone embeds them, and none is a special token.
    ids = torch.randint(2, 50, (num_images, num_context), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    prompts: Any = {"input_ids": ids, "attention_mask": mask}
    latents = torch.randn(num_images, model.config.latent_channels, side, side, generator=generator).to(model.dtype)
    return {"latents": latents, "context": model.encode_context(**prompts) if cached else prompts}


def measured_bytes(model: Any, batch: dict[str, Any], is_mixed: bool = False) -> MeasuredBytes:
    """Measure a training step with AdamW, after one that makes the state of the optimizer."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    inputs, weights = list(_tensors(batch)), [*model.parameters(), *model.buffers()]
    with LiveBytes([*weights, *states, *inputs]) as live:
        with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
            loss = model(**batch).loss
        kept = live.live
        loss.backward()
        del loss
        gradients = _bytes(weight.grad for weight in trained if weight.grad is not None)
        optimizer.step()
    optimizer.zero_grad()
    resident = [_bytes(weights), _bytes(inputs), _bytes(states)]
    return MeasuredBytes(
        weights=resident[0],
        inputs=resident[1],
        gradients=gradients,
        optimizer=resident[2],
        kept=kept,
        peak=sum(resident) + live.peak,
    )


def measured_flops(model: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """Operations of a training step: of the forward pass, and of both passes."""
    with count_flops() as counter:
        loss = model(**batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Torch's counter; attention runs as matrix products, since it does not count the fused kernel of CPUs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif hasattr(values, "keys") and hasattr(values, "values"):
        yield from (*values.keys, *values.values, values.attention_mask, values.next_position)
