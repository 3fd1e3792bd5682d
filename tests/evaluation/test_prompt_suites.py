# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Prompt files in the formats of their authors become folders that their evaluators read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.evaluation.prompt_suites import SUITES, generate_suite, read_suite
from latte_flow_hf.folder_lock import lock_folder
from latte_flow_hf.pipelines.image_metadata import read_metadata


CALL = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "bird", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bird left of a cup",
    },
]
CULTURE = [{"Prompt": "A red circle", "Explanation": "x", "Category": "c", "Subcategory": "s", "prompt_id": 2}]
SCIENCE = [{"Prompt": "A cross", "Explanation": "x", "Category": "c", "Subcategory": "s", "prompt_id": 641}]
MJHQ = {"0a1b": {"category": "animals", "prompt": "a cat"}, "ff00": {"category": "food", "prompt": "a pear"}}

# The files below `images/` that belong to the prompts below.
LAYOUTS = {
    "geneval": {
        *(f"{i:05d}/samples/{j:05d}.png" for i in range(2) for j in range(4)),
        "00000/metadata.jsonl",
        "00001/metadata.jsonl",
    },
    "dpg-bench": {"12.png", "COCOval2014000000010363.png"},
    "wise": {"2.png", "641.png"},
    "coco": {"42.png", "9.png"},
    "mjhq": {"animals/0a1b.png", "food/ff00.png"},
}


def write_prompts(suite: str, folder: Path) -> list[Path]:
    """A small prompt file in the format that the authors of a benchmark publish."""
    folder.mkdir(parents=True, exist_ok=True)
    if suite == "geneval":
        (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(item) + "\n" for item in GENEVAL))
    elif suite == "dpg-bench":
        (folder / "12.txt").write_text("A long prompt.\nOf two lines.")
        (folder / "COCOval2014000000010363.txt").write_text("Another one. ")
        return [folder]
    elif suite == "wise":
        (folder / "science.json").write_text(json.dumps(SCIENCE))
        (folder / "culture.json").write_text(json.dumps(CULTURE))
    elif suite == "coco":
        (folder / "captions.csv").write_text('image_id,text\n42,"A cat, on a mat."\n000000000009,A dog\n')
    else:
        (folder / "meta_data.json").write_text(json.dumps(MJHQ))
    return sorted(folder.iterdir())


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.mark.parametrize("suite", SUITES)
def test_folders_have_the_layout_of_the_benchmark(suite, pipe, tmp_path):
    prompts = read_suite(suite, write_prompts(suite, tmp_path / "prompts"))
    num_files = sum(name.endswith(".png") for name in LAYOUTS[suite])
    assert generate_suite(pipe, suite, prompts, tmp_path / "out", batch_size=3, **CALL) == (num_files, 0)
    assert files_of(tmp_path / "out" / "images").keys() == LAYOUTS[suite]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "run.json"}
    size = 64 if suite == "dpg-bench" else 32
    for path in (tmp_path / "out" / "images").rglob("*.png"):
        assert Image.open(path).size == (size, size) and Image.open(path).mode == "RGB"


def test_geneval_is_read_as_its_evaluator_reads_it(pipe, tmp_path):
    prompts = read_suite("geneval", write_prompts("geneval", tmp_path / "prompts"))
    generate_suite(pipe, "geneval", prompts, tmp_path / "out", **CALL)
    read = {}
    for name in os.listdir(tmp_path / "out" / "images"):
        assert name.isdigit()
        folder = tmp_path / "out" / "images" / name
        with open(folder / "metadata.jsonl") as file:
            metadata = json.load(file)
        images = [image for image in os.listdir(folder / "samples") if re.match(r"\d+\.png", image)]
        read[name] = (metadata, len(images))
    assert read == {"00000": (GENEVAL[0], 4), "00001": (GENEVAL[1], 4)}


