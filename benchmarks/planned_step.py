# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Training steps of a recipe at full size on a GPU, and what `latte-flow plan` says: memory, operations, time.

    python benchmarks/planned_step.py recipes/imagenet256.yaml --device h100

Weights, latents and prompts are random and have the sizes of the recipe, so that nothing is downloaded. The steps are
those of the Trainer, with the recipe's optimizer, precision and averages; the contexts of the prompts are in main
memory, as with a cache.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import get_device
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from latte_flow_hf.training.callbacks import EMACallback
from latte_flow_hf.training.devices import find_device
from latte_flow_hf.training.plan import build_models, make_plan
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import RecipeTrainer, training_arguments


class StepTimes(TrainerCallback):
    """Seconds of each step, all work of the accelerator included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.accelerator.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--device", required=True, help="name of the device for the plan, as of `latte-flow plan`")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU was found; its memory is what this script measures.")
    if torch.cuda.device_count() > 1:
        parser.error("several GPUs are visible, which the Trainer would all use; choose one by CUDA_VISIBLE_DEVICES.")
    recipe = Recipe.from_yaml(options.recipe)
    for section in ("distillation", "folded_guidance_scale", "understanding"):
        if getattr(recipe, section) is not None:
            parser.error(f"{options.recipe}: {section} has steps of another kind, which this script does not make.")
    plan = make_plan(recipe, find_device(options.device), prompt_tokens=options.prompt_tokens)
    model, vae = build_models(recipe, device=get_device())

    batch_size = plan.batch["per_device"]
    side = round(plan.assumptions["latent_tokens"] ** 0.5) * model.config.latent_patch_size
    # Ordinary tokens of every backbone.
    ids = torch.randint(2, 50, (batch_size, options.prompt_tokens), device=model.device)
    context = model.encode_context(input_ids=ids, attention_mask=torch.ones_like(ids)).to("cpu")
    latents = torch.randn(batch_size, model.config.latent_channels, side, side)

    # One pass of a step, counted outside of the steps that are timed.
    with FlopCounterMode(display=False) as counter:
        model(latents=latents.to(model.device), context=context.to(model.device)).loss.backward()
    model.zero_grad()

    times = StepTimes()
    update = {"max_steps": options.steps, "save_strategy": "no", "logging_strategy": "no", "dataloader_num_workers": 0}
    recipe = recipe.model_copy(update={"training": {**recipe.training, **update}})
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecipeTrainer(
            model,
            training_arguments(recipe, Path(folder)),
            train_dataset=[{}] * (plan.batch["per_step"] * options.steps),
            data_collator=lambda examples: {"latents": latents, "context": context},
        )
        if recipe.ema is not None:
            trainer.add_callback(EMACallback(recipe.ema.decay, recipe.ema.device))
        # After the averages.
        trainer.add_callback(times)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = statistics.median(times.seconds[options.steps // 2 :])
    peak = torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    operations = plan.batch["accumulation"] * counter.get_total_flops()
    planned_seconds = 3600 * (plan.hours["training"] + plan.hours["update"]) / plan.steps
    print(f"{options.recipe.name} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| | plan | measured | measured / plan |")
    print("|---|---|---|---|")
    rows = [
        ("peak of the memory, GB", plan.memory.peak / 1e9, peak / 1e9),
        ("reserved by torch, GB", plan.memory.peak / 1e9, reserved / 1e9),
        ("operations per step, TFLOP", plan.flops["step"] / 1e12, operations / 1e12),
        ("time per step, ms", 1e3 * planned_seconds, 1e3 * seconds),
    ]
    for name, planned, measured in rows:
        print(f"| {name} | {planned:.2f} | {measured:.2f} | {measured / planned:.3f} |")
    print(f"autoencoder included in both: {sum(weight.nbytes for weight in vae.parameters()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
