# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The time of a training epoch with and without a cache of latents and contexts, at tiny size.

Both runs train the embedded checkpoint. The time is measured by the Trainer, without loading the model and filling the
cache.
"""

import argparse
import json
import tempfile
from pathlib import Path

from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import train


def measure_epoch(folder: Path, options: argparse.Namespace, cache: Path | None) -> float:
    recipe = {
        "model": {"pipeline": "tinyworld", "attn_implementation": "eager"},
        "data": {
            "source": {"path": "tinyworld", "num_images": options.num_images},
            "encode_batch_size": options.encode_batch_size,
            "cache": None if cache is None else str(cache),
        },
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 64,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    train(Recipe.from_dict(recipe), folder / "work", folder / "out")
    return json.loads((folder / "work" / "log.json").read_text())[-1]["train_runtime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--encode-batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = []
        for number in range(options.rounds):
            plain = measure_epoch(folder / f"plain-{number}", options, None)
            cached = measure_epoch(folder / f"cached-{number}", options, folder / "cache")
            ratios.append(plain / cached)
            print(f"an epoch of {options.num_images} images: {plain:.1f} s without, {cached:.1f} s with a cache")
        print(f"ratio: {min(ratios):.2f} at least")


if __name__ == "__main__":
    main()
