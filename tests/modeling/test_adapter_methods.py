# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""PEFT methods, against `PeftModel.from_pretrained`, and the weights of adapters for each expert."""

import copy
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from helpers import noise, same_bytes
from peft import PeftModel, get_peft_model

from latte_flow_hf.modeling.adapters import SCALABLE_METHODS, read_adapter_mark
from latte_flow_hf.training import expert_lora_config, train_only_experts


TIMESTEPS = (900.0, 700.0, 400.0, 100.0)  # one for each of four experts

# By the name in the guide. `{}` in an error is the name of the method or setting.
METHODS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=8),
    "rsLoRA": peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, use_dora=True),
    "LoHa": peft.LoHaConfig(r=4),
    "LoKr": peft.LoKrConfig(r=4),
    "SHiRA": peft.ShiraConfig(r=2),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8),
    "BOFT": peft.BOFTConfig(boft_block_size=4),
    "IA3": peft.IA3Config(feedforward_modules=[]),
    "HRA": peft.HRAConfig(r=4),
    "FourierFT": peft.FourierFTConfig(n_frequency=50),
    "MiSS": peft.MissConfig(r=4),
}
REFUSED = {
    "PiSSA": (peft.LoraConfig(r=4, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "OLoRA": (peft.LoraConfig(r=4, init_lora_weights="olora"), "init_lora_weights='olora'"),
    "VeRA": (peft.VeraConfig(r=4), "method VERA, whose layers share weights"),
    "RandLora": (peft.RandLoraConfig(r=4), "method RANDLORA, whose layers share weights"),
    "VB-LoRA": (
        peft.VBLoRAConfig(num_vectors=8, vector_length=4, topk=2),
        "method VBLORA, whose layers share weights",
    ),
}


@pytest.fixture(scope="module")
def four(make_model):
    """4 experts of one layer each; a test that changes the model must copy it."""
    return make_model(num_experts=4)


@pytest.fixture(scope="module")
def velocities(four, encode):
    context = four.encode_context(**encode("a red circle"))
    latents = noise(1, 4, 8, 8)

    def velocities(model) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.predict_velocity(latents, timestep, context) for timestep in TIMESTEPS])

    return velocities


def save_trained(four, config, folder, seed=0):
    """The folder of an adapter of experts 1 and 3, with random numbers added to all that it trains."""
    config = copy.deepcopy(config)
    config.target_modules = expert_lora_config(four, [1, 3], parts=("attention", "mlp")).target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(four), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return folder


def by_peft(four, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(four), folder).get_base_model().eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_acts_as_in_peft_and_can_be_removed(method, four, velocities, tmp_path, recwarn, capsys, caplog):
    config = METHODS[method]
    plain = velocities(four)
    first, second = (save_trained(four, config, tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    expected = velocities(by_peft(four, first))
    model = copy.deepcopy(four)
    recwarn.clear()
    model.load_adapter(first, "a")
    # A good adapter is loaded in silence; BOFT itself warns that its CUDA extension is missing.
    assert [str(warning.message) for warning in recwarn if method != "BOFT"] == [] and caplog.records == []
    assert tuple(capsys.readouterr()) == ("", "")
    loaded = velocities(model)
    assert torch.equal(loaded, expected) and not torch.allclose(loaded[[1, 3]], plain[[1, 3]], atol=1e-3)
    assert torch.equal(loaded[[0, 2]], plain[[0, 2]])

    model.load_adapter(second, "b")
    assert torch.equal(velocities(model), velocities(by_peft(four, second)))
    model.set_adapter("a")
    assert torch.equal(velocities(model), expected)
    model.delete_adapter("b")
    assert torch.equal(velocities(model), expected)
    model.set_adapter_weights({"a": [1, 1, 1, 0]})
    only_first = velocities(model)
    assert torch.equal(only_first[:3], expected[:3]) and torch.equal(only_first[3], plain[3])
    model.set_adapter_weights({"a": 1.0})
    model.fuse_adapters()
    torch.testing.assert_close(velocities(model), expected, atol=2e-4, rtol=1e-3)
    model.unfuse_adapters()
    torch.testing.assert_close(velocities(model), expected, atol=2e-4, rtol=1e-3)
    model.delete_adapter("a")
    torch.testing.assert_close(velocities(model), plain, atol=2e-4, rtol=1e-3)
    assert model.state_dict().keys() == four.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_half_of_a_weight_is_half_of_the_change_or_is_refused(method, four, velocities, tmp_path):
    config = METHODS[method]
    model = copy.deepcopy(four)
    model.load_adapter(save_trained(four, config, tmp_path), "a")
    if config.peft_type.value not in SCALABLE_METHODS:
        before = velocities(model)
        with pytest.raises(ValueError, match=rf"adapter 'a' \({config.peft_type.value}\) has no weight in 'tower"):
            model.set_adapter_weights({"a": 0.5})
        assert torch.equal(velocities(model), before)
        return
    if method == "DoRA":
        return  # Its effect is no multiple of the weight.

    def change(weight):
        model.set_adapter_weights({"a": weight})
        return model.tower.layers[1].mlp.up_proj.get_delta_weight("a")

    torch.testing.assert_close(change(0.5), 0.5 * change(1.0))
    torch.testing.assert_close(change([0, -2, 0, 1]), -2 * change(1.0))


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_would_go_wrong_is_refused_by_name(method, four, velocities, tmp_path):
    config, words = REFUSED[method]
    model = copy.deepcopy(four)
    with pytest.raises(ValueError, match=words):
        model.load_adapter(save_trained(four, config, tmp_path))
    assert same_bytes(model, four)


@pytest.mark.parametrize("method", ["PiSSA", "OLoRA"])
def test_initialisations_that_change_the_base_load_once_peft_has_converted_them(method, four, velocities, tmp_path):
    """PEFT saves them as plain LoRA of twice the rank, relative to the model before."""
    config = copy.deepcopy(REFUSED[method][0])
    config.target_modules = expert_lora_config(four, [1, 3], parts=("attention", "mlp")).target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(copy.deepcopy(four), config)
        # What PEFT's documentation does: the adapter as it was at first.
        trained.peft_config["default"].init_lora_weights = True
        trained.save_pretrained(tmp_path / "initial")
        trained.peft_config["default"].init_lora_weights = method.lower()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        trained.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=tmp_path / "initial")
    expected = velocities(trained.get_base_model().eval())
    model = copy.deepcopy(four)
    model.load_adapter(tmp_path / "final", "a")
    assert model.peft_config["a"].r == 8
    torch.testing.assert_close(velocities(model), expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(expected[1], velocities(four)[1], atol=1e-2)
    model.unload_adapters()
    assert same_bytes(model, four)


def test_the_guide_lists_the_methods():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "teach_an_expert_with_lora.md").read_text()
    rows = dict(re.findall(r"^\| (\S+) \| (yes|1 or 0|refused)[^|]*\|", guide, flags=re.MULTILINE))
    scalable = {name: config.peft_type.value in SCALABLE_METHODS for name, config in METHODS.items()}
    assert rows == {name: "yes" if scales else "1 or 0" for name, scales in scalable.items()} | dict.fromkeys(
        REFUSED, "refused"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bias": "all"}, "bias='all', which replaces biases"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
    ],
)
def test_settings_that_could_not_be_undone_are_refused(arguments, words, four):
    with pytest.raises(ValueError, match=words):
        expert_lora_config(four, [1], r=2, **arguments)
    config = peft.LoraConfig(target_modules=["up_proj"], **arguments)
    with pytest.raises(ValueError, match=words):
        copy.deepcopy(four).add_adapter(config)


