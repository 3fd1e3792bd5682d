# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The time of a training step with K experts, compared with the vanilla model (K = 1) at the same batch size.

Both are random models of medium size (12 layers of width 512). They alternate step by step, so that a busy machine
slows both alike, and the medians are compared. A step is that of the Trainer: loss, gradients, clipping, fused AdamW.
With `--cached` the contexts of the prompts are computed in advance, as with the cache of a recipe; without it in each
step.
"""

import argparse
import statistics
import time

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte_flow_hf import LatteFlowForConditionalGeneration


def new_model(num_experts: int) -> LatteFlowForConditionalGeneration:
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 512, "num_heads": 4},
    )
    torch.manual_seed(0)
    return LatteFlowForConditionalGeneration.from_vlm(
        Qwen2VLForConditionalGeneration(config), num_experts=num_experts, latent_channels=32
    ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cached", action="store_true", help="compute the contexts of the prompts in advance")
    options = parser.parse_args()
    models = {count: new_model(count) for count in (options.experts, 1)}
    optimizers = {k: torch.optim.AdamW(model.tower.parameters(), lr=1e-4, fused=True) for k, model in models.items()}
    prompts = torch.randint(0, 500, (options.batch, 32))
    latents = torch.randn(options.batch, 32, 8, 8)
    inputs = {
        k: {"context": model.encode_context(prompts)} if options.cached else {"input_ids": prompts}
        for k, model in models.items()
    }
    seconds: dict[int, list[float]] = {count: [] for count in models}
    for step in range(options.steps + 1):
        for count, model in models.items():
            start = time.perf_counter()
            model(**inputs[count], latents=latents).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.tower.parameters(), 1.0)
            optimizers[count].step()
            optimizers[count].zero_grad()
            # The first step is a warmup.
            if step:
                seconds[count].append(time.perf_counter() - start)
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    for count, median in medians.items():
        print(f"K = {count}: {median:.3f} s per step (median of {options.steps}, batch {options.batch})")
    print(f"ratio: {medians[options.experts] / medians[1]:.3f}")


if __name__ == "__main__":
    main()
