# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How much lower precision changes the velocity, and how much memory it saves.

    python benchmarks/precision.py
    python benchmarks/precision.py --model FOLDER

The error is relative: |found - expected| / |expected|, the largest of five timesteps, on a CPU. The last row is the
change when the prompt changes instead, the smallest of the five.
"""

import argparse
import copy

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline, tiny_checkpoint


TIMESTEPS = (999.0, 730.0, 600.0, 210.0, 3.0)
PROMPTS = ("a red circle", "a blue square")
HALF = (torch.float16, torch.bfloat16)
CAST = (torch.float8_e4m3fn, torch.float8_e5m2)


def velocities(model: LatteFlowForConditionalGeneration, inputs: dict, size: int) -> torch.Tensor:
    """The velocities at all timesteps, shape (timesteps, channels, height, width), in float32."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, model.config.latent_channels, size, size, generator=generator).to(model.dtype)
    with torch.no_grad():
        context = model.encode_context(**inputs)
        return torch.cat([model.predict_velocity(latents, timestep, context).float() for timestep in TIMESTEPS])


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The relative error at each timestep."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def num_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def measure(folder: str) -> list[tuple[str, float, float | None]]:
    """Rows of (name, error of the velocity, size of the tower relative to float32 or `None`)."""
    pipe = LatteFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    model, processor = pipe.model, pipe.processor
    size = pipe.default_size // pipe.vae_scale_factor
    inputs, other = (processor.encode_conversations([processor.conversation(prompt)]) for prompt in PROMPTS)
    expected, full = velocities(model, inputs, size), num_bytes(model.tower)
    rows: list[tuple[str, float, float | None]] = []

    def add(name: str, changed: LatteFlowForConditionalGeneration, tower_bytes: int | None) -> None:
        error = errors(velocities(changed, inputs, size), expected).max().item()
        rows.append((name, error, None if tower_bytes is None else tower_bytes / full))

    def load(**arguments) -> LatteFlowForConditionalGeneration:
        return LatteFlowForConditionalGeneration.from_pretrained(folder, subfolder="model", **arguments)

    for dtype in HALF:
        half = load(dtype=dtype)
        add(str(dtype).removeprefix("torch."), half, num_bytes(half.tower))
    int8 = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    # The size of quantized tensors is not that of their elements.
    add("int8 (torchao), tower and backbone", load(dtype=torch.float32, quantization_config=int8), None)
    for storage_dtype in CAST:
        cast = copy.deepcopy(model)
        cast.enable_layerwise_casting(storage_dtype=storage_dtype)
        name = str(storage_dtype).removeprefix("torch.")
        add(f"layerwise casting of the tower, {name}", cast, num_bytes(cast.tower))
    rows.append(("another prompt", errors(velocities(model, other, size), expected).min().item(), None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-m", "--model", default=None, help="Folder of a pipeline; defaults to the embedded checkpoint."
    )
    options = parser.parse_args()
    print("| Weights | Error of the velocity | Size of the tower |\n|---|---|---|")
    for name, error, share in measure(options.model or tiny_checkpoint()):
        print(f"| {name} | {error:.1%} | {'-' if share is None else f'{share:.0%}'} |")


if __name__ == "__main__":
    main()