def test_methods_are_not_mixed(four, tmp_path):
    model = copy.deepcopy(four)
    model.load_adapter(save_trained(four, METHODS["LoRA"], tmp_path / "lora"), "a")
    with pytest.raises(ValueError, match=r"of the method IA3, and adapters of \['LORA'\] are loaded"):
        model.load_adapter(save_trained(four, METHODS["IA3"], tmp_path / "ia3"), "b")
    assert list(model.peft_config) == ["a"]


def test_dora_is_refused_where_a_row_is_zero(make_model):
    """The modulation and the gates of a new tower."""
    new = make_model(filled=False, num_experts=4)
    words = (
        r"uses DoRA.* 5 weights have rows of zeros, such as \['tower.layers.0.self_attn.q_proj', 'tower.layers.0.mod"
    )
    new.tower.layers[0].self_attn.q_proj.weight.data[3] = 0
    with pytest.raises(ValueError, match=r"DoRA.* 1 weights have rows of zeros.*'tower.layers.0.self_attn.q_proj'"):
        expert_lora_config(new, [0], use_dora=True, parts=("attention",))
    with pytest.raises(ValueError, match=words):
        new.add_adapter(expert_lora_config(make_model(num_experts=4), [0, 1, 2, 3], use_dora=True))
    config = expert_lora_config(new, [1], use_dora=True, parts=("attention", "mlp"))
    new.add_adapter(config)
    assert all(p.isfinite().all() for p in new.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_acts_as_in_peft(dtype, four, tmp_path):
    half = copy.deepcopy(four).to(dtype)
    folder = save_trained(half, METHODS["LoRA"], tmp_path)
    model = copy.deepcopy(half)
    model.load_adapter(folder)
    expected = by_peft(half, folder)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.parameters(), expected.parameters()))


def test_a_weight_is_one_for_all_or_one_for_each_expert(four, tmp_path):
    model = copy.deepcopy(four)
    model.load_adapter(save_trained(four, METHODS["LoRA"], tmp_path), "a")
    for weight in ([1.0, 2.0], [1.0] * 5, float("nan"), [1, 1, 1, float("inf")], "0.5", None, []):
        with pytest.raises(ValueError, match="must be a finite number, or one for each of 4 experts"):
            model.set_adapter_weights({"a": weight})
    with pytest.raises(ValueError, match=r"adapter_names must be among the loaded \['a'\], got 'b'"):
        model.set_adapter_weights({"b": 1.0})
    assert model.adapter_weights == {"a": [1.0] * 4}


