# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images of many prompts in a folder: which are generated, by which process, and which a second run keeps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.cli import app
from latte_flow_hf.pipelines.batch_generation import generate_images, image_name, read_prompts
from latte_flow_hf.training import expert_lora_config


PROMPTS = ["a red circle", "a blue square", "a red circle", "A red, circle!", "a handwritten seven"]
CALL = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}
OPTIONS = ("--steps", "2", "--size", "32")


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def test_each_line_gives_the_image_of_its_own_seed(pipeline, prompts, tmp_path):
    arguments = ["generate", "--prompts", str(prompts), "-o", str(tmp_path / "out"), "-m", pipeline, "--seed", "7"]
    result = CliRunner().invoke(app, [*arguments, *OPTIONS])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}: 5 new images, 0 existed"
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name[:6] for path in paths] == [f"{i:05d}-" for i in range(5)]
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    alone = pipe(PROMPTS[2], generator=torch.Generator().manual_seed(7 + 2), **CALL).images[0]
    assert Image.open(paths[2]).tobytes() == alone.tobytes() != Image.open(paths[0]).tobytes()


def test_existing_images_stay_and_missing_ones_are_generated(pipe, tmp_path):
    assert generate_images(pipe, PROMPTS, tmp_path / "out", **CALL) == (5, 0)
    before = bytes_of(tmp_path / "out")
    paths = sorted((tmp_path / "out").iterdir())
    # What a killed run leaves: images are missing, and half of one is in a hidden folder.
    paths[1].unlink()
    (tmp_path / "out" / f".{paths[3].name}.0").mkdir()
    (tmp_path / "out" / f".{paths[3].name}.0" / paths[3].name).write_bytes(paths[3].read_bytes()[:50])
    paths[3].unlink()
    kept = paths[0].stat().st_mtime_ns
    assert generate_images(pipe, PROMPTS, tmp_path / "out", **CALL) == (2, 3)
    assert bytes_of(tmp_path / "out") == before and paths[0].stat().st_mtime_ns == kept
    # More lines leave the first ones unchanged; larger batches are equal up to rounding.
    assert generate_images(pipe, [*PROMPTS, "a cross"], tmp_path / "out", batch_size=3, **CALL) == (1, 5)
    # With any other argument it is another image, with another name.
    assert generate_images(pipe, PROMPTS[:1], tmp_path / "out", seed=1, **CALL) == (1, 0)
    assert generate_images(pipe, PROMPTS[1:2], tmp_path / "out", **CALL) == (1, 0)
    assert generate_images(pipe, PROMPTS[:1], tmp_path / "out", **{**CALL, "guidance_scale": 2.0}) == (1, 0)
    assert generate_images(pipe, PROMPTS[:1], tmp_path / "out", num_images_per_prompt=2, **CALL) == (1, 1)


@pytest.mark.parametrize("end", [0, -20])
def test_a_cut_image_is_made_again(pipe, tmp_path, end, caplog):
    generate_images(pipe, PROMPTS[:2], tmp_path / "out", **CALL)
    before = bytes_of(tmp_path / "out")
    path = min((tmp_path / "out").iterdir())
    path.write_bytes(path.read_bytes()[:end])
    assert generate_images(pipe, PROMPTS[:2], tmp_path / "out", **CALL) == (1, 1)
    assert bytes_of(tmp_path / "out") == before
    assert f"{path.name} is damaged, and is made again" in caplog.text


def test_two_processes_generate_the_bytes_of_one(pipeline, prompts, tmp_path):
    arguments = ["generate", "--prompts", str(prompts), "-m", pipeline, *OPTIONS]
    assert CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "one")]).exit_code == 0
    whole = bytes_of(tmp_path / "one")
    # What is missing is shared out, so that the second process has work, too.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in sorted(whole)[1:]:
        (tmp_path / "two" / name).unlink()
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    run = [sys.executable, "-m", *launch, "-m", "latte_flow_hf.cli", *arguments, "-o", str(tmp_path / "two")]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 new images, 1 existed") == 1
    assert bytes_of(tmp_path / "two") == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "contains no prompt"), (b"\n \n", "no prompt"), (b"\xff\xfea", "UTF-8")],
)
def test_an_invalid_file_of_prompts_is_refused(content, words, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / "prompts.txt")


def test_line_ends_and_space_around_prompts_are_ignored(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle \r\n a cross\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a cross"]


def test_blank_lines_change_no_number(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\na red circle\n \n\na cross\n\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a cross"]


def test_what_decides_an_image_is_in_its_name(own_pipe, tmp_path):
    def generate() -> tuple[int, int]:
        return generate_images(own_pipe, PROMPTS[:1], tmp_path, **CALL)

    assert generate() == (1, 0) and generate() == (0, 1)
    own_pipe.scheduler = LatteFlowScheduler.from_config(own_pipe.scheduler.config, stochastic_sampling=1.0)
    assert generate() == (1, 0)
    config = expert_lora_config(own_pipe.model, [1], r=2, init_lora_weights=False)
    own_pipe.model.add_adapter(config, "a")
    own_pipe.set_adapters("a")
    assert generate() == (1, 0) and generate() == (0, 1)
    own_pipe.set_adapters("a", 0.5)
    assert generate() == (1, 0)
    own_pipe.disable_lora()
    assert generate() == (1, 0)
    own_pipe.enable_lora()
    assert generate() == (0, 1)
    own_pipe.fuse_lora()
    own_pipe.unload_lora_weights()
    assert generate() == (1, 0)
    for component in (own_pipe.vae, own_pipe.model.vlm):
        with torch.no_grad():
            next(component.parameters()).add_(1e-3)
        assert generate() == (1, 0)
    # The same pipeline from another folder has the same images.
    own_pipe.register_to_config(_name_or_path="elsewhere")
    assert generate() == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--prompts", "{tmp}/prompts.txt"), "either a prompt or --prompts"),
        ((), "either a prompt or --prompts"),
        (("--prompts", "{tmp}/none.txt"), "none.txt"),
        (("--prompts", "{tmp}"), "directory"),
        (("--prompts", "{tmp}/prompts.txt", "-o", "{tmp}/prompts.txt"), "is not a folder"),
        (("--prompts", "{tmp}/prompts.txt", "-o", "{tmp}/out.png"), "output must be a folder"),
        (("--prompts", "{tmp}/prompts.txt", "--image", "{tmp}/prompts.txt"), "--image goes with one prompt"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, words, prompts, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = CliRunner().invoke(app, ["generate", *arguments, "-m", str(tmp_path / "nowhere")])
    assert result.exit_code and words in result.stderr and "nowhere" not in result.stderr


def test_nothing_is_written_for_invalid_arguments(pipe, tmp_path):
    for change in ({"num_inference_steps": 0}, {"height": 30}, {"batch_size": 0}, {"num_images_per_prompt": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            generate_images(pipe, PROMPTS, tmp_path / "out", **{**CALL, **change})
    assert list(tmp_path.iterdir()) == []


def test_names_are_short_safe_and_unique():
    hostile = ["../../etc/passwd", "a" * 500, "été — 赤い丸", "???", ""]
    names = [image_name(i, prompt, i, "model", CALL) for i, prompt in enumerate([*PROMPTS, *hostile])]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) < 200 and "/" not in name and not name.startswith(".") for name in names)
    assert names[0] == image_name(0, PROMPTS[0], 0, "model", dict(reversed(CALL.items())))