def test_images_depend_on_their_number_and_the_seed_alone(pipe, tmp_path):
    def alone(prompt: str, seed: int) -> bytes:
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images[0].tobytes()

    prompts = read_suite("geneval", write_prompts("geneval", tmp_path / "prompts"))
    generate_suite(pipe, "geneval", prompts, tmp_path / "out", seed=7, **CALL)
    path = tmp_path / "out" / "images" / "00001" / "samples" / "00002.png"
    assert Image.open(path).tobytes() == alone(GENEVAL[1]["prompt"], 7 + 4 + 2)
    made = read_metadata(path)
    assert (made.prompt, made.seed, made.batch_size) == (GENEVAL[1]["prompt"], 13, 1)
    # The four of a grid of DPG-Bench, which its evaluator cuts at the resolution.
    prompts = read_suite("dpg-bench", write_prompts("dpg-bench", tmp_path / "folder"))
    assert prompts[0].prompt == "A long prompt.\nOf two lines."
    generate_suite(pipe, "dpg-bench", prompts, tmp_path / "grids", seed=7, **CALL)
    grid = Image.open(tmp_path / "grids" / "images" / "COCOval2014000000010363.png")
    for index, (left, top) in enumerate(((0, 0), (32, 0), (0, 32), (32, 32))):
        assert grid.crop((left, top, left + 32, top + 32)).tobytes() == alone("Another one.", 7 + 4 + index)


def test_wise_files_may_come_in_any_order(pipe, tmp_path):
    paths = write_prompts("wise", tmp_path)
    assert read_suite("wise", paths) == read_suite("wise", paths[::-1])
    assert [item.prompt for item in read_suite("wise", paths)] == ["A red circle", "A cross"]


def test_a_second_run_generates_what_is_missing(pipe, tmp_path):
    prompts = read_suite("geneval", write_prompts("geneval", tmp_path / "prompts"))
    out = tmp_path / "out"
    # A trial, then all.
    assert generate_suite(pipe, "geneval", prompts, out, num_prompts=1, **CALL) == (4, 0)
    assert generate_suite(pipe, "geneval", prompts, out, **CALL) == (4, 4)
    before = files_of(out)
    samples = out / "images" / "00001" / "samples"
    (samples / "00001.png").unlink()
    # What a killed run leaves.
    (samples / ".00001.png.x").mkdir()
    (samples / ".00001.png.x" / "00001.png").write_bytes(b"half")
    kept = (samples / "00000.png").stat().st_mtime_ns
    assert generate_suite(pipe, "geneval", prompts, out, **CALL) == (1, 7)
    assert not (samples / ".00001.png.x").exists()
    assert files_of(out) == before and (samples / "00000.png").stat().st_mtime_ns == kept


def test_a_folder_of_another_run_is_refused(own_pipe, tmp_path):
    prompts = read_suite("coco", write_prompts("coco", tmp_path / "prompts"))
    out = tmp_path / "out"
    generate_suite(own_pipe, "coco", prompts, out, **CALL)
    before = files_of(out)
    own_pipe.register_to_config(_name_or_path="the same model elsewhere")
    assert generate_suite(own_pipe, "coco", prompts, out, **CALL) == (0, 2)
    for change, words in (
        ({"seed": 1}, "seed differ; seed was 0 and is 1"),
        ({"guidance_scale": 2.0}, "guidance_scale was 4.0 and is 2.0"),
        ({"num_inference_steps": 3}, "num_inference_steps was 2 and is 3"),
        ({"negative_prompt": "x"}, "negative_prompt"),
        ({"prompts": prompts[:1]}, "prompts differ"),
        ({"suite": "wise"}, "suite was 'coco' and is 'wise'"),
    ):
        arguments = {"suite": "coco", "prompts": prompts, "folder": out, **CALL, **change}
        with pytest.raises(ValueError, match=words):
            generate_suite(own_pipe, **arguments)
    scheduler = own_pipe.scheduler
    own_pipe.scheduler = LatteFlowScheduler.from_config(scheduler.config, stochastic_sampling=1.0)
    with pytest.raises(ValueError, match="model differ"):
        generate_suite(own_pipe, "coco", prompts, out, **CALL)
    own_pipe.scheduler = scheduler
    with torch.no_grad():
        next(own_pipe.model.tower.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="model differ"):
        generate_suite(own_pipe, "coco", prompts, out, **CALL)
    assert files_of(out) == before
    (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="is not of this command"):
        generate_suite(own_pipe, "coco", prompts, out, **CALL)
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json"):
        generate_suite(own_pipe, "coco", prompts, out, **CALL)


