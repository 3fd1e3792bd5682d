"""A recipe over a few captioned images and a small random pipeline, and its run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import train


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """The folder of twelve captioned images of several sizes; number 5 is truncated."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        shape = (40 + 4 * number, 70, 3)
        path = folder / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        lines.append(json.dumps({"file_name": path.name, "text": f"a red circle number {number % 5}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:900])
    return folder


@pytest.fixture
def recipe(pipeline, images, tmp_path):
    """Makes the content of a recipe of six steps over the images; arguments are merged into its sections."""

    def make(**changes) -> dict:
        content = {
            "model": {"pipeline": pipeline},
            "data": {
                "source": {"path": "imagefolder", "data_dir": str(images), "cache_dir": str(tmp_path / "datasets")},
                "caption": "text",
                "size": 32,
                "flip": True,
            },
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "logging_steps": 2,
                "save_steps": 2,
                "disable_tqdm": True,
            },
            "ema": {"decay": 0.9},
        }
        for name, value in changes.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return content

    return make


@pytest.fixture(scope="session")
def run():
    """Trains with the content of a recipe in `folder`, and loads the resulting pipeline."""

    def run(content: dict, folder: Path, output: str = "out") -> LatteFlowPipeline:
        return LatteFlowPipeline.from_pretrained(train(Recipe.from_dict(content), folder / "work", folder / output))

    return run


@pytest.fixture(scope="session")
def read_log():
    """Reads what a run in `folder` logged."""
    return lambda folder: json.loads((folder / "work" / "log.json").read_text())
