"""Adapters and full fine-tuning change only the selected experts, and adapters are refused by other models."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import same_bytes
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration, tiny_checkpoint
from latte_flow_hf.modeling.adapters import read_adapter_mark
from latte_flow_hf.training import TextToImageCollator, encode_prompts, expert_lora_config, train_only_experts
from latte_flow_hf.training.cache import hash_module


class RandomLatents(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index % 2)
        return {"latents": torch.randn(4, 8, 8, generator=generator), "prompt": index % 2}


@pytest.fixture(scope="module")
def four(make_model):
    """4 experts of one layer each; a test that changes the model must copy it."""
    return make_model(num_experts=4)


@pytest.fixture(scope="module")
def contexts(four, processor):
    return encode_prompts(four, processor, ["a red circle", "a blue square", ""])


def train(model, contexts, folder, max_steps=3):
    arguments = TrainingArguments(
        dataloader_pin_memory=False,
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model, arguments, train_dataset=RandomLatents(), data_collator=TextToImageCollator(contexts, 0.1)
    )
    trainer.train()
    return trainer


def adapted_modules(model) -> set[str]:
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}


def layer_of(name: str) -> int:
    return int(re.match(r"tower\.layers\.(\d+)\.", name)[1])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("attention",), {f"self_attn.{n}_proj" for n in "qkvo"}),
        (("mlp",), {f"mlp.{n}_proj" for n in ("gate", "up", "down")}),
        (("modulation",), {"modulation", "self_attn.residual_gate"}),
    ],
)
def test_the_config_targets_the_parts_of_the_selected_expert(model, parts, expected):
    changed = copy.deepcopy(model)
    changed.add_adapter(expert_lora_config(model, [1], r=2, parts=parts), "style")
    # 2 experts of 2 layers: expert 1 owns layers 2 and 3, of which the first has no residual to gate.
    found = adapted_modules(changed)
    assert {name.split(".", 3)[3] for name in found} == expected
    assert {layer_of(name) for name in found} == {2, 3}
    assert "tower.layers.2.self_attn.residual_gate" not in found
    trainable = {name for name, parameter in changed.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name and layer_of(name) in (2, 3) for name in trainable)


def test_all_linear_layers_of_an_expert_are_adapted_by_default(four):
    changed = copy.deepcopy(four)
    changed.add_adapter(expert_lora_config(four, [3, 0]), "style")
    linears = {
        name
        for name, module in four.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("tower.layers.0.", "tower.layers.3."))
    }
    assert adapted_modules(changed) == linears
    config = changed.peft_config["style"]
    assert (config.r, config.lora_alpha) == (16, 16)
    # A second adapter: the linear layers are found inside the wrappers of the first, whose own are ignored.
    second = expert_lora_config(changed, [0, 3], r=4, lora_alpha=8, lora_dropout=0.1)
    assert second.target_modules == config.target_modules
    assert (second.r, second.lora_alpha, second.lora_dropout) == (4, 8, 0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"experts": []}, r"experts must be a list of some of \[0, 1, 2, 3\], got \[\]"),
        ({"experts": [0, 4]}, r"got \[0, 4\]"),
        ({"experts": [-1]}, r"got \[-1\]"),
        ({"experts": 1}, "got 1"),
        ({"experts": [0], "parts": ("attention", "norm")}, "parts must be some of .*'norm'"),
        ({"experts": [0], "parts": "mlp"}, "parts must be some of .*got 'mlp'"),
    ],
)
def test_unknown_experts_and_parts_are_refused(four, arguments, words):
    with pytest.raises(ValueError, match=words):
        expert_lora_config(four, **arguments)


@pytest.mark.parametrize("wrap", ["get_peft_model", "add_adapter"])
def test_the_stock_trainer_trains_and_saves_an_ordinary_adapter(wrap, four, contexts, tmp_path):
    base = copy.deepcopy(four)
    model = copy.deepcopy(four)
    config = expert_lora_config(model, [0, 2], r=2)
    if wrap == "get_peft_model":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    trainer = train(model, contexts, tmp_path / "run")
    trainer.save_model(tmp_path / "adapter")

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in saved} == {0, 2}
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert read_adapter_mark(config["target_modules"]) == {
        "num_experts": "4",
        "num_hidden_layers": "4",
        "hidden_size": "32",
        "experts": "0,2",
    }

    # The loaded adapter is the trained one, and the weights of the base model are unchanged.
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    index = torch.tensor([0, 1])
    inner = model.get_base_model() if wrap == "get_peft_model" else model
    reloaded = PeftModel.from_pretrained(copy.deepcopy(four), tmp_path / "adapter").get_base_model()
    by_transformers = copy.deepcopy(four)
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        for expert, timestep in enumerate((900.0, 700.0, 400.0, 100.0)):
            outputs = [
                m.eval().predict_velocity(latents, timestep, contexts.select(index))
                for m in (inner, reloaded, by_transformers, base)
            ]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
            assert torch.equal(outputs[0], outputs[3]) == (expert in (1, 3))
    plain = {name.replace(".base_layer", ""): value for name, value in inner.state_dict().items()}
    assert all(torch.equal(plain[name], value) for name, value in base.state_dict().items())


def test_training_experts_are_those_with_trainable_weights(four):
    model = copy.deepcopy(four)
    assert model.training_experts == [0, 1, 2, 3]
    model.add_adapter(expert_lora_config(model, [1, 3], r=2), "a")
    assert model.training_experts == [1, 3]
    model.tower.head.requires_grad_(True)
    # Shared modules are used in every interval.
    assert model.training_experts == [0, 1, 2, 3]
    assert train_only_experts(copy.deepcopy(four), [2]).training_experts == [2]
    assert copy.deepcopy(four).requires_grad_(False).training_experts == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_frozen_experts_are_not_computed(batch_size, four, contexts, count_layers, monkeypatch):
    model = train_only_experts(copy.deepcopy(four), [3, 1])
    seen = []
    predict = model.predict_velocity

    def spy(latents, timestep, context, expert):
        seen.append((expert, timestep))
        return predict(latents, timestep, context, expert=expert)

    monkeypatch.setattr(model, "predict_velocity", spy)
    latents = torch.randn(batch_size, 4, 8, 8)
    with count_layers(model) as calls:
        loss, expert_losses = model.flow_loss(latents, contexts.select(torch.zeros(batch_size, dtype=torch.int64)))
    assert dict(calls) == {1: 1, 3: 1}
    assert [expert for expert, _ in seen] == [1, 3]
    for expert, timesteps in seen:
        assert {model.expert_of(t) for t in timesteps.tolist()} == {expert}
        assert len(timesteps) == max(batch_size // 2, 1)
    assert (expert_losses > 0).tolist() == [False, True, False, True]
    torch.testing.assert_close(expert_losses.sum(), loss.detach())
    loss.backward()
    assert all(p.grad is not None for p in model.tower.layers[1].parameters())
    assert all(p.grad is None for p in model.tower.head.parameters())


def test_full_fine_tuning_does_not_change_other_experts(four, contexts, tmp_path):
    model = train_only_experts(copy.deepcopy(four), [2])
    train(model, contexts, tmp_path / "run")
    assert hash_module(model.vlm) == hash_module(four.vlm)
    changed = {
        name for (name, old), new in zip(four.named_parameters(), model.parameters()) if not torch.equal(old, new)
    }
    assert changed and all(layer_of(name) == 2 for name in changed)


@pytest.mark.parametrize("experts", [[], [4]])
def test_full_fine_tuning_of_no_expert_is_refused(four, experts):
    model = copy.deepcopy(four)
    with pytest.raises(ValueError, match="experts must be"):
        train_only_experts(model, experts)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def adapter(four, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(copy.deepcopy(four), expert_lora_config(four, [1], r=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(four):
    vlm_config = four.config.vlm_config.to_dict()
    vlm_config["text_config"].update(hidden_size=64, num_attention_heads=8)
    vlm_config["vision_config"].update(hidden_size=64)
    return LatteFlowForConditionalGeneration(
        LatteFlowConfig(vlm_config=vlm_config, num_experts=4, latent_channels=4, timestep_frequency_dim=16)
    )


def test_an_adapter_knows_experts_of_unequal_size(make_model):
    """Trained for one grouping of the layers, refused by another, and weighted by the experts of its own."""
    sizes = {"num_experts": 2, "tower_layers": [0, 2, 3], "layers_per_expert": [1, 2]}
    model = make_model(**sizes)
    config = expert_lora_config(model, [1], r=2)
    mark = read_adapter_mark(config.target_modules)
    assert (mark["layers_per_expert"], mark["tower_layers"], mark["experts"]) == ("1-2", "0-2-3", "1")
    model.add_adapter(config, "style")
    assert {layer_of(name) for name in adapted_modules(model)} == {1, 2}
    model.add_adapter(expert_lora_config(model, [0, 1], r=2), "both")
    model.set_adapter_weights({"both": [1.0, 0.5]})
    scales = {name: module.scaling["both"] for name, module in model.tower.named_modules() if name.endswith("up_proj")}
    assert {int(name.split(".")[1]): scale for name, scale in scales.items()} == {0: 1.0, 1: 0.5, 2: 0.5}
    for other in ({**sizes, "layers_per_expert": [2, 1]}, {**sizes, "tower_layers": [0, 1, 3]}, {"num_experts": 2}):
        with pytest.raises(
            ValueError, match=r"was trained for a model with .*layers_per_expert=1-2, tower_layers=0-2-3"
        ):
            make_model(**other).add_adapter(config, "style")


LOADERS = {
    "transformers": lambda model, folder: model.load_adapter(str(folder)),
    "peft": lambda model, folder: PeftModel.from_pretrained(model, folder),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("model", "num_experts=4, .*hidden_size=32; this model has num_experts=2, .*hidden_size=32"),
        ("wide", "num_experts=4, .*hidden_size=32; this model has num_experts=4, .*hidden_size=64"),
    ],
)
def test_an_adapter_of_another_model_is_refused(load, other, words, adapter, request):
    model = copy.deepcopy(request.getfixturevalue(other))
    with pytest.raises(ValueError, match=f"adapter .* was trained for a model with {words}"):
        load(model, adapter)


def test_a_failed_load_leaves_no_adapter_behind(four, wide, adapter, tmp_path):
    """Without its mark an adapter of another width is only detected when its weights are loaded."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"].split(")", 1)[1]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    model = copy.deepcopy(wide)
    with pytest.raises(
        ValueError, match=r"has another shape of 11 weights: tower.layers.1.mlp.down_proj.lora_B.weight"
    ):
        model.load_adapter(str(tmp_path))
    assert not hasattr(model, "peft_config") and same_bytes(model, wide)


