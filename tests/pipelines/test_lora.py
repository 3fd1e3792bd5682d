# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The adapter methods of diffusers pipelines, against adapters that are added to the weights by hand."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.pipelines.lora import load_loras
from latte_flow_hf.training import expert_lora_config, train_only_experts


PROMPT = "a red circle"
STEPS = 8


@pytest.fixture(scope="module")
def base(make_model):
    return make_model(num_experts=4)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Random adapters by name: of expert 0, of expert 2, of both."""
    folders = {}
    for seed, (name, experts) in enumerate({"early": [0], "late": [2], "both": [0, 2]}.items()):
        torch.manual_seed(seed)
        config = expert_lora_config(base, experts, r=2, init_lora_weights=False)
        folders[name] = tmp_path_factory.mktemp(name)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def pipe(base, processor, vae):
    """A pipeline around its own copy of the model."""
    return make_pipe(copy.deepcopy(base), processor, vae)


def make_pipe(model, processor, vae):
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    pipe = LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **arguments) -> torch.Tensor:
    """The latents after every step, (steps, C, height, width)."""
    steps = []
    pipe(
        PROMPT,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **{
            "callback_on_step_end": lambda pipe, step, timestep, tensors: steps.append(tensors["latents"][0].clone()),
            **arguments,
        },
    )
    return torch.stack(steps)


def add_by_hand(model, pipe, weights: dict[str, float]):
    """`model` with `weights` times the deltas of the pipeline's adapters in its own matrices."""
    model = copy.deepcopy(model)
    modules = dict(pipe.model.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            for adapter, weight in weights.items():
                if adapter in getattr(modules.get(name), "lora_A", {}):
                    wrapped = modules[name]
                    delta = wrapped.lora_B[adapter].weight @ wrapped.lora_A[adapter].weight
                    module.weight += weight * delta
    return model


def test_an_adapter_acts_from_its_interval_on(base, adapters, pipe, processor, vae):
    """4 experts with 2 of 8 steps each: expert 2 begins with the fifth."""
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["late"], adapter_name="late")
    adapted = generate(pipe)
    assert torch.equal(adapted[:4], plain[:4])
    assert all(not torch.equal(a, b) for a, b in zip(adapted[4:], plain[4:]))
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    assert pipe.model.state_dict().keys() == base.state_dict().keys()


def test_fully_tuned_experts_change_the_image_from_their_interval_on(base, processor, vae):
    model = train_only_experts(copy.deepcopy(base), [2])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    plain, tuned = generate(make_pipe(base, processor, vae)), generate(make_pipe(model, processor, vae))
    assert torch.equal(tuned[:4], plain[:4]) and not torch.equal(tuned[4], plain[4])


def test_several_adapters_act_with_their_weights(base, adapters, pipe, processor, vae):
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    assert pipe.get_list_adapters() == {"model": ["late", "both"]}
    assert pipe.get_active_adapters() == ["both"]
    pipe.set_adapters(["late", "both"], [0.75, 0.5])
    assert pipe.get_active_adapters() == ["late", "both"]
    expected = make_pipe(add_by_hand(base, pipe, {"late": 0.75, "both": 0.5}), processor, vae)
    torch.testing.assert_close(generate(pipe), generate(expected), atol=1e-4, rtol=1e-4)
    pipe.set_adapters("late", 0.0)
    torch.testing.assert_close(generate(pipe), generate(make_pipe(base, processor, vae)), atol=1e-4, rtol=1e-4)


