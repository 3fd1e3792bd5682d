"""Plans of recipes: against the models, caches and checkpoints that runs of the same recipes make."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from measured_steps import LiveBytes
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.training.costs import Examples, expert_flops, prefill_flops
from latte_flow_hf.training.devices import find_device
from latte_flow_hf.training.plan import build_models, make_plan, plan_arguments
from latte_flow_hf.training.plan_report import plan_text
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.shapes import decoder_shape, tower_shape
from latte_flow_hf.training.train import RecipeTrainer, load_pipeline, prepare_model, train


ROOT = Path(__file__).parents[2]
IMAGENET = ROOT / "recipes" / "imagenet256.yaml"
PAGE = ROOT / "docs" / "guides" / "plan.md"
H100 = find_device("h100")


def tensor_bytes(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.fixture(scope="module")
def imagenet():
    """The paper's setting on 8 H100."""
    return make_plan(Recipe.from_yaml(IMAGENET), H100, 8, num_images=1_281_167, num_prompts=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": [1]},
        {"trainable": "vlm", "data": {"cache_contexts": False}},
        {"lora": {"experts": [0], "r": 4}},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_run(recipe, changes):
    settings = Recipe.from_dict(recipe(**changes))
    plan = make_plan(settings, H100, num_images=12)
    pipe = load_pipeline(settings.model)
    model = prepare_model(settings, pipe)
    weights = [*model.parameters(), *pipe.vae.parameters()]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    assert plan.parameters["trained"] == trained
    assert plan.parameters["frozen"] == sum(weight.numel() for weight in weights) - trained
    assert plan.memory.gradients == 4 * trained


def test_disk_is_that_of_the_run(recipe, run, tmp_path):
    """The cache of a run, and its checkpoints."""
    content = recipe(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 4, "save_steps": 2})
    run(content, tmp_path)
    contexts = tensor_bytes(tmp_path / "cache", "contexts-*")
    # 11 images can be read, and each prompt has the same number of tokens except for the empty one.
    plan = make_plan(Recipe.from_dict(content), H100, num_images=11, num_prompts=5, prompt_tokens=1)
    assert plan.disk["latents"] == pytest.approx(tensor_bytes(tmp_path / "cache", "latents-*"), rel=0.1)
    num_tokens = round(contexts / plan.disk["contexts"])
    plan = make_plan(Recipe.from_dict(content), H100, num_images=11, num_prompts=5, prompt_tokens=num_tokens)
    assert plan.disk["contexts"] == pytest.approx(contexts, rel=0.1)
    # Two checkpoints are kept, and one more is planned for.
    checkpoints = sum(path.stat().st_size for path in (tmp_path / "work" / "checkpoints").rglob("*") if path.is_file())
    assert plan.disk["checkpoints"] * 2 / 3 == pytest.approx(checkpoints, rel=0.1)


def test_steps_of_epochs(recipe):
    training = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    settings = Recipe.from_dict(recipe(training=training))
    # 100 images in batches of 2 x 4: 13, in pairs 7.
    assert make_plan(settings, H100, 2, num_images=100).steps == 21
    with pytest.raises(ValueError, match="give --num-images"):
        make_plan(settings, H100, 2)


def test_folded_guidance_and_more_devices(recipe):
    once = make_plan(Recipe.from_dict(recipe()), H100, num_images=12)
    folded = make_plan(Recipe.from_dict(recipe(folded_guidance_scale=2.0)), H100, num_images=12)
    assert once.flops["step"] < folded.flops["step"] < 1.5 * once.flops["step"]
    four = make_plan(Recipe.from_dict(recipe()), H100, 4, num_images=12)
    assert four.flops["step"] == 4 * once.flops["step"] and four.hours["training"] == once.hours["training"]
    assert four.device_hours == pytest.approx(4 * four.hours["total"])
    half = make_plan(Recipe.from_dict(recipe()), H100, utilisation=0.175, num_images=12)
    assert half.hours["training"] == pytest.approx(2 * once.hours["training"])
    assert half.hours["update"] == once.hours["update"] > 0
    own = make_plan(Recipe.from_dict(recipe()), find_device("mine", 10, 10), num_images=12)
    assert own.hours["update"] == 0 and "bandwidth of the device is not known" in " ".join(own.notes)


