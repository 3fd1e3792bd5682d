"""The command line over a small random pipeline and over the embedded checkpoint: what a user types and sees."""

import configparser
import copy
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from PIL import Image
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_cli.verbs import load_pipeline, user_message
from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.pipelines.image_metadata import read_metadata


@pytest.fixture(scope="module")
def folder(model, processor, vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(path)
    return str(path)


def run(*arguments, **kwargs):
    return CliRunner().invoke(app, list(arguments), **kwargs)


def test_generate_writes_the_picture_it_names(folder, tmp_path):
    out = tmp_path / "new" / "out.png"
    result = run("generate", "a red circle", "-o", str(out), "-m", folder, "--steps", "2")
    assert result.exit_code == 0, result.output
    assert f"wrote {out} (64x64)" in result.stdout
    assert Image.open(out).size == (64, 64)
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]


def test_generate_numbers_several_pictures_and_repeats_with_the_seed(folder, tmp_path):
    for name in ("a", "b"):
        arguments = ("-m", folder, "--steps", "2", "--num-images", "2", "--seed", "3", "--size", "32")
        assert run("generate", "a cross", "-o", str(tmp_path / f"{name}.png"), *arguments).exit_code == 0
    pictures = {p.name: np.asarray(Image.open(p)) for p in tmp_path.iterdir()}
    assert sorted(pictures) == ["a-0.png", "a-1.png", "b-0.png", "b-1.png"]
    assert (pictures["a-0.png"] == pictures["b-0.png"]).all() and pictures["a-0.png"].shape == (32, 32, 3)
    assert (pictures["a-0.png"] != pictures["a-1.png"]).any()