def test_attention_kwargs_scale_all_adapters_of_a_call(adapters, pipe):
    plain = generate(pipe)
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    weights = {"late": [0.5] * 4, "both": [1.0, 1.0, 0.0, 1.0]}
    pipe.set_adapters(["late", "both"], list(weights.values()))
    full = generate(pipe)
    scaled = generate(pipe, attention_kwargs={"scale": 0.5})
    assert pipe.model.adapter_weights == weights and torch.equal(generate(pipe), full)
    assert torch.equal(generate(pipe, attention_kwargs={"scale": 0}), plain)

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generate(pipe, attention_kwargs={"scale": 0.5}, callback_on_step_end=fail)
    assert pipe.model.adapter_weights == weights and torch.equal(generate(pipe), full)
    pipe.set_adapters(["late", "both"], [0.25, [0.5, 0.5, 0.0, 0.5]])
    assert torch.equal(generate(pipe), scaled)
    pipe.disable_lora()
    with pytest.raises(ValueError, match="but no adapter is active; load, activate or enable one"):
        generate(pipe, attention_kwargs={"scale": 0.5})


def test_a_callback_may_delete_an_adapter_of_a_scaled_call(adapters, pipe):
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    pipe.set_adapters(["late", "both"], [0.5, 1.0])

    def delete(pipe, step, timestep, tensors):
        if step == 1:
            pipe.delete_adapters("late")

    pipe(PROMPT, num_inference_steps=STEPS, attention_kwargs={"scale": 0.5}, callback_on_step_end=delete)
    assert pipe.model.adapter_weights == {"both": [1.0] * 4}


def test_each_expert_may_have_an_adapter_of_its_own(base, adapters, pipe, processor, vae):
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["early"], adapter_name="early")
    early = generate(pipe)
    pipe.load_lora_weights(adapters["late"], adapter_name="late")
    late = generate(pipe)
    pipe.set_adapters(["early", "late"])
    together = generate(pipe)
    # Each changes the steps of its own expert; with both, the later expert starts from other latents.
    assert torch.equal(late[:4], plain[:4]) and not torch.equal(early[0], plain[0])
    assert torch.equal(together[:4], early[:4]) and not torch.equal(together[4], early[4])
    expected = make_pipe(add_by_hand(base, pipe, {"early": 1.0, "late": 1.0}), processor, vae)
    torch.testing.assert_close(together, generate(expected), atol=1e-4, rtol=1e-4)


def test_adapters_are_switched_off_and_on(adapters, pipe):
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["both"])
    adapted = generate(pipe)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(generate(pipe), adapted) and not torch.equal(adapted, plain)


def test_deleted_adapters_leave_the_others_as_they_were(base, adapters, pipe):
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["early"], adapter_name="early")
    early = generate(pipe)
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    pipe.set_adapters(["early", "late"])
    # Expert 0's layers know `both` too, which is not active and must not become so.
    pipe.delete_adapters("late")
    assert pipe.get_active_adapters() == ["early"]
    assert torch.equal(generate(pipe), early)
    pipe.delete_adapters(["early"])
    assert pipe.get_active_adapters() == [] and pipe.get_list_adapters() == {"model": ["both"]}
    assert torch.equal(generate(pipe), plain)
    with pytest.raises(ValueError, match=r"adapter_names must be among the loaded \['both'\], got \['early'\]"):
        pipe.delete_adapters("early")
    pipe.delete_adapters("both")
    assert pipe.get_list_adapters() == {}
    assert pipe.model.state_dict().keys() == base.state_dict().keys()


def test_names_are_given_where_none_are(adapters, pipe):
    for folder in adapters.values():
        pipe.load_lora_weights(folder)
    assert pipe.get_list_adapters() == {"model": ["default_0", "default_1", "default_2"]}
    pipe.delete_adapters("default_1")
    pipe.load_lora_weights(adapters["late"])
    assert sorted(pipe.get_list_adapters()["model"]) == ["default_0", "default_1", "default_2"]
    with pytest.raises(ValueError, match="adapter_name 'default_0' is taken"):
        pipe.load_lora_weights(adapters["late"], adapter_name="default_0")