def test_shared_modules_take_one_weight(four, velocities):
    model = copy.deepcopy(four)
    config = expert_lora_config(four, [1], r=2, init_lora_weights=False)
    config.target_modules += r"|tower\.timestep_embedding\.mlp\.linear_1"
    model.add_adapter(config, "a")
    with pytest.raises(
        ValueError, match=r"also adapts 'tower.timestep_embedding.mlp.linear_1', which all experts share"
    ):
        model.set_adapter_weights({"a": [0, 1, 0, 0]})
    model.set_adapter_weights({"a": [0.5] * 4})
    half = velocities(model)
    model.set_adapter_weights({"a": 0.5})
    assert torch.equal(velocities(model), half)


def test_whole_modules_of_an_adapter_are_switched_with_it(four, velocities, tmp_path):
    """`modules_to_save`: PEFT's wrappers are no layers with adapters, and are easily forgotten."""
    plain = velocities(four)
    config = peft.LoraConfig(r=4, modules_to_save=["tower.head"])
    folder = save_trained(four, config, tmp_path)
    expected = velocities(by_peft(four, folder))
    model = copy.deepcopy(four)
    model.load_adapter(folder, "a")
    assert torch.equal(velocities(model), expected) and not torch.equal(expected[0], plain[0])
    model.disable_adapters()
    assert torch.equal(velocities(model), plain)
    model.enable_adapters()
    assert torch.equal(velocities(model), expected)
    with pytest.raises(ValueError, match=r"adapter 'a' \(LORA\) has no weight in 'tower.head'"):
        model.set_adapter_weights({"a": 0.5})
    with pytest.raises(ValueError, match=r"adapters \['a'\] replace 'tower.head' and cannot be fused"):
        model.fuse_adapters()
    model.load_adapter(folder, "b")
    with pytest.raises(ValueError, match=r"adapters \['a', 'b'\] replace 'tower.head'; use one"):
        model.set_adapter(["a", "b"])
    model.delete_adapter("b")
    assert torch.equal(velocities(model), plain)
    model.unload_adapters()
    assert same_bytes(model, four)


def test_weighted_sums_of_adapters_keep_their_model(four, make_model, tmp_path):
    model = get_peft_model(copy.deepcopy(four), expert_lora_config(four, [0], r=2), "a")
    model.add_adapter("b", expert_lora_config(four, [2], r=2))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    mark = read_adapter_mark(peft.PeftConfig.from_pretrained(tmp_path / "sum").target_modules)
    assert mark == {"num_experts": "4", "num_hidden_layers": "4", "hidden_size": "32", "experts": "0,2"}
    with pytest.raises(
        ValueError, match=r"was trained for a model with num_experts=4, .* this model has num_experts=2"
    ):
        make_model(num_experts=2).load_adapter(tmp_path / "sum")
    loaded = copy.deepcopy(four)
    loaded.load_adapter(tmp_path / "sum")
    assert loaded.active_adapters() == ["default"]


@pytest.mark.parametrize("name", ["", "a.b", "tower", "layers", "0"])
def test_names_that_peft_would_confuse_are_refused(name, four, tmp_path):
    model = copy.deepcopy(four)
    if name == "":
        with pytest.raises(ValueError, match="adapter_name must not be empty"):
            model._check_adapter_name(name)
        return
    with pytest.raises(ValueError, match="adapter_name must not be empty, contain a dot or be the name of a module"):
        model.load_adapter(save_trained(four, METHODS["LoRA"], tmp_path), name)


@pytest.mark.parametrize("others", [[], ["other"]])
def test_what_fails_halfway_leaves_nothing_behind(others, four, velocities, tmp_path):
    """The expression also matches an activation function, which PEFT notices after the first layers."""
    model = copy.deepcopy(four)
    for name in others:
        model.load_adapter(save_trained(four, METHODS["LoRA"], tmp_path / name), name)
    before = velocities(model)
    config = peft.LoraConfig(r=2, target_modules=r"tower\.layers\.\d+\.mlp\.\w+")
    with pytest.raises(ValueError, match="not supported"):
        model.load_adapter(adapter_state_dict={"x": torch.zeros(1)}, adapter_name="bad", peft_config=config)
    assert torch.equal(velocities(model), before) and list(getattr(model, "peft_config", {})) == others
    assert model.active_adapters() == others
    assert not any("bad" in name for name, _ in model.named_parameters())


def test_an_adapter_that_is_trained_further_is_trainable(four, tmp_path):
    folder = save_trained(four, METHODS["LoRA"], tmp_path)
    model = copy.deepcopy(four)
    model.load_adapter(folder, is_trainable=True)
    assert model.training_experts == [1, 3]
    model.load_adapter(folder, "frozen")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_loaded_adapter_does_not_drop_out(four, velocities, tmp_path):
    model = copy.deepcopy(four)
    model.load_adapter(save_trained(four, peft.LoraConfig(r=4, lora_dropout=0.9), tmp_path))
    assert torch.equal(velocities(model), velocities(model))


def test_full_fine_tuning_needs_no_adapter(four):
    assert train_only_experts(copy.deepcopy(four), [2]).active_adapters() == []