def test_generate_from_an_image_and_in_a_mask(folder, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "source.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")

    def pixels(*arguments):
        out = tmp_path / "out" / f"{len(list(tmp_path.glob('out/*')))}.png"
        result = run("generate", "a cross", "-o", str(out), "-m", folder, "--steps", "4", *arguments)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out))

    source = ("--source", str(tmp_path / "source.png"))
    found = pixels(*source)
    assert np.array_equal(found, pixels(*source, "--strength", "0.8"))
    assert not np.array_equal(found, pixels(*source, "--strength", "0.5"))
    assert not np.array_equal(found, pixels(*source, "--image", str(tmp_path / "mask.png")))
    assert not np.array_equal(found, pixels(*source, "--mask", str(tmp_path / "mask.png")))
    assert np.array_equal(pixels(), pixels(*source, "--strength", "1"))
    bad = run("generate", "a", "-o", str(tmp_path / "o.png"), "-m", folder, *source, "--strength", "1.5")
    assert bad.exit_code == 1 and "Error: strength must be a number above 0" in bad.stderr


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter of the tower and of the backbone, so that images and answers change."""
    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=r".*layers\.\d+\.mlp\.up_proj")
    get_peft_model(copy.deepcopy(model), config).save_pretrained(path)
    return path


def test_adapters_and_their_weights_change_images_and_answers(folder, adapter, tmp_path):
    def image(*lora):
        out = tmp_path / "out.png"
        result = run("generate", "a cross", "-o", str(out), "-m", folder, "--steps", "2", *lora)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out))

    def answer(*lora):
        return run("chat", "what?", "-m", folder, "--max-new-tokens", "8", *lora).stdout

    plain, full, half = image(), image("--lora", str(adapter)), image("--lora", f"{adapter}:0.5")
    assert (plain != full).any() and (plain != half).any() and (half != full).any()
    assert (image("--lora", f"{adapter}:0") == plain).all()
    assert (image("--lora", f"{adapter}:0.25", "--lora", f"{adapter}:0.25") == half).mean() > 0.95
    assert answer() != answer("--lora", str(adapter))


def test_another_adapter_makes_other_images_of_a_file_of_prompts(folder, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cross")

    def number_of_images(*lora):
        arguments = (
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "-o",
            str(tmp_path / "out"),
            "-m",
            folder,
            "--steps",
            "2",
        )
        assert run("generate", *arguments, *lora).exit_code == 0
        return len(list((tmp_path / "out").iterdir()))

    lora = ("--lora", str(adapter))
    assert [number_of_images(), number_of_images(), number_of_images(*lora), number_of_images(*lora)] == [1, 1, 2, 2]
    assert number_of_images("--lora", f"{adapter}:0.5") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "a", "-o", "{tmp}/o.png", "--lora", "{tmp}/none:0.5"), "none"),
        (("generate", "a", "-o", "{tmp}/o.png", "--lora", "{folder}"), "adapter_config.json"),
        (("generate", "a", "-o", "{tmp}/out"), "output must be an image file"),
        (("generate", "a", "-o", "{tmp}/o.png", "--device", "nowhere"), "device must be one of"),
        (("generate", "a", "-o", "{tmp}/o.png", "--guidance", "nan"), "guidance_scale must be a finite number"),
        (("generate", "a", "-o", "{tmp}/o.png", "--size", "30"), "height must be a positive multiple"),
        (("generate", "a", "-o", "{tmp}/o.png", "--size", "100000"), "height 100000 and width 100000 need at least"),
        (
            ("generate", "a", "-o", "{tmp}/o.png", "--size", "1024", "--num-images", "1000", "--batch-size", "1000"),
            "1000 image(s)",
        ),
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{tmp}/nowhere"), "nowhere"),
        (("chat", "what?", "-m", "{folder}/model_index.json"), "is a file"),
        (("info", "-m", "{tmp}/nowhere"), "nowhere"),
        (("info", "-m", "nowhere"), "a hub id such as user/name, and there is no folder 'nowhere'"),
        (("info", "-m", "user/nowhere"), "user/nowhere"),
        (
            ("convert", "regroup", "nowhere", "-o", "{tmp}/out", "--experts", "2"),
            "source must be a folder or a hub id",
        ),
        (("convert", "init", "{folder}", "nowhere", "-o", "{tmp}/out"), "autoencoder must be a folder or a hub id"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(arguments, words, folder, tmp_path):
    arguments = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
    result = run(*arguments, *(() if "-m" in arguments or arguments[0] == "convert" else ("-m", folder)))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ") and words in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# What is found without importing the package.
USAGE = [
    (("genrate",), "Did you mean 'generate'?"),
    (("generate", "a", "--stepz", "3"), "No such option: --stepz"),
    (("generate", "a", "--steps", "0"), "--steps"),
    (("generate", "a", "--num-images", "1000000000"), "--num-images"),
    (("generate", "a", "--dtype", "half"), "'float32', 'bfloat16', 'float16'"),
    (("generate", "a", "--image", "none.png"), "file 'none.png' does not exist"),
    (("generate",), "either a prompt or --prompts"),
    (("generate", "a", "--allow-changes"), "--allow-changes goes with --like"),
    (("generate", "--like", "setup.cfg", "--prompts", "setup.cfg"), "--like repeats one image"),
    (("generate", "a", "--strength", "0.5"), "--mask and --strength go with --source"),
    (("generate", "--prompts", "setup.cfg", "--source", "setup.cfg"), "--source goes with one prompt"),
    (("chat", "what?", "-i", "none.png"), "file 'none.png' does not exist"),
    (("train", "none.yaml", "-o", "out"), "file 'none.yaml' does not exist"),
    (("evaluate", "-o", "out.txt"), "must be a .json file"),
    (("evaluate", "understanding", "-o", "out.txt"), "must be a .json file"),
    (("evaluate", "understanding", "-m", "a/b"), "--tasks must name tasks"),
    (("convert", "to-single-file", "a/b", "-o", "out.bin"), "must be a .safetensors file"),
    (("publish", "none", "--repo-id", "a/b"), "dir 'none' does not exist"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE)
def test_usage_errors(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [("--help",), ("generate", "--help"), ("--version",), *(line[0] for line in USAGE)]
)
def test_help_and_usage_errors_take_no_time(arguments):
    """Processor time, because the machine may be busy; the package alone takes several seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "latte_flow_cli", *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if arguments[-1] in ("--help", "--version") else 2), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_console_script_is_outside_the_package():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "latte-flow = latte_flow_cli:app"