def test_an_adapter_folder_loads_with_its_base_model(four, contexts, tmp_path):
    four.save_pretrained(tmp_path / "base")
    base = LatteFlowForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, expert_lora_config(base, [1], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    latents, index = torch.randn(1, 4, 8, 8), torch.tensor([0])
    with torch.no_grad():
        expected = adapted.get_base_model().eval().predict_velocity(latents, 700.0, contexts.select(index))
        assert torch.equal(loaded.predict_velocity(latents, 700.0, contexts.select(index)), expected)


def test_the_guide_runs(tmp_path, monkeypatch):
    """All Python code of the guide, in order, at a small size."""
    guide = Path(__file__).parents[2] / "docs" / "guides" / "teach_an_expert_with_lora.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL))
    for large, small in {
        "num_images = 4000": "num_images = 8",
        "max_steps=600": "max_steps=2",
        "per_device_train_batch_size=64": "per_device_train_batch_size=4",
        'pipe("an orange circle", ': 'pipe("an orange circle", num_inference_steps=4, ',
    }.items():
        assert code.count(large) == 1
        code = code.replace(large, small)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(guide), "exec"), names)
    assert (tmp_path / "outputs" / "orange-adapter" / "adapter_config.json").exists()
    assert (tmp_path / "outputs" / "orange.png").exists()
    assert names["model"].training_experts == [3]
    plain = LatteFlowForConditionalGeneration.from_pretrained(tiny_checkpoint(), subfolder="model")
    fused = LatteFlowForConditionalGeneration.from_pretrained(tmp_path / "outputs" / "orange-checkpoint" / "model")
    changed = {
        name for (name, old), new in zip(plain.named_parameters(), fused.parameters()) if not torch.equal(old, new)
    }
    # Experts 2 and 3 of 4, with 2 layers each.
    assert changed and all(layer_of(name) in (4, 5, 6, 7) for name in changed)
