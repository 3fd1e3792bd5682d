# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`latte-flow evaluate generate` and `latte-flow evaluate round-trip`."""

import json

import pytest
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf.evaluation import tinyworld


def run(*arguments: str):
    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_generate_writes_the_images_of_a_benchmark_once(pipeline, tmp_path):
    file = tmp_path / "captions.csv"
    file.write_text("image_id,text\n3,a red circle\n5,a blue cross\n")
    arguments = ["generate", "coco", str(file), "-m", pipeline, "-o", str(tmp_path / "out"), "--steps", "2"]
    result = run(*arguments, "--num-prompts", "1", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'images'}: 1 new files, 0 existed"
    event = json.loads(run(*arguments, "--json").stdout)
    assert event == {"folder": str(tmp_path / "out" / "images"), "num_new": 1, "num_existing": 1}
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["3.png", "5.png"]
    refused = run(*arguments, "--seed", "1")
    assert refused.exit_code == 1 and "seed was 0 and is 1" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "coco", "{tmp}/bad.csv", "-o", "{tmp}/out"), "must name the columns"),
        (("generate", "geneval", "{tmp}", "-o", "{tmp}/out"), "got the folder"),
        (("generate", "coco", "{tmp}/none.csv", "-o", "{tmp}/out"), "none.csv"),
        (("generate", "genval", "{tmp}/bad.csv", "-o", "{tmp}/out"), "genval"),
        (("generate", "coco", "{tmp}/bad.csv", "-o", "{tmp}/bad.csv"), "is not a folder"),
        (("generate", "coco", "{tmp}/bad.csv", "-o", "{tmp}/full"), "no run.json"),
        (("round-trip", "-o", "{tmp}/out.txt"), "must be a .json file"),
        (("round-trip", "-o", "{tmp}/folder.json"), "folder.json exists"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, words, tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"")
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments), "-m", str(tmp_path / "nowhere"))
    assert result.exit_code and words in result.stderr and "nowhere" not in result.stderr


def test_round_trip_reports_and_writes(pipeline, tmp_path, monkeypatch):
    prompts = tinyworld.generation_prompts
    monkeypatch.setattr(tinyworld, "generation_prompts", lambda seed: prompts(seed, 2, 2, 2, 2))
    result = run("round-trip", "-m", pipeline, "--steps", "2", "-o", str(tmp_path / "trip.json"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and lines[0].startswith("one object") and lines[-1].startswith("image wrong")
    written = json.loads((tmp_path / "trip.json").read_text())
    assert written["seed"] == 1 and written["round_trip"]["digit"]["count"] == 2
