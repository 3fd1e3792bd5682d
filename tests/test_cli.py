"""The command line over a small random pipeline and over the embedded checkpoint: what a user types and sees."""

import copy
import json

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.cli import app


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
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{folder}", "--lora", "{tmp}/none:0.5"), "none"),
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{folder}", "--lora", "{folder}"), "adapter_config.json"),
        (("generate", "a", "-o", "out"), "output must be an image file"),
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{folder}", "--steps", "0"), "num_inference_steps"),
        (
            ("generate", "a", "-o", "{tmp}/o.png", "-m", "{folder}", "--size", "30"),
            "height must be a positive multiple",
        ),
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{folder}", "--image", "{tmp}/none.png"), "none.png"),
        (("generate", "a", "-o", "{tmp}/o.png", "-m", "{tmp}/nowhere"), "nowhere"),
        (("chat", "what?", "-i", "{tmp}/none.png", "-m", "{folder}"), "none.png"),
        (("info", "-m", "{tmp}/nowhere"), "nowhere"),
        (("train", "{tmp}/none.yaml", "-o", "{tmp}/out"), "none.yaml"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(arguments, words, folder, tmp_path):
    result = run(*[argument.format(tmp=tmp_path, folder=folder) for argument in arguments])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ") and words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_chat_answers_and_streams(folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    result = run("chat", "what is this?", "-i", str(tmp_path / "red.png"), "-m", folder, "--max-new-tokens", "4")
    assert result.exit_code == 0 and result.stdout.strip()


def test_a_conversation_goes_on_until_an_empty_line_or_the_end(folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = f"hello\n/image {tmp_path}/red.png\nwhat is this?\n/image {tmp_path}/none.png\n\n"
    for text in (lines, "hello\n"):
        result = run("chat", "-m", folder, "--max-new-tokens", "2", input=text)
        assert result.exit_code == 0, result.output
    assert "none.png" in run("chat", "-m", folder, "--max-new-tokens", "2", input=lines).stderr


def test_info_tells_experts_intervals_and_layers(folder, model):
    lines = run("info", "-m", folder).stdout.splitlines()
    experts = [line for line in lines if line.startswith("expert ")]
    assert len(experts) == model.config.num_experts
    assert "sigma 1 to 0.5, layers 0 to 1" in experts[0] and "sigma 0.5 to 0, layers 2 to 3" in experts[1]
    millions = sum(p.numel() for p in model.tower.parameters()) / 1e6
    assert any(f"{millions:.2f} M parameters: 2 experts of 2 layers" in line for line in lines)


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
    result = run("evaluate", "-m", folder, "--steps", "2", "-o", str(tmp_path / "measured.json"))
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert (
        measured["generation"]["two objects"]["accuracy"] == 0.0
        and measured["generation"]["two objects"]["count"] == 2
    )
    assert measured["understanding"]["shapes"]["accuracy"] < 0.5
    assert len(measured["generation"]["one object"]["wrong"]) == 2