def test_recipes_of_the_tiny_world():
    for name in ("experts", "lora", "distill", "distill_lora"):
        plan = make_plan(Recipe.from_yaml(ROOT / "recipes" / "tinyworld" / f"{name}.yaml"), H100)
        assert plan.fits and plan.flops["run"] > 0 and plan.disk["contexts"] > 0
        assert ("distill" in name) == (plan.flops["trajectories"] > 0) == (plan.disk["latents"] == 0)


def test_the_papers_setting(imagenet):
    assert imagenet.parameters["backbone"] == 2_208_985_600
    assert imagenet.batch["per_expert"] == [16] * 4 and imagenet.steps == 160_000
    assert imagenet.fits and imagenet.memory.peak > sum(
        getattr(imagenet.memory, part) for part in ("backbone", "tower", "optimizer", "gradients")
    )
    # 32 x 8 x 8 numbers of each image and of its mirror image.
    assert imagenet.disk["latents"] == 2 * 1_281_167 * 2048 * 4
    # For each weight 40 bytes, weight, gradient and two moments in float32 and clipping, and 12 for its average.
    assert imagenet.hours["update"] * 3600 == pytest.approx(160_000 * 52 * 1_582_859_584 / 3.35e12)
    parts = ("training", "update", "averages", "latents", "contexts")
    assert sum(imagenet.hours[part] for part in parts) == pytest.approx(imagenet.hours["total"])


def test_averages_on_the_cpu_are_copied_at_each_step(imagenet):
    settings = Recipe.from_yaml(IMAGENET)
    assert settings.ema is not None and imagenet.hours["averages"] == 0
    on_cpu = settings.model_copy(update={"ema": settings.ema.model_copy(update={"device": "cpu"})})
    plan = make_plan(on_cpu, H100, 8, num_images=1_281_167, num_prompts=1000)
    assert plan.hours["averages"] * 3600 == pytest.approx(160_000 * 4 * 1_582_859_584 / 25e9)
    assert imagenet.memory.peak - plan.memory.peak == pytest.approx(4 * 1_582_859_584)
    assert "with averages on the device the peak is" in " ".join(plan.notes)


def test_vanilla_costs_four_times_as_much(imagenet):
    settings = Recipe.from_yaml(IMAGENET)
    model = settings.model.model_copy(update={"experts": {"num_experts": 1}})
    vanilla = make_plan(settings.model_copy(update={"model": model}), H100, 8)
    # (Paper: 28.3 to 7.08 TFLOPs per image.)
    assert vanilla.flops["step"] / imagenet.flops["step"] == pytest.approx(28.3 / 7.08, rel=0.03)
    assert vanilla.parameters["trained"] == pytest.approx(imagenet.parameters["trained"], rel=0.001)
    assert vanilla.parameters["active"] == vanilla.parameters["tower"]
    steps = [f"{plan.flops['step'] / 1e12:.1f}" for plan in (vanilla, imagenet)]
    assert f"{steps[0]} TFLOP instead of {steps[1]}" in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"bf16": True}},
        {"training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 32}},
        {"training": {"activation_checkpointing": True}},
        {"training": {"optim": "adafactor"}},
        {"lora": {"experts": [0, 1], "r": 20}},
        {"data": {"cache": None}},
    ],
    ids=str,
)
def test_the_peak_of_a_run(changes, tmp_path, monkeypatch):
    """A run of `latte-flow train` on the tiny world, with its data loader, averages and callbacks."""
    content = yaml.safe_load((ROOT / "recipes" / "tinyworld" / "experts.yaml").read_text())
    del content["samples"]
    content["data"].update(cache=str(tmp_path / "cache"), source={"path": "tinyworld", "num_images": 128})
    content["training"].update(max_steps=3, save_steps=100)
    for name, values in changes.items():
        content[name] = {**content.get(name, {}), **values}
    settings, measured = Recipe.from_dict(content), []
    original = RecipeTrainer.train

    def train_measured(trainer, *arguments, **kwargs):
        weights = [*trainer.model.parameters(), *trainer.model.buffers()]
        with LiveBytes(weights) as live:
            result = original(trainer, *arguments, **kwargs)
        measured.append(live.peak + sum(weight.nbytes for weight in weights))
        return result

    monkeypatch.setattr(RecipeTrainer, "train", train_measured)
    train(settings, tmp_path / "work", tmp_path / "output")
    # The longest prompts of the tiny world have 28 tokens with the chat template.
    memory = make_plan(settings, H100, prompt_tokens=28).memory
    assert memory.peak - memory.autoencoder == pytest.approx(measured[0], rel=0.1)


