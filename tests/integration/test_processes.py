"""Two processes have the same losses and weights as one with the same global batch, replicated and sharded.

They are started by `accelerate launch`, on a CPU with gloo, and train a small random pipeline.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training import encode_prompts, last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import train


CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def recipe(pipeline, tmp_path_factory):
    """Makes the content of a recipe of four steps with a global batch of 4; arguments are merged into its sections."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(16):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": "a red circle" + " left" * (number % 5)}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    source = {"path": "imagefolder", "data_dir": str(folder / "images"), "cache_dir": str(folder / "datasets")}

    def make(**changes) -> dict:
        content = {
            "model": {"pipeline": pipeline},
            "data": {"source": source, "caption": "text", "size": 32, "flip": True},
            "prompt_dropout": 0.5,
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "save_steps": 2,
                "disable_tqdm": True,
            },
            "ema": {"decay": 0.9},
        }
        for name, value in changes.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return content

    return make


# `latte-flow`, with cache shards so small that both processes have some.
PROGRAM = """
from latte_flow_hf import cli
from latte_flow_hf.training import cache

cache.SHARD_SIZE = 4
cli.app()
"""


def start(content: dict, folder: Path, config: str) -> subprocess.Popen:
    """Start training with two processes as a user does; results go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    (folder / "program.py").write_text(PROGRAM)
    launch = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    arguments = ["train", str(folder / "recipe.yaml"), "-o", str(folder / "out"), "--work-dir", str(folder / "work")]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, str(folder / "program.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen) -> str:
    """Kill the launcher and its children at once, as if the machine failed, and return their output."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for child in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return process.communicate()[0]


def launch(content: dict, folder: Path, config: str) -> LatteFlowPipeline:
    process = start(content, folder, config)
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, output
    return LatteFlowPipeline.from_pretrained(folder / "out")


def run(content: dict, folder: Path) -> LatteFlowPipeline:
    return LatteFlowPipeline.from_pretrained(train(Recipe.from_dict(content), folder / "work", folder / "out"))


def losses(folder: Path) -> list[dict]:
    """The losses that were logged at each step."""
    log = json.loads((folder / "work" / "log.json").read_text())
    return [{name: entry[name] for name in entry if "loss" in name} for entry in log if "train_runtime" not in entry]


def assert_same_run(one: Path, two: Path) -> None:
    assert len(losses(one)) == len(losses(two)) > 0
    for expected, actual in zip(losses(one), losses(two)):
        assert actual == pytest.approx(expected, rel=1e-5)


def assert_same_tower(one: LatteFlowPipeline, two: LatteFlowPipeline) -> None:
    expected = one.model.tower.state_dict()
    for name, tensor in two.model.tower.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "num_processes", "num_experts"), [(4, 2, 2), (2, 2, 4), (6, 3, 4), (1, 2, 4)])