def test_other_metadata_of_the_same_prompts_are_refused(pipe, tmp_path):
    """GenEval's objects are kept beside the images: with those of another file it would judge wrongly."""
    path = write_prompts("geneval", tmp_path / "prompts")[0]
    generate_suite(pipe, "geneval", read_suite("geneval", [path]), tmp_path / "out", num_prompts=1, **CALL)
    path.write_text(path.read_text().replace('"bench"', '"chair"'))
    with pytest.raises(ValueError, match="prompts differ"):
        generate_suite(pipe, "geneval", read_suite("geneval", [path]), tmp_path / "out", **CALL)


def test_a_damaged_image_is_made_again_and_hidden_files_are_left_alone(pipe, tmp_path, caplog):
    prompts = read_suite("coco", write_prompts("coco", tmp_path / "prompts"))
    out = tmp_path / "out"
    generate_suite(pipe, "coco", prompts, out, **CALL)
    before = files_of(out)
    path = out / "images" / "42.png"
    # What some systems put beside a copied file.
    (out / "images" / "._42.png").write_bytes(b"attributes")
    for content in (path.read_bytes()[:-20], b""):
        path.write_bytes(content)
        assert generate_suite(pipe, "coco", prompts, out, **CALL) == (1, 1)
        assert files_of(out) == before
    assert "42.png is damaged, and is made again" in caplog.text
    assert (out / "images" / "._42.png").read_bytes() == b"attributes"


def test_one_run_at_a_time_writes_in_a_folder(pipe, tmp_path):
    prompts = read_suite("coco", write_prompts("coco", tmp_path / "prompts"))
    out = tmp_path / "out"
    with lock_folder(out), pytest.raises(OSError, match=rf"out is in use by process {os.getpid()} on "):
        generate_suite(pipe, "coco", prompts, out, **CALL)
    # What a run leaves that was killed before its first image.
    out.mkdir()
    (out / "lock").write_text("process 1 on another machine")
    assert generate_suite(pipe, "coco", prompts, out, **CALL) == (2, 0)
    assert {path.name for path in out.iterdir()} == {"images", "run.json"}