@pytest.mark.slow
def test_operations_at_full_size(imagenet):
    """The formula of a step against torch's counter on the meta device, at 2B."""
    model, _ = build_models(Recipe.from_yaml(IMAGENET))
    with torch.device("meta"):
        states = tuple(torch.zeros(64, 2, 32, 128) for _ in range(28))
        mask, positions = torch.ones(64, 32, dtype=torch.bool), torch.zeros(64, dtype=torch.long)
        context = LatteFlowContext(states, states, mask, positions, has_padding=False)
        latents = torch.zeros(64, 32, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model.train()(latents=latents, context=context).loss.backward()
    assert imagenet.flops["step"] == pytest.approx(8 * counter.get_total_flops(), rel=0.02)


def test_an_image_costs_what_the_benchmarks_count():
    """80 evaluations with two prompts of 27 tokens, against the counted table of `python -m benchmarks.flops`."""
    table = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    row = next(
        line for line in table.splitlines() if line.startswith("| LaTtE-Flow 2B, K = 4, 40 steps with guidance")
    )
    prompts, loop = (float(row.split("|")[column]) * 1e12 for column in (2, 3))
    model, _ = build_models(Recipe.from_yaml(IMAGENET))
    assert prefill_flops(decoder_shape(model.vlm), 2, 27) == pytest.approx(prompts, rel=0.02)
    assert 80 * expert_flops(tower_shape(model), 0, Examples(1, 64, 27)).forward == pytest.approx(loop, rel=0.02)


def test_the_page_shows_the_plan(imagenet):
    assert plan_text(imagenet, "imagenet256.yaml") in PAGE.read_text()


def test_what_does_not_fit_and_the_switch_that_helps():
    settings, device = Recipe.from_yaml(IMAGENET), find_device("rtx4090")
    plan = make_plan(settings, device, 8)
    assert not plan.fits and plan.together and plan.together[-1].fits
    text = plan_text(plan, "imagenet256.yaml")
    assert "DOES NOT FIT" in text and "The largest part is optimizer" in text
    assert "accelerate: recipes/accelerate/fsdp2.yaml" in text and "it fits" in text
    # The figure after the switch is that of a plan with it.
    sharded = make_plan(settings, device, 8, is_sharded=True)
    assert sharded.memory.peak == next(s.peak for s in plan.switches if "fsdp2" in s.setting)


def test_switches_of_the_recipe_do_what_the_plan_says(recipe):
    """Each switch, written into the recipe, gives the memory that the plan told before; none is enough here."""
    content, small = recipe(), find_device("mine", memory_gb=1e-4, tflops=10)
    plan = make_plan(Recipe.from_dict(content), small, num_images=12)
    assert len(plan.switches) >= 4
    assert not any(switch.fits for switch in [*plan.switches, *plan.together])
    assert "No switch is enough" in plan_text(plan)
    for switch in plan.switches:
        change = yaml.safe_load(switch.setting)
        changed = {**content, **{name: {**content[name], **values} for name, values in change.items()}}
        after = make_plan(Recipe.from_dict(changed), small, num_images=12)
        assert after.memory.peak == switch.peak < plan.memory.peak, switch.setting


def test_notes_tell_what_is_not_known(recipe):
    training = {"per_device_train_batch_size": 3}
    content = recipe(data={"cache": "cache"}, training=training, ema={"device": "cpu"})
    content["data"]["label"] = content["data"].pop("caption")
    notes = " ".join(make_plan(Recipe.from_dict(content), H100).notes)
    assert "give --num-images" in notes and "give --num-prompts" in notes
    assert "batch of 3 per device is split unevenly over 2 experts ([2, 1]" in notes
    assert "averages on the CPU" in notes
    understanding = {"source": {"path": "tinyworld", "num_conversations": 4}}
    notes = " ".join(make_plan(Recipe.from_dict(recipe(understanding=understanding)), H100).notes)
    assert "conversations of `understanding` are not counted" in notes


def test_the_network_is_not_needed_for_a_folder(backbone, vae, recipe, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    vae.save_config(tmp_path / "vae")
    content = recipe(data={"size": 32})
    content["model"] = {"backbone": "user/unknown", "autoencoder": "user/unknown", "experts": {"num_experts": 2}}
    settings = Recipe.from_dict(content)
    with pytest.raises(OSError, match=r"autoencoder user/unknown is not here .* give --autoencoder-config"):
        make_plan(settings, H100)
    with pytest.raises(OSError, match=r"backbone user/unknown is not here .* give --backbone-config"):
        make_plan(settings, H100, autoencoder_config=tmp_path / "vae")
    plan = make_plan(
        settings, H100, backbone_config=tmp_path / "backbone", autoencoder_config=tmp_path / "vae" / "config.json"
    )
    assert plan.parameters["backbone"] == sum(weight.numel() for weight in backbone.parameters())
    assert plan.parameters["autoencoder"] == sum(weight.numel() for weight in vae.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_devices": 0}, "--num-devices must be at least 1, got 0"),
        ({"num_devices": -2}, "--num-devices must be at least 1, got -2"),
        ({"num_devices": 10**9}, "--num-devices must be at most 100000, got 1000000000"),
        ({"utilisation": 0.0}, r"--utilisation .* above 0"),
        ({"utilisation": 1.5}, "--utilisation .* got 1.5"),
        ({"utilisation": float("nan")}, "--utilisation"),
        ({"num_images": 0}, "--num-images must be at least 1"),
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
        ({"is_sharded": True}, "--fsdp needs at least 2 devices"),
        ({"backbone_config": "nowhere"}, "--backbone-config are|--backbone-config and"),
    ],
)
def test_arguments_that_are_refused(recipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Recipe.from_dict(recipe()), H100, **{"num_images": 12, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"optim": "galore_adamw"}}, "optim 'galore_adamw': the memory .* not known here; known are"),
        ({"training": {"optim": "adamm"}}, "training: .*adamm"),
        ({"training": {"deepspeed": "zero.json"}}, "deepspeed: its costs are not known"),
        ({"training": {"activation_checkpointing_kwargs": {"offload": True}}}, "'offload'"),
        ({"training": {"accelerator_config": {"split_batches": True}}}, "split_batches: its costs are not known"),
        ({"lora": {"experts": [0], "use_dora": True}}, "use_dora: its costs are not known"),
        ({"lora": {"experts": [0], "modules_to_save": ["linear_1"]}}, "lora: the costs of .*linear_1.* are not known"),
        ({"lora": {"experts": [7]}}, "experts must be a list of some of"),
        ({"data": {"size": 33}}, "size must be a positive multiple of 8, got 33"),
        ({"trainable": [9]}, "experts must be"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Recipe.from_dict(recipe(**changes)), H100, num_images=12)