@pytest.mark.parametrize(
    ("experts", "arguments"),
    [([2], {}), ([2], {"lora_alpha": 16}), ([0, 3], {"r": 4}), ([2], {"use_rslora": True, "parts": ("mlp",)})],
)
def test_hotswapping_replaces_an_adapter(experts, arguments, adapters, pipe, base, tmp_path):
    """Also one of another rank, scale, or of other layers."""
    arguments = {"r": 2, "init_lora_weights": False, **arguments}
    get_peft_model(copy.deepcopy(base), expert_lora_config(base, experts, **arguments)).save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    expected = generate(pipe)
    pipe.unload_lora_weights()
    for name in ("early", "late"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    assert not torch.equal(generate(pipe), expected)
    pipe.load_lora_weights(tmp_path, adapter_name="late", hotswap=True)
    assert torch.equal(generate(pipe), expected)
    assert pipe.get_active_adapters() == ["late"] and sorted(pipe.get_list_adapters()["model"]) == ["early", "late"]


def test_hotswapping_keeps_the_others_active_and_the_old_one_on_failure(adapters, pipe, tmp_path):
    with pytest.raises(ValueError, match=r"hotswap replaces a loaded adapter, and 'late' is not among \[\]"):
        pipe.load_lora_weights(adapters["late"], adapter_name="late", hotswap=True)
    for name in ("early", "late"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    pipe.set_adapters(["early", "late"], [0.5, 2.0])
    before = generate(pipe)
    weights = load_file(adapters["both"] / "adapter_model.safetensors")
    half = {name: weight for name, weight in weights.items() if ".layers.0." in name}
    with pytest.raises(ValueError, match=r"has no .* weights: tower"):
        config = peft.PeftConfig.from_pretrained(adapters["both"])
        pipe.load_lora_weights(half, adapter_name="late", hotswap=True, peft_config=config)
    assert torch.equal(generate(pipe), before)
    pipe.load_lora_weights(adapters["both"], adapter_name="late", hotswap=True)
    assert pipe.model.adapter_weights == {"early": [0.5] * 4, "late": [1.0] * 4}


def test_an_adapter_has_a_weight_for_each_expert(adapters, pipe):
    pipe.load_lora_weights(adapters["both"], adapter_name="a")
    both = generate(pipe)
    pipe.set_adapters("a", [1.0, 0.0, 0.0, 0.0])
    only_first = generate(pipe)
    # Expert 0 is adapted and takes the first two of eight steps.
    pipe.unload_lora_weights()
    plain = generate(pipe)
    assert torch.equal(only_first[:4], both[:4]) and not torch.equal(only_first[4], both[4])
    assert not torch.equal(only_first[0], plain[0])
    pipe.load_lora_weights(adapters["early"], adapter_name="a")
    pipe.load_lora_weights(adapters["late"], adapter_name="b")
    pipe.set_adapters(["a", "b"], [[0.5, 0, 0, 0], 2.0])
    by_list = generate(pipe)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    assert torch.equal(generate(pipe), by_list)
    pipe.set_adapters("b", [2.0])
    assert pipe.model.adapter_weights == {"b": [2.0] * 4}
    for weights in (np.array([0.0, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 1.0])):
        pipe.set_adapters("b", weights)
        assert pipe.model.adapter_weights == {"b": [0.0, 0.5, 1.0, 1.0]}
    pipe.set_adapters("b", torch.tensor(0.25))
    assert pipe.model.adapter_weights == {"b": [0.25] * 4}
    pipe.set_adapters("b", {"model": 0.5})
    assert pipe.model.adapter_weights == {"b": [0.5] * 4}
    for names, weights in (
        ("a", [1.0, 2.0]),
        (["a", "b"], [1.0]),
        (["a", "a"], [1.0, 1.0]),
        ("a", {"unet": 1.0}),
        ("a", float("nan")),
    ):
        with pytest.raises(ValueError, match="adapter"):
            pipe.set_adapters(names, weights)
    assert pipe.model.adapter_weights == {"b": [0.5] * 4}


@pytest.mark.parametrize("change", ["weight", "disable", "other", "hotswap", "fuse", "unload"])
def test_an_adapter_changed_in_a_callback_acts_from_the_next_step(change, adapters, pipe):
    """Within the interval of one expert: expert 2 has the fifth and sixth step of eight."""
    changes = {
        "weight": lambda: pipe.set_adapters("late", -1.0),
        "disable": pipe.disable_lora,
        "other": lambda: pipe.set_adapters("both"),
        "hotswap": lambda: pipe.load_lora_weights(adapters["both"], adapter_name="late", hotswap=True),
        "fuse": lambda: pipe.fuse_lora(lora_scale=3.0),
        "unload": pipe.unload_lora_weights,
    }
    for name in ("both", "late"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    before = generate(pipe)
    states = []

    def callback(pipe, step, timestep, tensors):
        states.append(tensors["latents"].clone())
        if step == 4:
            changes[change]()

    pipe(
        PROMPT,
        num_inference_steps=STEPS,
        latents=None,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=callback,
    )
    # What the sixth step should give: from the fifth one's latents, by a model that was changed before it began.
    pipe.scheduler.set_timesteps(STEPS)
    timestep = pipe.scheduler.timesteps[5]
    context, negative = pipe.encode_prompt(PROMPT)
    with torch.no_grad():
        conditional, unconditional = (pipe.model.predict_velocity(states[4], timestep, c) for c in (context, negative))
    velocity = unconditional + 4.0 * (conditional - unconditional)
    sigmas = pipe.scheduler.sigmas
    torch.testing.assert_close(states[5], states[4] + (sigmas[6] - sigmas[5]) * velocity, atol=1e-3, rtol=1e-3)
    assert torch.equal(states[4][0], before[4]) and not torch.allclose(states[5][0], before[5], atol=1e-3)


def test_an_adapter_of_the_backbone_acts_on_both_prompts(base, pipe, tmp_path):
    """Nothing that was encoded with another adapter is used again."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=r"vlm\..*layers\.\d+\.mlp\.up_proj")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    plain = generate(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    adapted = generate(pipe)
    pipe.set_adapters("a", 0.2)
    weak = generate(pipe)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), plain) and not torch.equal(adapted, plain)
    fresh = copy.deepcopy(pipe)
    fresh.set_progress_bar_config(disable=True)
    fresh.enable_lora()
    assert torch.equal(generate(fresh), weak)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    # It also changes the answers.
    assert pipe.chat("what?", max_new_tokens=8) != fresh.chat("what?", max_new_tokens=8)
    with pytest.raises(ValueError, match="which all experts share"):
        fresh.set_adapters("a", [1, 0, 0, 0])


def layouts(folder, base) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter as other libraries name its weights. Its scale is 3."""
    weights = {
        key.removeprefix("base_model.model."): weight
        for key, weight in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = sorted({key.partition(".lora_")[0] for key in weights})
    scaled = {key: weight * 3 if ".lora_B." in key else weight for key, weight in weights.items()}

    def kohya(key):
        module, _, rest = key.partition(".lora_")
        return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"

    def diffusers(key):
        return "transformer." + key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")

    alphas = {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(6.0) for module in modules}
    return {
        "kohya": {kohya(key): weight for key, weight in weights.items()} | alphas,
        "diffusers": {f"transformer.{key}": weight for key, weight in scaled.items()},
        "diffusers before transformers": {f"unet.{key}": weight for key, weight in scaled.items()},
        "old diffusers": {diffusers(key): weight for key, weight in scaled.items()},
        "distributed": {f"module.base_model.model.{key}": weight for key, weight in scaled.items()},
        "state dict of a model": {key.replace(".weight", ".default.weight"): weight for key, weight in scaled.items()},
    }


@pytest.fixture(scope="module")
def scaled(base, tmp_path_factory):
    """An adapter of scale 3."""
    folder = tmp_path_factory.mktemp("scaled")
    torch.manual_seed(7)
    config = expert_lora_config(base, [1, 2], r=2, lora_alpha=6, init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    return folder


LAYOUTS = (
    "kohya",
    "diffusers",
    "diffusers before transformers",
    "old diffusers",
    "distributed",
    "state dict of a model",
)


@pytest.mark.filterwarnings("ignore:adapter .* came without a configuration")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_converted(layout, scaled, base, pipe, tmp_path):
    pipe.load_lora_weights(scaled)
    expected = generate(pipe)
    weights = layouts(scaled, base)[layout]
    save_file(weights, tmp_path / "style.safetensors")
    for arguments in (
        {"pretrained_model_name_or_path_or_dict": weights},
        {"pretrained_model_name_or_path_or_dict": tmp_path / "style.safetensors"},
        {"pretrained_model_name_or_path_or_dict": tmp_path, "weight_name": "style.safetensors"},
    ):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(**arguments, adapter_name="a")
        torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.save_lora_weights(tmp_path / "converted")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "converted")
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_every_weight_must_have_its_place(layout, damage, scaled, base, pipe, tmp_path):
    """With the configuration of the adapter, so that half of it cannot be taken for a whole one."""
    weights = {key: weight for key, weight in layouts(scaled, base)[layout].items() if not key.endswith(".alpha")}
    before = generate(pipe)
    if damage == "missing":
        del weights[next(key for key in weights if "layers" in key and "mlp" in key)]
        words = r"has no 1 weights: tower\.layers\.\d\.mlp"
    else:
        weights["transformer.other.0.lora_A.weight"] = torch.zeros(2, 2)
        words = r"has unexpected 1 weights: other\.0\.lora_A\.weight"
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights(weights, peft_config=peft.PeftConfig.from_pretrained(scaled))
    assert pipe.get_list_adapters() == {} and torch.equal(generate(pipe), before)
    assert pipe.model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_of_a_pair_is_refused_without_a_configuration(part, scaled, base, pipe):
    weights = layouts(scaled, base)["diffusers"]
    del weights[next(key for key in weights if part in key)]
    with pytest.raises(ValueError, match=rf"has no 1 weights: tower.*{part}"):
        pipe.load_lora_weights(weights)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "got no weights"),
        ({"tower.layers.0.mlp.up_proj.hada_w1_a": torch.zeros(2, 2)}, "only LoRA weights can be loaded"),
        ({"tower.layers.0.modulation.lora_magnitude_vector": torch.ones(2)}, "has no LoRA matrices"),
        (
            {"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)},
            r"1 modules that the model does not have, such as \['text_encoder",
        ),
        ({"tower.layers.0.mlp.up_proj.lora_A.weight": [[0.0]]}, "must be tensors, got tower.*: list"),
        ({f"tower.layers.0.mlp.up_proj.lora_A.{x}weight": torch.zeros(2, 2) for x in ("", "a.")}, "twice"),
    ],
)
def test_weights_of_nothing_are_refused(weights, words, pipe):
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights(weights)
    assert pipe.get_list_adapters() == {}


def test_the_configuration_is_beside_a_file_or_inside_it_or_given(scaled, pipe, tmp_path):
    pipe.load_lora_weights(scaled)
    expected = generate(pipe)
    weights = load_file(scaled / "adapter_model.safetensors")
    config = peft.PeftConfig.from_pretrained(scaled)
    metadata = {f"transformer.{key}": getattr(config, key) for key in ("r", "lora_alpha", "target_modules")}
    save_file(weights, tmp_path / "style.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
    for source, arguments in (
        (scaled / "adapter_model.safetensors", {}),
        (tmp_path / "style.safetensors", {}),
        (weights, {"peft_config": config}),
        (weights, {"peft_config": json.loads((scaled / "adapter_config.json").read_text())}),
    ):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(source, **arguments)
        assert torch.equal(generate(pipe), expected)


def test_a_lost_configuration_is_warned_of(scaled, base, pipe, recwarn):
    pipe.load_lora_weights(layouts(scaled, base)["diffusers"])
    pipe.unload_lora_weights()
    assert len(recwarn) == 0
    weights = load_file(scaled / "adapter_model.safetensors")
    for prefix in ("", "module.", "_orig_mod."):
        with pytest.warns(UserWarning, match="its scale is taken to be 1"):
            pipe.load_lora_weights({prefix + key: weight for key, weight in weights.items()})


def test_unknown_arguments_and_methods_are_refused(scaled, pipe):
    with pytest.raises(ValueError, match=r"unknown arguments \['subfolders'\]"):
        pipe.load_lora_weights(scaled, subfolders="a")
    config = {**json.loads((scaled / "adapter_config.json").read_text()), "peft_type": "NEWEST"}
    with pytest.raises(ValueError, match="method 'NEWEST', which the installed PEFT does not know"):
        pipe.load_lora_weights(scaled, peft_config=config)
    with pytest.raises(OSError, match=r"no other\.safetensors"):
        pipe.load_lora_weights(scaled, weight_name="other.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        pipe.load_lora_weights("nowhere/at-all")
    with pytest.raises(OSError, match=r"there is no adapter .*: no such file or folder"):
        pipe.load_lora_weights(scaled / "nowhere")


def test_fused_adapters_are_counted_and_not_lost(adapters, pipe):
    """PEFT would take them out of the weights, or ignore the others, without a word."""
    pipe.load_lora_weights(adapters["late"], adapter_name="late")
    pipe.fuse_lora()
    fused = generate(pipe)
    for method, act in (
        ("load_adapter", lambda: pipe.load_lora_weights(adapters["early"], adapter_name="early")),
        ("set_adapters", lambda: pipe.set_adapters("late", 0.5)),
        ("disable_lora", pipe.disable_lora),
        ("delete_adapters", lambda: pipe.delete_adapters("late")),
        ("fuse_lora", pipe.fuse_lora),
    ):
        with pytest.raises(ValueError, match=rf"adapters \['late'\] are fused. Before {method}"):
            act()
    assert torch.equal(generate(pipe), fused) and pipe.fused_loras == {"late"}
    pipe.unload_lora_weights()
    assert pipe.num_fused_loras == 1
    pipe.load_lora_weights(adapters["early"], adapter_name="early")
    assert pipe.num_fused_loras == 1
    both = generate(pipe)
    assert not torch.equal(both[0], fused[0])
    pipe.fuse_lora()
    assert pipe.fused_loras == {"early", "late"}
    torch.testing.assert_close(generate(pipe), both, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    assert pipe.fused_loras == {"late"}
    pipe.set_adapters("early", 0.0)
    with pytest.raises(ValueError, match="no adapter is active"):
        pipe.fuse_lora()
    pipe.set_adapters("early")
    pipe.disable_lora()
    with pytest.raises(ValueError, match=r"\['early'\] are disabled"):
        pipe.fuse_lora()


def test_unfusing_restores_the_weights_of_the_adapters(adapters, pipe):
    """Those of `set_adapters`, without the scale of `fuse_lora`."""
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    pipe.set_adapters(["late", "both"], [0.5, [1, 0, 0.25, 0]])
    before = generate(pipe)
    pipe.fuse_lora(lora_scale=2.0)
    assert not torch.allclose(generate(pipe), before, atol=1e-3)
    pipe.unfuse_lora()
    torch.testing.assert_close(generate(pipe), before, atol=1e-4, rtol=1e-4)
    pipe.fuse_lora(adapter_names=["late"])
    assert pipe.fused_loras == {"late"} and pipe.get_active_adapters() == ["late"]
    with pytest.raises(ValueError, match=r"components must be \['model'\]"):
        pipe.unfuse_lora(components=["unet"])


def test_adapters_are_loaded_from_arguments_of_the_command_line(adapters, pipe, tmp_path):
    load_loras(pipe, [f"{adapters['early']}:0.5", str(adapters["late"])])
    assert list(pipe.model.adapter_weights.values()) == [[0.5] * 4, [1.0] * 4]
    pipe.unload_lora_weights()
    (tmp_path / "a:2").mkdir()
    for file in adapters["late"].iterdir():
        (tmp_path / "a:2" / file.name).write_bytes(file.read_bytes())
    load_loras(pipe, [str(tmp_path / "a:2")])
    assert list(pipe.model.adapter_weights.values()) == [[1.0] * 4]
    with pytest.raises(OSError, match="nowhere"):
        load_loras(pipe, ["nowhere/at:all"])
    with pytest.raises(ValueError, match="finite number"):
        load_loras(pipe, [f"{adapters['early']}:nan"])


def test_fused_adapters_stay_in_a_plain_checkpoint(base, adapters, pipe, processor, vae, tmp_path):
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["late"], adapter_name="late")
    pipe.load_lora_weights(adapters["both"], adapter_name="both")
    pipe.set_adapters(["late", "both"], [1.0, 0.5])
    adapted = generate(pipe)
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.fused_loras == {"late", "both"} and pipe.num_fused_loras == 2
    expected = make_pipe(add_by_hand(base, pipe, {"late": 0.5, "both": 0.25}), processor, vae)
    torch.testing.assert_close(generate(pipe), generate(expected), atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0

    pipe.set_adapters(["late", "both"], [1.0, 0.5])
    pipe.fuse_lora()
    fused = generate(pipe)
    torch.testing.assert_close(fused, adapted, atol=1e-4, rtol=1e-4)
    # An untouched expert keeps its bytes through all of it.
    assert all(
        torch.equal(a, b) for a, b in zip(pipe.model.tower.layers[1].parameters(), base.tower.layers[1].parameters())
    )
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {} and torch.equal(generate(pipe), fused) and not torch.equal(fused, plain)
    pipe.save_pretrained(tmp_path / "fused")
    loaded = LatteFlowPipeline.from_pretrained(tmp_path / "fused")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), fused)


def test_a_checkpoint_is_not_saved_with_adapters_in_it(adapters, pipe, tmp_path):
    pipe.load_lora_weights(adapters["late"], adapter_name="late")
    with pytest.raises(ValueError, match=r"adapters \['late'\] are loaded"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_what_is_saved_is_what_was_loaded(adapters, pipe, tmp_path):
    for name in ("late", "both"):
        pipe.load_lora_weights(adapters[name], adapter_name=name)
    pipe.set_adapters(["late", "both"])
    with pytest.raises(ValueError, match=r"adapter_name must be one of the loaded .*got None"):
        pipe.save_lora_weights(tmp_path / "saved")
    pipe.save_lora_weights(tmp_path / "saved", adapter_name="late")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / file).exists()
    weights = (adapters["late"] / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == weights
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapters["late"])
    late = generate(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, subfolder="saved")
    assert torch.equal(generate(pipe), late)


def test_half_precision_pipelines_take_adapters(base, adapters, processor, vae):
    pipe = make_pipe(copy.deepcopy(base).to(torch.bfloat16), processor, copy.deepcopy(vae).to(torch.bfloat16))
    plain = generate(pipe)
    pipe.load_lora_weights(adapters["late"])
    adapted = generate(pipe)
    assert adapted.dtype == torch.bfloat16 and torch.equal(adapted[:4], plain[:4]) and not torch.equal(adapted, plain)


def test_an_adapter_of_another_model_is_refused(make_model, processor, vae, adapters):
    pipe = make_pipe(make_model(), processor, vae)
    words = "was trained for a model with num_experts=4, .*; this model has num_experts=2, "
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights(adapters["late"])
    assert pipe.get_list_adapters() == {}


def test_a_folder_without_a_whole_adapter_is_refused(adapters, pipe, tmp_path):
    with pytest.raises(OSError, match=r"has no adapter_config\.json"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text((adapters["late"] / "adapter_config.json").read_text())
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        pipe.load_lora_weights(tmp_path)
    cut = (adapters["late"] / "adapter_model.safetensors").read_bytes()[:-10]
    (tmp_path / "adapter_model.safetensors").write_bytes(cut)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors is truncated"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="got no weights"):
        pipe.load_lora_weights({})
    assert pipe.get_list_adapters() == {}
