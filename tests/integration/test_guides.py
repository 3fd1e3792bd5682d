# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Every code block of the README and of the documentation runs, at a size that takes seconds.

The blocks of a page run in order and in one folder; Python blocks share their names, as for a reader who types them
one after the other. Of `sh` blocks, `latte-flow` runs in this process; the other commands install or take hours: only
what they name must exist. `text` blocks do not run: they need several GPUs or machines, files that nobody has yet, or
are not code.
"""

import ast
import configparser
import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import uvicorn
import yaml
from PIL import Image
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.checkpoints import few_step_checkpoint
from latte_flow_hf.evaluation import tinyworld
from latte_flow_hf.publishing import save_with_code


ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# What is replaced on every page: what cannot be fetched.
LOCAL = {
    "Qwen/Qwen2-VL-2B-Instruct": "backbone",
    "path/to/Qwen2-VL-2B-Instruct": "backbone",
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": "autoencoder",
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": "autoencoder",
    "path/to/dc-ae-f32c32": "autoencoder",
}

with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    FREE_PORT = unused.getsockname()[1]

# What is replaced on a page: sizes, and names of files that the reader has. All of it must occur.
PAGES: dict[str, dict[str, str]] = {
    "README.md": {"--output my-checkpoint": "--output my-checkpoint --work-dir runs/readme"},
    "benchmarks/README.md": {},
    "benchmarks/RESULTS.md": {"generation_prompts(2, one=1000)": "generation_prompts(2)"},
    "docs/index.md": {},
    "docs/start.md": {"latent_channels=32": "latent_channels=4", "recipe.yaml": "recipes/text_to_image_folder.yaml"},
    "docs/settings.md": {},
    "docs/troubleshooting.md": {},
    "docs/contributing.md": {},
    "docs/tinyworld.md": {},
    "docs/benchmarks.md": {},
    "docs/departures.md": {},
    "docs/doors.md": {},
    "docs/concepts/experts.md": {},
    "docs/concepts/residual_attention.md": {},
    "docs/concepts/time_axis.md": {},
    "docs/guides/backbone_table.md": {},
    "docs/guides/add_a_class.md": {"num_images=200": "num_images=6", "range(400)": "range(12)"},
    "docs/guides/backbones.md": {"Qwen/Qwen3-VL-2B-Instruct": "backbone"},
    "docs/guides/benchmark_layouts.md": {},
    "docs/guides/conversion.md": {},
    "docs/guides/devices_and_dtypes.md": {},
    "docs/guides/evaluate.md": {
        "digit_indices(held_out):": "digit_indices(held_out)[:130]:",
        "--num-images 20": "--num-images 13",
        "--num-samples 200": "--num-samples 130",
    },
    # Two random experts of two layers instead of four.
    "docs/guides/export.md": {"tiny_checkpoint()": '"with-code"'},
    "docs/guides/few_steps.md": {
        '"path/to/the/base"': repr(tiny_checkpoint()),
        "--device cuda": "--device cpu",
        # The page uses the results before it says how they are made.
        "distill.yaml --output outputs/distilled": "distill.yaml --output outputs/made",
        "distill_lora.yaml --output outputs/distilled": "distill_lora.yaml --output outputs/made",
    },
    "docs/guides/image_to_image.md": {
        "(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)": "(0.4, 0.6)",
        "seeds=range(8)": "seeds=range(2)",
        '["blue square", "green cross", "yellow triangle", "white circle"]': '["blue square"]',
    },
    "docs/guides/images_in_prompts.md": {},
    "docs/guides/loading_and_publishing.md": {'"user/name"': '"with-code"', "my-latte-flow": "vanilla"},
    "docs/guides/modular.md": {},
    "docs/guides/plan.md": {},
    "docs/guides/processors.md": {},
    "docs/guides/reproducing_the_paper.md": {"--num-samples 50000": "--num-samples 2 --batch-size 2 --shard-size 2"},
    "docs/guides/serve.md": {"8000": str(FREE_PORT)},
    "docs/guides/solvers.md": {},
    "docs/guides/speed_and_memory.md": {},
    "docs/guides/teach_an_expert_with_lora.md": {
        "num_images = 4000": "num_images = 12",
        "max_steps=600": "max_steps=2",
        "per_device_train_batch_size=64": "per_device_train_batch_size=4",
    },
    "docs/guides/studio.md": {},
    "docs/guides/threads.md": {},
    "docs/guides/train_from_a_vlm.md": {"range(720)": "range(12)"},
    "docs/guides/train_your_own.md": {"--num-images 4": "--num-images 1"},
    "docs/guides/understanding.md": {"num_questions=200": "num_questions=2"},
}

# The files that a page promises, with what is in them.
RESULTS = {
    "README.md": ["out.png", "measured.json", "my-checkpoint/model_index.json", "my-latte-flow/model_index.json"],
    "docs/guides/add_a_class.md": ["star.png"],
    "docs/guides/benchmark_layouts.md": ["out/geneval/images/00001/samples/00003.png"],
    "docs/tinyworld.md": ["round-trip.json"],
    "docs/guides/image_to_image.md": ["circle.png", "square.png"],
    "docs/guides/train_from_a_vlm.md": ["red-circle.png", "runs/from_a_vlm/samples", "runs/from_a_vlm/log.json"],
    "docs/guides/train_your_own.md": ["my-model/model_index.json", "runs/own_images/samples"],
    "docs/guides/teach_an_expert_with_lora.md": ["outputs/orange.png"],
}


def smaller(recipe: str) -> str:
    """The same recipe with few images and steps, on a CPU."""
    sections = yaml.safe_load(recipe)
    sections["data"].pop("size", None)
    sections["training"].pop("dataloader_num_workers", None)
    sections["training"].update(max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_steps=1)
    if "distillation" in sections:
        sections["data"]["source"]["num_images"] = 8
        sections["distillation"].update(batch_size=8)
        sections["training"].update(lr_scheduler_type="linear", lr_scheduler_kwargs={})
    if "validation" in sections:
        sections["training"].update(eval_steps=1)
    if "samples" in sections:
        # A distilled model takes its own number of steps.
        call = {} if "distillation" in sections else {"num_inference_steps": 2}
        sections["samples"].update(every_steps=2, call=call)
    return yaml.safe_dump(sections)


def write_images(folder: Path, num_images: int) -> None:
    """Images with their captions in text files and in a table."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(num_images):
        Image.new("RGB", (64, 64), (40 * number, 90, 60)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a caption {number}"}))
        (folder / f"{number}.txt").write_text(f"a caption {number}")
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def furnished(model, make_model, backbone, processor, vae, tmp_path_factory) -> Path:
    """What readers have: a backbone, an autoencoder, images, prompts, the recipes; the rest comes from the pages."""
    folder = tmp_path_factory.mktemp("furnished")

    def save(model, name, save_pipeline):
        scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
        save_pipeline(LatteFlowPipeline(model, processor, vae, scheduler), folder / name)

    backbone.save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    vae.save_pretrained(folder / "autoencoder")
    save(make_model(num_experts=1), "vanilla", LatteFlowPipeline.save_pretrained)
    save(model, "with-code", save_with_code)
    shutil.copytree(few_step_checkpoint(), folder / "outputs" / "distilled-lora")
    distilled = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    distilled.load_lora_weights(folder / "outputs" / "distilled-lora")
    distilled.fuse_lora()
    distilled.unload_lora_weights()
    distilled.save_pretrained(folder / "outputs" / "distilled")
    write_images(folder / "images-of-recipe", 6)
    for name, num_images in (("photos", 6), ("photos-validation", 6), ("classes/goldfish", 3), ("classes/volcano", 3)):
        write_images(folder / name, num_images)
        (folder / name / "metadata.jsonl").unlink()
    (folder / "prompts.txt").write_text("a red circle\na blue square")
    (folder / "classes.txt").write_text("goldfish\nvolcano")
    (folder / "recipes" / "tinyworld").mkdir(parents=True)
    for name, replaced in {
        "tinyworld/distill": {},
        "tinyworld/distill_lora": {},
        "tinyworld/distill_lora_again": {},
        "text_to_image_folder": {"path/to/pipeline": "with-code", "path/to/images": "images-of-recipe"},
        "imagenet256": {**LOCAL, "path: ILSVRC/imagenet-1k": "path: imagefolder\n    data_dir: classes"},
    }.items():
        recipe = (ROOT / "recipes" / f"{name}.yaml").read_text()
        for old, new in replaced.items():
            recipe = recipe.replace(old, new)
        (folder / "recipes" / f"{name}.yaml").write_text(smaller(recipe))
    return folder


@pytest.fixture
def workplace(furnished, tmp_path, monkeypatch):
    """A copy of what readers have, as the current folder."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for module in ("transformers.dynamic_module_utils", "diffusers.utils.dynamic_modules_utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    servers = run_servers_in_threads(monkeypatch)
    # 50 of thousands of questions and prompts.
    prompts, questions = tinyworld.generation_prompts, tinyworld.understanding_questions
    monkeypatch.setattr(tinyworld, "generation_prompts", lambda seed: prompts(seed, 2, 2, 2, 2))
    monkeypatch.setattr(
        tinyworld, "understanding_questions", lambda seed: {k: v[:3] for k, v in questions(seed, 4).items()}
    )
    yield tmp_path
    for server, thread in servers:
        server.should_exit = True
        thread.join(timeout=60)


def run_servers_in_threads(monkeypatch) -> list[tuple[uvicorn.Server, threading.Thread]]:
    """`latte-flow serve` then returns as soon as its server answers."""
    servers = []

    def run(web_app, listening):
        server = uvicorn.Server(uvicorn.Config(web_app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread))
        while thread.is_alive() and not server.started:
            time.sleep(0.01)

    monkeypatch.setattr("latte_flow_hf.serving.server.run", run)
    return servers


def run_command(line: str) -> None:
    """Run one line of an `sh` block, or check that it names what exists."""
    words = shlex.split(line, comments=True)
    program, *arguments = words
    if words[:2] in (["latte-flow", "studio"], ["latte-flow", "reproduce"]):
        # The first one would serve for ever; the second one takes minutes, and tests/reproduction runs it.
        options = CliRunner().invoke(app, [words[1], "--help"]).output
        assert all(word in options.split() for word in arguments if word.startswith("--")), line
    elif program == "latte-flow":
        if arguments == ["serve"]:
            arguments += ["--port", "0"]
        verb = tuple(arguments[:2])
        samples = arguments[0] in ("generate", "evaluate")
        samples &= verb not in (("evaluate", "images"), ("evaluate", "understanding"))
        if samples and not re.search("--steps|--fast|distilled", line):
            arguments += ["--steps", "2"]
        outcome = CliRunner().invoke(app, arguments)
        if arguments[0] == "publish":
            # The tests are offline.
            assert outcome.exit_code == 1 and "the hub cannot be reached" in outcome.stderr
            assert Path(arguments[1], "model_index.json").exists()
        elif verb == ("evaluate", "understanding") and find_spec("lmms_eval") is None:
            assert outcome.exit_code == 1 and "install the extra 'lmms-eval'" in outcome.stderr, outcome.output
        else:
            assert outcome.exit_code == 0, (line, outcome.output)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), line
    else:
        # Installation.
        assert program in ("pip", "python3", "source", "grep", ".venv/bin/python"), line
        assert "constraints.txt" not in line or (ROOT / "constraints.txt").exists()


def test_every_page_is_run():
    pages = [ROOT / "README.md"]
    for folder in ("benchmarks", "docs", "docs/guides", "docs/concepts"):
        pages += (ROOT / folder).glob("*.md")
    assert {page.relative_to(ROOT).as_posix() for page in pages} == PAGES.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search((ROOT / page).read_text())])
def test_code_of_a_page_runs_as_written(page, workplace):
    text = (ROOT / page).read_text()
    for old, new in PAGES[page].items():
        assert old in text
        text = text.replace(old, new)
    for old, new in LOCAL.items():
        text = text.replace(old, new)
    names: dict = {"__name__": "page"}
    for kind, title, block in BLOCK.findall(text):
        if kind == "python":
            exec(compile(block, page, "exec"), names)
        elif kind == "yaml":
            # Without a title it is a part of a recipe.
            assert title or isinstance(yaml.safe_load(block), dict)
            if title:
                Path(title).write_text(smaller(block))
        elif kind == "sh":
            for line in block.splitlines():
                run_command(line)
        else:
            assert kind == "text", f"{page} has a block of kind {kind}"
    for name in RESULTS.get(page, []):
        assert Path(name).exists()
        if name.endswith(".png"):
            assert Image.open(name).size == (64, 64)
    shutil.rmtree(workplace, ignore_errors=True)


def test_answers_in_the_guide_to_images(workplace, capsys):
    names: dict = {}
    for kind, _, block in BLOCK.findall((ROOT / "docs/guides/images_in_prompts.md").read_text())[:3]:
        if kind == "python":
            exec(compile(block, "images_in_prompts.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "a red circle\nred\n" in printed and "[ 1,  4, 12]" in printed


def messages_of_the_source() -> list[str]:
    """All strings of the package, without what is filled in."""
    found = []
    for path in [*(ROOT / "src").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
    return found


def test_messages_of_the_troubleshooting_page_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(shown) > 25 and len(shown) == len(set(shown))
    messages = messages_of_the_source()
    for message in shown:
        parts = [part.strip() for part in message.replace("``", "`").split("...")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in messages), message


def test_all_extras_are_documented():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    table = (ROOT / "docs" / "start.md").read_text()
    documented = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert documented == set(setup["options.extras_require"])
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]:
        assert set(re.findall(r"-e(?:ditable)? '\.\[([\w-]+)\]'", path.read_text())) <= documented, path
        assert "latte_flow_hf[" not in path.read_text(), f"{path}: the package is not on an index"