def test_version():
    from latte_flow_hf import __version__

    assert run("--version").stdout == f"latte_flow_hf {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "a", "-o", "folder.png"), "folder.png exists"),
        (("generate", "a", "-o", "link.png"), "link.png exists: it is a link"),
        (("generate", "a", "-o", "read-only.png"), "read-only.png is read-only"),
        (("generate", "a", "-o", "read-only.png/out.png"), "cannot be written"),
        (("generate", "a", "-o", "out.txt"), "must be an image file"),
        (("generate", "a", "-o", "many.png", "--num-images", "2"), "many-1.png exists"),
        (("generate", "--prompts", "prompts.txt", "-o", "link.png"), "must be a folder"),
        (("generate", "--prompts", "prompts.txt", "-o", "link"), "link is not a folder"),
        (("generate", "--prompts", "prompts.txt", "-o", "prompts.txt"), "prompts.txt is not a folder"),
        (("evaluate", "-o", "folder.json"), "folder.json exists"),
        (("evaluate", "-o", "link.json"), "link.json exists"),
        (("evaluate", "understanding", "--tasks", "mme", "-o", "folder.json"), "folder.json exists"),
        (("convert", "to-single-file", "no-model", "-o", "link.safetensors"), "link.safetensors exists"),
        (("convert", "extract-backbone", "no-model", "-o", "folder.png"), "folder.png exists"),
        (("convert", "extract-backbone", "no-model", "-o", "prompts.txt/out"), "cannot be written"),
        (("train", "recipe.yaml", "-o", "folder.png"), "folder.png exists"),
        (("train", "recipe.yaml", "-o", "link"), "link exists"),
        (("demo", "-o", "prompts.txt"), "prompts.txt is not a folder"),
        (("demo", "-o", "link"), "link is not a folder"),
    ],
)
def test_outputs_are_checked_before_the_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.png", "many-1.png", "folder.json"):
        Path(name).mkdir()
    for name in ("link", "link.png", "link.json", "link.safetensors"):
        Path(name).symlink_to("none")
    for name in ("read-only.png", "prompts.txt"):
        Path(name).write_text("a red circle")
    Path("read-only.png").chmod(0o444)
    recipe = {"model": {"pipeline": "no-model"}, "data": {"source": {"path": "tinyworld"}}, "training": {}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    before = sorted(tmp_path.rglob("*"))
    model = ("-m", "no-model") if arguments[0] in ("generate", "evaluate") else ()
    result = run(*arguments, *model)
    assert result.exit_code == 1 and words in result.stderr and "no-model" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_device_and_dtype(folder):
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    default = load_pipeline(folder, None, "float32")
    assert default.device.type == ("cpu" if accelerator is None else accelerator.type)
    assert default.model.dtype == torch.float32
    half = load_pipeline(folder, "cpu", "bfloat16")
    assert half.device.type == "cpu" and half.model.dtype == half.vae.dtype == torch.bfloat16


def test_embedded_weights_are_stored_in_half_and_run_in_float32():
    import torch

    assert {p.dtype for p in load_pipeline(None, "cpu", "float32").model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_pipeline(None, "cpu", "float16").model.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generate_and_chat_on_the_device_that_is_named(dtype, folder, tmp_path):
    out = str(tmp_path / "out.png")
    options = ("-m", folder, "--device", "cpu", "--dtype", dtype)
    assert run("generate", "a cross", "-o", out, "--steps", "2", *options).exit_code == 0
    assert run("chat", "what?", "-i", out, "--max-new-tokens", "2", *options).exit_code == 0
    (tmp_path / "prompts.txt").write_text("a cross")
    many = run("generate", "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path), "--steps", "2", *options)
    assert many.exit_code == 0 and "1 new images" in many.stdout


@pytest.fixture
def without_network(monkeypatch):
    """The tests are offline anyway, in a way that huggingface_hub knows of; here it does not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_that_cannot_be_reached_is_asked_once(without_network, folder, tmp_path):
    for arguments in (
        ("info", "-m", "user/nowhere"),
        ("generate", "a", "-o", str(tmp_path / "out.png"), "-m", "user/nowhere"),
        ("convert", "regroup", "user/nowhere", "-o", str(tmp_path / "out"), "--experts", "2"),
        ("publish", folder, "--repo-id", "user/new"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and "cannot be reached" in result.stderr and "Retrying" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = {
        "model": {"pipeline": "tinyworld"},
        "data": {"source": {"path": "tinyworld"}},
        "training": {},
        "lora": {"experts": [0]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = run("train", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 1 and "peft is not installed" in result.stderr and "'.[train]'" in result.stderr


def test_an_extra_with_an_environment_of_its_own_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    result = run("evaluate", "understanding")
    assert result.exit_code == 1
    assert "install the extra 'lmms-eval' in an environment of its own" in result.stderr


def test_errors_of_the_user_and_bugs():
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    message = user_message(raised.value)
    assert message.startswith("out of memory (tried to allocate 4000000000000000 bytes); use smaller images")
    cuda = RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ...")
    assert user_message(cuda).startswith("out of memory (tried to allocate 2.50 GiB);")
    assert user_message(MemoryError()).startswith("out of memory; use smaller")
    assert (
        user_message(OSError(28, "No space left on device", "out.png"))
        == "[Errno 28] No space left on device: 'out.png'"
    )
    assert "'.[quantization]'" in user_message(ModuleNotFoundError("torchao", name="torchao"))
    assert user_message(ModuleNotFoundError("No module named 'other'", name="other")) == "No module named 'other'"
    for bug in (KeyError("a"), TypeError("a"), RuntimeError("a"), AssertionError("a")):
        assert user_message(bug) is None


JSON_FILES = [
    "model_index.json",
    "model/config.json",
    "processor/tokenizer_config.json",
    "processor/tokenizer.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
]


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"a"'])
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_damaged_json_file_is_named(file, content, folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / file).write_text(content)
    verbs = [("generate", "a", "-o", str(tmp_path / "out.png"))]
    if file in ("model_index.json", "model/config.json"):
        verbs.append(("info",))
    for verb in verbs:
        result = run(*verb, "-m", str(damaged))
        assert result.exit_code == 1 and file in result.stderr.splitlines()[-1]


def test_chat_answers_and_streams(folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    result = run("chat", "what is this?", "-i", str(tmp_path / "red.png"), "-m", folder, "--max-new-tokens", "4")
    assert result.exit_code == 0 and result.stdout.strip()


def test_a_conversation_for_programs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [
        "hello",
        "",
        "/image ~/red.png",
        "what is this?",
        "/paint a cross",
        "/paint a cross",
        "and these?",
        f"/image {tmp_path}/none.png",
        "/image",
        "/quit now",
        "/sing",
        f"/save {tmp_path}/talk.txt",
        f"/save {tmp_path}/talk.json",
        f"/save {tmp_path}/talk.json",
        "/reset",
        "hello",
        "/quit",
        "unheard",
    ]
    result = run(
        *("chat", "-m", folder, "--json", "--max-new-tokens", "2", "-o", str(tmp_path / "painted"), "--seed", "5"),
        input="\n".join(lines),
    )
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    hello, shown, red, first, second, these, *errors, saved, twice, reset, again = events
    assert red["images"] == [shown["image"]] == [f"{tmp_path}/red.png"] and hello["images"] == []
    assert [first["seed"], second["seed"]] == [5, 6] and these["images"] == [first["path"], second["path"]]
    assert first["path"] == f"{tmp_path}/painted/001-a-cross.png" and "002" in second["path"]
    assert read_metadata(second["path"]).seed == 6 and hello["answer"] == again["answer"]
    words = ["none.png", "/image needs a path", "/quit takes nothing", "no command /sing", "writes a .json file"]
    assert all(word in event["error"] for word, event in zip(words, errors, strict=True))
    assert "exists" in twice["error"] and reset["reset"]
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert saved["saved"] == f"{tmp_path}/talk.json" and len(messages) == 6
    pipe = load_pipeline(folder, "cpu", "float32")
    for number, event in ((1, hello), (3, red), (5, these)):
        assert pipe.chat(messages[:number], max_new_tokens=2) == event["answer"]
        assert messages[number]["content"][0]["text"] == event["answer"]


def test_a_conversation_in_a_terminal(folder, tmp_path, monkeypatch, capsys):
    """Answers are streamed, errors are one line, and Ctrl-D ends it."""
    keyboard, terminal = os.openpty()
    os.write(keyboard, b"hello\n/image none.png\n/help\n\x04")
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        app(["chat", "-m", folder, "--max-new-tokens", "2"], standalone_mode=False)
    os.close(keyboard)
    printed = capsys.readouterr()
    assert printed.out.count("/paint PROMPT") == 2 and printed.out.count("> ") == 4
    assert next(line for line in printed.err.splitlines() if "none.png" in line).startswith("Error: ")


def test_the_pixels_again(folder, adapter, tmp_path):
    """What made an image is in its file; options win over it; what is not in the file must be the same."""
    rng = np.random.default_rng(0)
    for name in ("source", "other"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    source = ("--source", str(tmp_path / "source.png"), "--mask", str(tmp_path / "mask.png"))
    shown = ("--image", str(tmp_path / "other.png"))

    def generate(name, *arguments):
        result = run("generate", *arguments, "-o", str(tmp_path / name), "-m", folder)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(tmp_path / name)), result

    def refused(name, *arguments):
        result = run("generate", "--like", str(tmp_path / name), "-o", str(tmp_path / "no.png"), *arguments)
        assert result.exit_code == 1 and not (tmp_path / "no.png").exists()
        return result.stderr.splitlines()[-1]

    def like(name, *arguments):
        return generate("again.png", "--like", str(tmp_path / name), *arguments)[0]

    options = ("--steps", "3", "--guidance", "2.5", "--negative-prompt", "a circle", "--size", "32", "--seed", "7")
    plain, result = generate("plain.png", "a cross", *options)
    assert f"wrote {tmp_path}/plain.png (32x32)" in result.stdout
    assert "3 steps of euler, guidance 2.5, 32x32, seed 7" in result.stderr
    assert np.array_equal(plain, like("plain.png"))
    for change in (("--seed", "8"), ("--steps", "4"), ("--guidance", "1"), ("--size", "64"), ("a circle",)):
        assert not np.array_equal(plain, like("plain.png", *change))
    assert np.array_equal(plain, like("plain.png", "a cross", *options))

    assert "has no metadata of latte_flow_hf" in refused("source.png", "-m", folder)
    other = refused("plain.png")
    assert "the autoencoder and the model and the scheduler of 'tinyworld' differ" in other
    assert "--allow-changes" in other
    assert "dtype is float16 and was float32" in refused("plain.png", "-m", folder, "--dtype", "float16")
    assert not np.array_equal(plain, like("plain.png", "--dtype", "float16", "--allow-changes"))
    replaced = run("generate", "--like", str(tmp_path / "plain.png"), "-o", str(tmp_path / "plain.png"), "-m", folder)
    assert replaced.exit_code == 1 and "would be replaced" in replaced.stderr

    masked, _ = generate("masked.png", "a cross", "--steps", "4", *source, "--strength", "0.5", *shown)
    assert np.array_equal(masked, like("masked.png", *source, *shown))
    assert "was made from other.png; give it by --image" in refused("masked.png", "-m", folder, *source)
    assert "made from source.png; give it by --source" in refused("masked.png", "-m", folder, *shown)
    wrong = ("--source", str(tmp_path / "other.png"), *source[2:])
    assert "other.png is not the image that was source.png" in refused("masked.png", "-m", folder, *wrong, *shown)

    adapted, _ = generate("adapted.png", "a cross", "--steps", "2", "--lora", f"{adapter}:0.5")
    assert np.array_equal(adapted, like("adapted.png", "--lora", str(adapter)))
    assert not np.array_equal(adapted, like("adapted.png", "--lora", f"{adapter}:0.25"))
    missing = refused("adapted.png", "-m", folder)
    assert f"adapter '{adapter.name}' (weight 0.5); give each by --lora" in missing


def test_images_of_a_file_of_prompts_can_be_repeated(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cross\na circle")
    arguments = ("--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out"), "--steps", "2")
    assert run("generate", *arguments, "-m", folder, "--json").stdout.startswith('{"folder": ')
    path = sorted((tmp_path / "out").iterdir())[1]
    again = run("generate", "--like", str(path), "-o", str(tmp_path / "again.png"), "-m", folder, "--json")
    event = json.loads(again.stdout)
    assert event["prompt"] == "a circle" and event["seed"] == 1 and event["path"] == f"{tmp_path}/again.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "again.png")))


def test_the_embedded_adapter_is_found_again(tmp_path):
    assert run("generate", "a red circle", "--fast", "-o", str(tmp_path / "a.png")).exit_code == 0
    assert run("generate", "--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_other_formats_do_not_say_how_they_were_made(folder, tmp_path):
    result = run("generate", "a", "-o", str(tmp_path / "out.jpg"), "-m", folder, "--steps", "2")
    assert result.exit_code == 0 and "only .png files can" in result.stderr
    bad = run("generate", "--like", str(tmp_path / "out.jpg"), "-o", str(tmp_path / "again.png"), "-m", folder)
    assert bad.exit_code == 1 and "has no metadata" in bad.stderr


def test_completion_of_the_shell():
    code = "from latte_flow_cli import app; app(prog_name='latte-flow')"
    request = {"_LATTE_FLOW_COMPLETE": "complete_bash", "COMP_WORDS": "latte-flow generate --li", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **request}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["--like"]
    assert "--install-completion" in run("--help").stdout


def test_info_tells_experts_intervals_and_layers(folder, model):
    lines = run("info", "-m", folder).stdout.splitlines()
    experts = [line for line in lines if line.startswith("expert ")]
    assert len(experts) == model.config.num_experts
    assert "sigma 1 to 0.5, layers 0 to 1" in experts[0] and "sigma 0.5 to 0, layers 2 to 3" in experts[1]
    millions = sum(p.numel() for p in model.tower.parameters()) / 1e6
    assert any(f"{millions:.2f} M parameters: 2 experts of 2 layers" in line for line in lines)
    found = json.loads(run("info", "-m", folder, "--json").stdout)
    assert found["tower_parameters"] == sum(p.numel() for p in model.tower.parameters())
    assert [expert["last_layer"] for expert in found["experts"]] == [1, 3]


def test_a_recipe_with_an_unknown_section_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\nbackbonee: {}\n")
    result = run("train", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 1 and "backbonee" in result.stderr


def test_evaluate_reports_shares_and_writes_them(folder, tmp_path, monkeypatch):
    """A random model must score badly: the measure is no rubber stamp."""
    from latte_flow_hf.evaluation import tinyworld

    prompts, questions = tinyworld.generation_prompts, tinyworld.understanding_questions
    monkeypatch.setattr(tinyworld, "generation_prompts", lambda seed: prompts(seed, 2, 2, 2, 2))
    few = lambda seed: {k: v[:3] for k, v in questions(seed, 4).items()}  # noqa: E731
    monkeypatch.setattr(tinyworld, "understanding_questions", few)
    result = run("evaluate", "-m", folder, "--steps", "2", "-o", str(tmp_path / "measured.json"), "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert json.loads(result.stdout) == measured
    assert (
        measured["generation"]["two objects"]["accuracy"] == 0.0
        and measured["generation"]["two objects"]["count"] == 2
    )
    assert measured["understanding"]["shapes"]["accuracy"] < 0.5
    assert len(measured["generation"]["one object"]["wrong"]) == 2


# Serving.


def test_serve_answers_until_it_is_told_to_end(folder, monkeypatch):
    """Everything but uvicorn's own loop, which `tests/serving` runs."""
    served = []

    def run_once(web_app, listening):
        with TestClient(web_app, base_url="http://127.0.0.1") as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            served.extend(model["id"] for model in client.get("/v1/models").json()["data"])
            body = {"prompt": "a cross", "steps": 3}
            assert client.post("/v1/images/generations", json=body).status_code == 200
            assert client.post("/v1/images/generations", json={**body, "steps": 5}).status_code == 400
            assert client.post("/v1/images/generations", json={**body, "size": "128x128"}).status_code == 400

    monkeypatch.setattr("latte_flow_hf.serving.server.run", run_once)
    monkeypatch.setenv("LATTE_FLOW_API_KEY", "secret")
    options = ("--port", "0", "--name", "tiny", "--max-steps", "4", "--max-size", "64")
    result = run("serve", folder, *options)
    assert result.exit_code == 0, result.output
    assert served == ["tiny"] and re.search(r"serving tiny on http://127.0.0.1:\d+/v1", result.stdout)


def test_serve_refuses_in_one_line(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (("--port", port), f"port {port} of 127.0.0.1 cannot be used"),
            (("--port", "0", "--name", "a:b"), "model_name must not"),
            (("--port", "0", "--api-key", ""), "api_keys must be"),
            (("--port", "0", "--fast"), "--fast is for the embedded checkpoint"),
            (("--port", "0", "--host", "nowhere.invalid"), "is no address of this machine"),
        ):
            result = run("serve", folder, *arguments)
            assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert run("serve", str(tmp_path / "missing"), "--port", "0").exit_code == 1
