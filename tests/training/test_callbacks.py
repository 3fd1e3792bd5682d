"""Callbacks in a run: losses that are not finite, a full disk, sample images; and the intervals of their warmup."""

import resource
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latte_flow_hf.training import IntervalWarmupCallback, last_checkpoint
from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import train


def test_a_loss_that_is_not_finite_stops_with_step_expert_and_batch(recipe, run, tmp_path):
    content = recipe(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 1, "max_steps": 20})
    with pytest.raises(FloatingPointError, match=r"step \d+: .*expert \d is (nan|inf).*\d\d\.png|not finite"):
        run(content, tmp_path)
    checkpoint = last_checkpoint(tmp_path / "work" / "checkpoints")
    if checkpoint is not None:
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_earlier_checkpoints(recipe, run, tmp_path):
    """A limit on the size of files makes writing fail in the same way as a full disk."""
    constant = {"lr_scheduler_type": "constant"}
    run(recipe(training={**constant, "max_steps": 2}), tmp_path)
    settings = Recipe.from_dict(recipe(training=constant))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"saving the checkpoint of step 4 failed.*checkpoint-2"):
            train(settings, tmp_path / "work", tmp_path / "more")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert last_checkpoint(tmp_path / "work" / "checkpoints").name == "checkpoint-2"
    whole = run(recipe(training=constant), tmp_path / "whole")
    assert hash_module(run(recipe(training=constant), tmp_path, "more").model.tower) == hash_module(whole.model.tower)


def test_sample_images_do_not_change_the_run(recipe, run, tmp_path):
    plain = run(recipe(), tmp_path / "plain")
    samples = {
        "prompts": ["a red circle"] * 5,
        "every_steps": 3,
        "call": {"num_inference_steps": 2, "height": 32, "width": 32},
    }
    sampled = run(recipe(samples=samples), tmp_path / "sampled")
    assert hash_module(sampled.model.tower) == hash_module(plain.model.tower)
    folder = tmp_path / "sampled" / "work" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3.png", "step-6.png"]
    assert Image.open(folder / "step-6.png").size == (4 * 32, 2 * 32)
    # Averaged weights are used: the last grid shows what the finished pipeline generates.
    sampled.set_progress_bar_config(disable=True)
    first = sampled("a red circle", generator=torch.Generator().manual_seed(0), **samples["call"]).images[0]
    assert first.tobytes() == Image.open(folder / "step-6.png").crop((0, 0, 32, 32)).tobytes()


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_warmup_has_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        IntervalWarmupCallback(num_steps)


def test_incomplete_checkpoints_are_not_found(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, is_complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
