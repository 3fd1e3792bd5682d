# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The adapter methods of diffusers pipelines, against adapters that are added to the weights by hand."""

import copy

import pytest
import torch
from peft import get_peft_model

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
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


def generate(pipe) -> torch.Tensor:
    """The latents after every step, (steps, C, height, width)."""
    steps = []
    pipe(
        PROMPT,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(tensors["latents"][0].clone()),
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


def test_hotswapping_replaces_an_adapter(adapters, pipe, base, tmp_path):
    torch.manual_seed(9)
    other = get_peft_model(copy.deepcopy(base), expert_lora_config(base, [2], r=2, init_lora_weights=False))
    other.save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    expected = generate(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapters["late"], adapter_name="style")
    assert not torch.equal(generate(pipe), expected)
    pipe.load_lora_weights(tmp_path, adapter_name="style", hotswap=True)
    assert torch.equal(generate(pipe), expected)


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
