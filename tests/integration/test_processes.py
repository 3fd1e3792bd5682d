"""Two processes against one: the same losses and weights from the same global batch, replicated and sharded.

The runs are real ones of `accelerate launch`, on CPU by gloo, over a small random pipeline.
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

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training import encode_prompts, last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.sharding import check_sharding
from latte_flow_hf.training.train import Recipe, train


CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def sections(pipeline, tmp_path_factory):
    """A recipe of four steps over 16 captioned pictures, the global batch 4; `merge` changes it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(16):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": "a red circle" + " left" * (number % 5)}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    source = {"path": "imagefolder", "data_dir": str(folder / "pictures"), "cache_dir": str(folder / "datasets")}

    def make(**merge) -> dict:
        made = {
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
        for name, value in merge.items():
            made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
        return made

    return make


# `latte-flow`, with so few pictures in a shard of the cache that both processes have some.
PROGRAM = """
from latte_flow_hf import cli
from latte_flow_hf.training import cache

cache.SHARD_SIZE = 4
cli.app()
"""


def start(sections: dict, folder: Path, config: str) -> subprocess.Popen:
    """What a user types to train with two processes; results go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
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
    """As a machine that fails: the launcher and all that it started, at once. What they had said is returned."""
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return process.communicate()[0]


def launch(sections: dict, folder: Path, config: str) -> LatteFlowPipeline:
    process = start(sections, folder, config)
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, said
    return LatteFlowPipeline.from_pretrained(folder / "out")


def run(sections: dict, folder: Path) -> LatteFlowPipeline:
    return LatteFlowPipeline.from_pretrained(train(Recipe.from_dict(sections), folder / "work", folder / "out"))


def losses(folder: Path) -> list[dict]:
    """What was logged at each step, but for the time it took."""
    log = json.loads((folder / "work" / "log.json").read_text())
    return [{name: entry[name] for name in entry if "loss" in name} for entry in log if "train_runtime" not in entry]


def assert_same_run(one: Path, two: Path) -> None:
    assert len(losses(one)) == len(losses(two)) > 0
    for expected, found in zip(losses(one), losses(two)):
        assert found == pytest.approx(expected, rel=1e-5)


def assert_same_tower(one: LatteFlowPipeline, two: LatteFlowPipeline) -> None:
    expected = one.model.tower.state_dict()
    for name, tensor in two.model.tower.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "num_processes", "num_experts"), [(4, 2, 2), (2, 2, 4), (6, 3, 4), (1, 2, 4)])
def test_the_mean_over_processes_is_the_loss_of_one(
    make_model, processor, monkeypatch, size, num_processes, num_experts
):
    """Shares that divide by the experts, that hold some of them only, and a global batch smaller than K."""
    model = make_model(num_experts=num_experts)
    prompts = [f"a red circle{' left' * (i % 3)}" for i in range(size * num_processes)]
    context = encode_prompts(model, processor, prompts)
    latents = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def loss(rows: slice) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        part = context.select(torch.arange(len(prompts))[rows])
        total, experts = model.flow_loss(latents[rows], part, generator=torch.Generator().manual_seed(1))
        total.backward()
        # Every weight is reached by every process, or the others would wait for it.
        return total.detach(), experts, [weight.grad.clone() for weight in model.tower.parameters()]

    whole = loss(slice(None))
    shares = []
    for index in range(num_processes):
        for name, value in (("is_initialized", True), ("get_rank", index), ("get_world_size", num_processes)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        shares.append(loss(slice(index * size, (index + 1) * size)))
    total, experts, gradients = zip(*shares)
    torch.testing.assert_close(torch.stack(total).mean(), whole[0])
    torch.testing.assert_close(torch.stack(experts).mean(dim=0), whole[1])
    for found, expected in zip(zip(*gradients), whole[2]):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), expected, rtol=1e-4, atol=1e-6)


def test_two_processes_log_the_losses_and_learn_the_weights_of_one(sections, tmp_path):
    """Prompts drop out as they do in one process; a share of one example a step holds one expert's alone."""
    change = {
        "trainable": "vlm",
        "understanding": {"source": {"path": "tinyworld", "num_conversations": 20}, "share": 1.0},
    }
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    one = run(sections(**change, training=settings), tmp_path / "one")
    settings["per_device_train_batch_size"] = 1
    two = launch(sections(**change, training=settings), tmp_path / "two", "cpu")
    assert any("lm_loss" in entry for entry in losses(tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_tower(one, two)


def test_sharded_and_killed_a_run_ends_as_one_process_that_was_never_stopped(sections, tmp_path):
    """FSDP2 by the recipe's configuration, with a cache, averages and sample pictures."""
    samples = {"prompts": ["a red circle"], "every_steps": 3, "call": {"num_inference_steps": 2}}
    one = run(sections(samples=samples, training={"max_steps": 6}), tmp_path / "one")
    data = {"cache": str(tmp_path / "cache"), "cache_contexts": False}
    settings = {"max_steps": 6, "per_device_train_batch_size": 2}
    recipe = sections(samples=samples, data=data, training=settings)
    process = start(recipe, tmp_path / "two", "fsdp2")
    checkpoints = tmp_path / "two" / "work" / "checkpoints"
    while process.poll() is None and last_checkpoint(checkpoints) is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    killed_at = last_checkpoint(checkpoints)
    assert not (tmp_path / "two" / "out").exists()

    # Weights are in shards, and nothing else: each process wrote its own half of the tower, and of its averages.
    weights = sorted(path.stat().st_size for path in (killed_at / "pytorch_model_fsdp_0").glob("*.distcp"))
    learned = sum(4 * weight.numel() for weight in one.model.tower.parameters())
    assert len(weights) == 2 and weights[0] >= 0.4 * learned
    assert not list(killed_at.glob("*.safetensors"))
    averages = [
        sum(path.stat().st_size for path in (killed_at / "ema" / f"0000{i}-of-00002").iterdir()) for i in (1, 2)
    ]
    assert all(0.4 * learned < size < 0.7 * learned for size in averages)

    # The cache, too, goes on where it was stopped.
    (tmp_path / "cache" / "index.json").unlink()
    (tmp_path / "cache" / "latents-000000008.safetensors").unlink()
    two = launch(recipe, tmp_path / "two", "fsdp2")
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 4
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_tower(one, two)
    assert hash_module(one.model.vlm) == hash_module(two.model.vlm)
    assert type(two.model).__name__ in (tmp_path / "two" / "out" / "model" / "config.json").read_text()
    painted = [np.asarray(Image.open(tmp_path / name / "work" / "samples" / "step-6.png")) for name in ("one", "two")]
    assert np.abs(painted[0].astype(int) - painted[1]).max() <= 4
    files = [
        sorted(p.relative_to(tmp_path / n / "out") for p in (tmp_path / n / "out").rglob("*")) for n in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("FSDP_VERSION", "1", "fsdp_version must be 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "must be false")],
)
def test_sharding_that_would_go_wrong_is_refused(variable, value, words, monkeypatch):
    right = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, setting in {**right, variable: value}.items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(ValueError, match=words):
        check_sharding()
