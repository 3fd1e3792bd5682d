"""The commands and the Python code in the guides run, at a size that takes seconds."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf.cli import app


GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def smaller(recipe: str) -> str:
    sections = yaml.safe_load(recipe)
    if sections["data"]["source"]["path"] == "tinyworld":
        sections["data"]["source"]["num_images"] = 8
    sections["training"].update(max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_steps=1)
    sections["samples"].update(every_steps=2, call={"num_inference_steps": 2})
    return yaml.safe_dump(sections)


def test_the_guide_to_images_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kinds = []
    for kind, _, text in BLOCK.findall((GUIDES / "images_in_prompts.md").read_text()):
        kinds.append(kind)
        if kind == "python":
            exec(compile(text, "images_in_prompts.md", "exec"), {})
        else:
            _, *arguments = shlex.split(text)
            outcome = CliRunner().invoke(app, arguments)
            assert outcome.exit_code == 0 and "a red circle" in outcome.output
    assert kinds == ["python", "sh", "python", "python", "python"]
    printed = capsys.readouterr().out
    assert "a red circle\nred\n" in printed and "[ 1,  4, 12]" in printed


@pytest.mark.parametrize("guide", ["solvers", "threads"])
def test_the_python_code_of_a_guide_runs(guide):
    blocks = BLOCK.findall((GUIDES / f"{guide}.md").read_text())
    assert [kind for kind, _, _ in blocks] == ["python"]
    names: dict = {}
    exec(compile(blocks[0][2].replace("range(8)", "range(2)"), f"{guide}.md", "exec"), names)
    images = names["images"] if guide == "threads" else [names["image"]]
    assert all(image.size == (64, 64) for image in images)


@pytest.mark.parametrize(("guide", "result"), [("train_from_a_vlm", "red-circle.png"), ("add_a_class", "star.png")])
def test_a_guide_runs_as_it_stands(guide, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    kinds = []
    for kind, title, text in BLOCK.findall((GUIDES / f"{guide}.md").read_text()):
        kinds.append(kind)
        if kind == "python":
            text = text.replace("num_images=200", "num_images=6").replace("range(400)", "range(12)")
            exec(compile(text, f"{guide}.md", "exec"), {})
        elif kind == "yaml":
            Path(title).write_text(smaller(text))
        elif kind == "sh":
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "latte-flow"
                arguments += ["--steps", "2"] if arguments[0] == "generate" else []
                outcome = CliRunner().invoke(app, arguments)
                assert outcome.exit_code == 0, outcome.output
    assert {"python", "yaml", "sh"} <= set(kinds)
    assert Image.open(result).size == (64, 64)