def test_the_mean_over_processes_is_the_loss_of_one(
    make_model, processor, monkeypatch, size, num_processes, num_experts
):
    """Local batches with all experts, with some of them, and a global batch smaller than K."""
    model = make_model(num_experts=num_experts)
    prompts = [f"a red circle{' left' * (i % 3)}" for i in range(size * num_processes)]
    context = encode_prompts(model, processor, prompts)
    latents = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def loss(rows: slice) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        part = context.select(torch.arange(len(prompts))[rows])
        total, experts = model.flow_loss(latents[rows], part, generator=torch.Generator().manual_seed(1))
        total.backward()
        # Every weight has a gradient in every process, or the other processes would wait for it.
        return total.detach(), experts, [weight.grad.clone() for weight in model.tower.parameters()]

    expected_loss = loss(slice(None))
    local_losses = []
    for index in range(num_processes):
        for name, value in (("is_initialized", True), ("get_rank", index), ("get_world_size", num_processes)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        local_losses.append(loss(slice(index * size, (index + 1) * size)))
    total, experts, gradients = zip(*local_losses)
    torch.testing.assert_close(torch.stack(total).mean(), expected_loss[0])
    torch.testing.assert_close(torch.stack(experts).mean(dim=0), expected_loss[1])
    for local_gradients, expected in zip(zip(*gradients), expected_loss[2]):
        torch.testing.assert_close(torch.stack(local_gradients).mean(dim=0), expected, rtol=1e-4, atol=1e-6)


def test_two_processes_have_the_losses_and_weights_of_one(recipe, tmp_path):
    """Prompts are dropped as in one process; a local batch of one example belongs to a single expert."""
    change = {
        "trainable": "vlm",
        "understanding": {"source": {"path": "tinyworld", "num_conversations": 20}, "share": 1.0},
    }
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    one = run(recipe(**change, training=settings), tmp_path / "one")
    settings["per_device_train_batch_size"] = 1
    two = launch(recipe(**change, training=settings), tmp_path / "two", "cpu")
    assert any("lm_loss" in entry for entry in losses(tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_tower(one, two)


def test_two_processes_distil_the_trajectories_and_weights_of_one(recipe, tmp_path):
    """Each process generates its share of the trajectories, with new noise between the steps."""
    content = recipe(training={"max_steps": 2})
    del content["prompt_dropout"]
    distillation = {"teacher_steps": [2, 2], "guidance_scale": 2.0, "new_noise": [0.5, 0.0], "batch_size": 3}

    def distil(folder: Path, batch_size: int) -> dict:
        data = {**content["data"], "flip": False, "cache": str(folder / "trajectories")}
        training = {**content["training"], "per_device_train_batch_size": batch_size}
        return {**content, "data": data, "training": training, "distillation": distillation}

    one = run(distil(tmp_path / "one", 4), tmp_path / "one")
    two = launch(distil(tmp_path / "two", 2), tmp_path / "two", "cpu")
    files = [sorted((tmp_path / name / "trajectories").glob("trajectories-*")) for name in ("one", "two")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 6
    for first, second in zip(*files):
        torch.testing.assert_close(load_file(second)["states"], load_file(first)["states"], rtol=1e-5, atol=1e-5)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_tower(one, two)
    assert two.model.config.sampling == one.model.config.sampling


def test_a_killed_sharded_run_ends_like_an_uninterrupted_process(recipe, tmp_path):
    """FSDP2 with the configuration in recipes/, a cache, averages and sample images."""
    samples = {"prompts": ["a red circle"], "every_steps": 3, "call": {"num_inference_steps": 2}}
    one = run(recipe(samples=samples, training={"max_steps": 6}), tmp_path / "one")
    data = {"cache": str(tmp_path / "cache"), "cache_contexts": False}
    settings = {"max_steps": 6, "per_device_train_batch_size": 2}
    content = recipe(samples=samples, data=data, training=settings)
    process = start(content, tmp_path / "two", "fsdp2")
    checkpoints = tmp_path / "two" / "work" / "checkpoints"
    while process.poll() is None and last_checkpoint(checkpoints) is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    killed_at = last_checkpoint(checkpoints)
    assert not (tmp_path / "two" / "out").exists()

    # Each process has saved its half of the tower and of the averages, and nothing else.
    weights = sorted(path.stat().st_size for path in (killed_at / "pytorch_model_fsdp_0").glob("*.distcp"))
    trained_bytes = sum(4 * weight.numel() for weight in one.model.tower.parameters())
    assert len(weights) == 2 and weights[0] >= 0.4 * trained_bytes
    assert not list(killed_at.glob("*.safetensors"))
    averages = [
        sum(path.stat().st_size for path in (killed_at / "ema" / f"0000{i}-of-00002").iterdir()) for i in (1, 2)
    ]
    assert all(0.4 * trained_bytes < size < 0.7 * trained_bytes for size in averages)

    # The cache is completed, too.
    (tmp_path / "cache" / "index.json").unlink()
    (tmp_path / "cache" / "latents-000000008.safetensors").unlink()
    two = launch(content, tmp_path / "two", "fsdp2")
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 4
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_tower(one, two)
    assert hash_module(one.model.vlm) == hash_module(two.model.vlm)
    assert type(two.model).__name__ in (tmp_path / "two" / "out" / "model" / "config.json").read_text()
    images = [np.asarray(Image.open(tmp_path / name / "work" / "samples" / "step-6.png")) for name in ("one", "two")]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 4
    files = [
        sorted(p.relative_to(tmp_path / n / "out") for p in (tmp_path / n / "out").rglob("*")) for n in ("one", "two")
    ]
    assert files[0] == files[1]