def test_settings_of_an_accelerator_are_checked_without_one(recipe):
    training = {"bf16": False, "fp16": True, "tf32": True, "torch_compile": True}
    settings = Recipe.from_dict(recipe(training=training))
    assert plan_arguments(settings).fp16
    plan = make_plan(settings, H100, num_images=12)
    assert plan.assumptions["peak_flops"] == {"training": H100.bfloat16, "latents": H100.tf32, "contexts": H100.tf32}


def test_the_command(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))

    def run(*arguments):
        return CliRunner().invoke(app, ["plan", str(path), "--num-images", "12", *arguments])

    done = run("--device", "h100", "--num-devices", "8")
    assert done.exit_code == 0, done.output
    assert "recipe.yaml on 8 x h100, data parallel" in done.stdout and "it fits" in done.stdout
    event = json.loads(run("--device", "h100", "--json").stdout)
    assert event["fits"] and event["memory"]["peak"] > 0 and event["parameters"]["trained"] > 0
    assert event["hours"]["total"] > 0 and event["assumptions"]["utilisation"] == 0.35
    done = run("--device", "h101")
    assert done.exit_code == 1 and "device must be one of" in done.stderr and "h101" in done.stderr
    assert run().exit_code == 2
    path.write_text("model: {pipelin: tinyworld}")
    assert "did you mean 'pipeline'?" in run("--device", "h100").stderr