def test_prompts_of_another_world_are_refused(own_pipe, tmp_path):
    prompts = read_suite("coco", write_prompts("coco", tmp_path / "prompts"))
    own_pipe.model.config.trained_words = ["a", "cat"]
    with pytest.raises(ValueError, match=r"coco have 3 words that the model never learned \(on, mat, dog"):
        generate_suite(own_pipe, "coco", prompts, tmp_path / "out", **CALL)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_for_invalid_arguments(pipe, tmp_path):
    prompts = read_suite("coco", write_prompts("coco", tmp_path / "prompts"))
    for change, words in (
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"height": 30}, "height"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"prompts": []}, "prompts must be those of a benchmark"),
        ({"suite": "genval"}, "suite must be one of geneval"),
        ({"suite": "dpg-bench", "height": 64}, "square images only, got height 64 and width 32"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_suite(pipe, **{"suite": "coco", "prompts": prompts, "folder": tmp_path / "out", **CALL, **change})
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("suite", "content", "words"),
    [
        ("geneval", "a photo of a bench\n", "line 1 is not JSON .*evaluation_metadata.jsonl"),
        ("geneval", json.dumps(GENEVAL[0]) + "\n\n" + json.dumps(GENEVAL[1]), "line 2 is not JSON"),
        ("geneval", json.dumps(GENEVAL[0]) + "\n[1]", "line 2 must be an object with `tag`"),
        ("geneval", json.dumps({"tag": "counting", "prompt": "a"}), "line 1 must have `include`"),
        ("geneval", json.dumps({**GENEVAL[0], "include": [{"class": "bench"}]}), "with `class` and `count`"),
        ("geneval", json.dumps({**GENEVAL[0], "prompt": " "}), "line 1 must have a prompt as text under 'prompt'"),
        ("geneval", "", "line 1 is not JSON"),
        ("geneval", json.dumps(GENEVAL[0])[:-1] + ', "prompt": "a cat"}', "line 1 has the key 'prompt' twice"),
        ("wise", '[{"prompt_id": 1,\n "Prompt": "a"', "line 2 is not JSON"),
        ("wise", json.dumps(MJHQ), "must be a list of objects"),
        ("wise", json.dumps([{"Prompt": "a"}]), "object 1 must have `Prompt` and `prompt_id`"),
        ("wise", json.dumps([{"Prompt": "a", "prompt_id": True}]), "a whole number"),
        ("wise", json.dumps([{"Prompt": "a", "prompt_id": "../1"}]), "a whole number"),
        ("wise", json.dumps([*CULTURE, {"prompt_id": 3}]), "object 2 must have a prompt as text under 'Prompt'"),
        ("wise", json.dumps(CULTURE * 2), "have the same id"),
        ("wise", "[]", "has no prompt"),
        ("wise", "[" * 100_000, "is nested too deeply"),
        ("wise", json.dumps([{"Prompt": "a", "prompt_id": 10**18}]), "a whole number"),
        ("coco", "image_id,caption\n1,a\n", "must name the columns image_id and text"),
        ("coco", json.dumps({"annotations": []}), "COCO's own annotations have five captions per image"),
        ("coco", "image_id,text\n1,a\n\n../2,b\n", "line 4 must have a whole number"),
        ("coco", "image_id,text\n1,\n", "line 2 must have a prompt as text under 'text'"),
        ("coco", "image_id,text\n1\n", "line 2 must have a prompt"),
        ("coco", "image_id,text\n1,a\n001,b\n", "'a' and 'b' have the same id, and both would be 1.png"),
        ("coco", 'image_id,text\n1,"a" b\n', "line 2 is not CSV"),
        ("coco", "image_id,text\n", "has no prompt"),
        ("coco", "image_id,text\n1,A cat, on a mat.\n", "line 2 has more values than line 1 has columns"),
        ("coco", "image_id,text,text\n1,a,b\n", "line 1 must name the columns image_id and text"),
        ("mjhq", json.dumps(CULTURE), "must be an object by image id"),
        ("mjhq", json.dumps({"../x": MJHQ["0a1b"]}), r"has the id '\.\./x'"),
        ("mjhq", json.dumps({"x": {"category": "..", "prompt": "a"}}), r"has the category '\.\.'"),
        ("mjhq", json.dumps({"x": {"prompt": "a"}}), "has the category None"),
        ("mjhq", json.dumps({"x": "a cat"}), "must be an object with `category` and `prompt`"),
        ("mjhq", json.dumps({"x": {"category": "food"}}), "id 'x' must have a prompt"),
        ("mjhq", '{"x": {}, "x": {}}', "has the key 'x' twice"),
        ("mjhq", json.dumps({"x": MJHQ["0a1b"], "X": MJHQ["0a1b"]}), "have the same id"),
        ("mjhq", b"\xff\xfe", "not a text file in UTF-8"),
    ],
)
def test_malformed_prompt_files_are_refused(suite, content, words, tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_suite(suite, [path])


def test_paths_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(CULTURE))
    with pytest.raises(ValueError, match=r"must be evaluation_metadata\.jsonl, got the folder"):
        read_suite("geneval", [tmp_path])
    with pytest.raises(ValueError, match="must be the folder dpg_bench/prompts, got the file"):
        read_suite("dpg-bench", [file])
    with pytest.raises(ValueError, match="got 2 paths"):
        read_suite("mjhq", [file, file])
    with pytest.raises(ValueError, match=r"no \.txt files"):
        read_suite("dpg-bench", [tmp_path])
    with pytest.raises(FileNotFoundError):
        read_suite("coco", [tmp_path / "none.csv"])
    (tmp_path / "1.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"1\.txt is empty"):
        read_suite("dpg-bench", [tmp_path])
    (tmp_path / "1.txt").rename(tmp_path / "1.b.txt")
    with pytest.raises(ValueError, match="second dot"):
        read_suite("dpg-bench", [tmp_path])


@pytest.mark.slow
def test_two_processes_generate_the_bytes_of_one(pipeline, tmp_path):
    paths = write_prompts("geneval", tmp_path / "prompts")
    arguments = ["evaluate", "generate", "geneval", *map(str, paths), "-m", pipeline, "--steps", "2", "--size", "32"]
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in (("one", ["latte_flow_cli"]), ("two", [*launch, "-m", "latte_flow_cli"])):
        run = [sys.executable, "-m", *command, *arguments, "-o", str(tmp_path / name)]
        done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("8 new files, 0 existed") == 1
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "images" / "00000")
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.count("4 new files, 4 existed") == 1 and files_of(tmp_path / "two") == files_of(
        tmp_path / "one"
    )
