# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`latte-flow convert` and the scripts of the same names, as a user calls them."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.cli import app


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "conversion_scripts").glob("*.py"))


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_every_verb_in_turn(backbone_folder, vae_folder, tmp_path):
    names = ("new", "one.safetensors", "again", "uneven", "regrouped", "flat.safetensors")
    out = {name: tmp_path / name for name in names}
    for arguments in (
        ("init", backbone_folder, vae_folder, "-o", out["new"], "--experts", 3, "--tower-layers", "0,2,3"),
        ("to-single-file", out["new"], "-o", out["one.safetensors"]),
        ("from-single-file", out["one.safetensors"], "-o", out["again"]),
        ("regroup", out["again"], "-o", out["uneven"], "--experts", 2, "--layers-per-expert", "2,1"),
        ("regroup", out["uneven"], "-o", out["regrouped"], "--experts", 1),
        ("to-original", out["regrouped"], "-o", out["flat.safetensors"], "--tower-only"),
        ("from-original", out["flat.safetensors"], out["regrouped"], "-o", tmp_path / "last", "--tower-only"),
        ("extract-backbone", tmp_path / "last", "-o", tmp_path / "backbone"),
    ):
        before = sorted(tmp_path.iterdir())
        dry = run(*arguments, "--dry-run")
        assert dry.exit_code == 0 and "bytes in all" in dry.stdout, dry.output
        assert sorted(tmp_path.iterdir()) == before
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "wrote " in result.stdout and "tensors read back and compared" in result.stdout
        assert "writing" in result.stderr
    config = LatteFlowPipeline.from_pretrained(tmp_path / "last").model.config
    assert (config.num_experts, config.layers_per_expert, config.tower_layers) == (1, [3], [0, 2, 3])
    assert AutoConfig.from_pretrained(out["uneven"] / "model").layers_per_expert == [2, 1]


def test_bad_input_ends_in_one_line(backbone_folder, vae_folder, tmp_path):
    (tmp_path / "out").mkdir()
    for arguments, words in (
        (("init", backbone_folder, vae_folder, "-o", tmp_path / "x", "--experts", 3), "num_experts must divide"),
        (("init", backbone_folder, vae_folder, "-o", tmp_path / "out"), "exists"),
        (
            ("init", backbone_folder, vae_folder, "-o", tmp_path / "x", "--layers-per-expert", "3,1"),
            "layers_per_expert must be num_experts = 4 positive numbers",
        ),
        (("regroup", tmp_path / "none", "-o", tmp_path / "x", "--experts", 2), "there is no folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
        assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_its_verb(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and "--dry-run" in capsys.readouterr().out


def test_there_is_a_script_for_every_verb():
    from latte_flow_cli.checkpoints import convert

    verbs = {command.name.replace("-", "_") for command in convert.registered_commands}
    assert {path.stem for path in SCRIPTS} == verbs and len(verbs) == 7
