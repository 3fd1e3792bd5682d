"""The script needs a GPU for its figures; everything else of it runs here."""

import runpy
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "planned_step.py"
RECIPE = """
model:
  backbone: {backbone}
  autoencoder: {autoencoder}
  experts: {{num_experts: 2}}
data: {{source: {{path: tinyworld, num_images: 64}}, cache: cache}}
training:
  max_steps: 100
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-3
  optim: adamw_torch
ema: {{decay: 0.9}}
"""


def test_a_gpu_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "recipe.yaml", "--device", "h100"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "no GPU was found" in capsys.readouterr().err


def test_other_kinds_of_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = SCRIPT.parents[1] / "recipes" / "tinyworld" / "distill.yaml"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(recipe), "--device", "h100"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "distill.yaml: distillation has steps of another kind" in capsys.readouterr().err


def test_the_table(tmp_path, own_pipe, monkeypatch, capsys):
    """With the memory of a GPU made up, and all else real."""
    backbone, autoencoder = tmp_path / "backbone", tmp_path / "autoencoder"
    own_pipe.model.vlm.save_pretrained(backbone)
    own_pipe.vae.save_pretrained(autoencoder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(backbone=backbone, autoencoder=autoencoder))
    for name, value in (("is_available", True), ("get_device_name", "a GPU"), ("max_memory_allocated", 2 * 10**9)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 10**9)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr("diffusers.utils.torch_utils.get_device", lambda: "cpu")
    monkeypatch.setattr("latte_flow_hf.training.train.get_device", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(recipe), "--device", "h100", "--steps", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    operations = next(line for line in lines if line.startswith("| operations"))
    assert float(operations.split("|")[-2]) == pytest.approx(1.0, abs=0.1)
    assert any(line.startswith("| peak of the memory, GB") and " 2.00 " in line for line in lines)
