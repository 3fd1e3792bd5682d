"""Checkpoints and adapters that know their steps and guidance."""

import logging

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, checkpoints, tiny_checkpoint
from latte_flow_hf.cli import app
from latte_flow_hf.modeling.adapters import read_sampling_mark, sampling_mark
from latte_flow_hf.modeling.configuration_latte_flow import LatteFlowConfig
from latte_flow_hf.training import expert_lora_config


SAMPLING = {"steps_per_expert": [2, 1], "guidance_scale": 1.0, "distilled_experts": [0, 1]}


@pytest.fixture
def call():
    def call(pipe, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", generator=generator, output_type="latent", **arguments).images

    return call


def save_few_step_adapter(model, folder, sampling, experts, **config):
    """A random adapter as distillation saves it; the model is changed."""
    lora = expert_lora_config(model, experts, r=2, init_lora_weights=False, **config)
    lora.target_modules = sampling_mark(model.config, sampling) + lora.target_modules
    torch.manual_seed(1)
    peft_model = get_peft_model(model, lora)
    peft_model.save_pretrained(folder)
    peft_model.unload()
    return folder


@pytest.fixture
def adapter(make_model, tmp_path):
    return save_few_step_adapter(make_model(), tmp_path / "adapter", SAMPLING, [0, 1])


def test_a_model_without_defaults_takes_40_guided_steps(pipe, call):
    assert torch.equal(call(pipe), call(pipe, num_inference_steps=40, guidance_scale=4.0))


def test_steps_and_guidance_are_saved_and_used(own_pipe, call, tmp_path):
    expected = call(own_pipe, steps_per_expert=[2, 1], guidance_scale=1.0)
    own_pipe.model.config.sampling = SAMPLING
    own_pipe.save_pretrained(tmp_path / "saved")
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.config.sampling == SAMPLING
    assert torch.equal(call(pipe), expected) and pipe.num_timesteps == 3
    # The number of its steps means its steps, and not evenly spaced ones.
    assert torch.equal(call(pipe, num_inference_steps=3), expected)
    assert torch.equal(call(pipe, sigmas=[1.0, 0.75, 0.5]), expected)


def test_explicit_arguments_win_if_no_expert_is_distilled(own_pipe, call):
    guided = call(own_pipe, num_inference_steps=5, guidance_scale=2.0)
    own_pipe.model.config.sampling = {"num_inference_steps": 5, "guidance_scale": 2.0}
    assert torch.equal(call(own_pipe), guided)
    assert torch.equal(call(own_pipe, guidance_scale=1.0), call(own_pipe, num_inference_steps=5, guidance_scale=1.0))
    call(own_pipe, num_inference_steps=3)
    assert own_pipe.num_timesteps == 3
    call(own_pipe, steps_per_expert=[1, 3])
    assert own_pipe.num_timesteps == 4


@pytest.mark.parametrize("steps", [{"num_inference_steps": 40}, {"steps_per_expert": [1, 1]}, {"sigmas": [1.0, 0.4]}])
def test_steps_that_a_model_was_not_distilled_to_are_refused(own_pipe, call, count_layers, steps):
    own_pipe.model.config.sampling = SAMPLING
    with count_layers(own_pipe.model) as calls, pytest.raises(ValueError, match="was distilled to steps_per_expert"):
        call(own_pipe, **steps)
    assert not calls
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=own_pipe.model.config.expert_boundaries, solver="heun")
    with pytest.raises(ValueError, match="with the solver 'euler'"):
        call(own_pipe)


def test_guidance_of_a_guidance_free_model_logs_one_warning(own_pipe, call, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    own_pipe.model.config.sampling = SAMPLING
    call(own_pipe)
    call(own_pipe, guidance_scale=1.0)
    assert not caplog.records
    guided = call(own_pipe, guidance_scale=3.0)
    assert len(caplog.records) == 1 and "guidance_scale 3.0" in caplog.text and "distilled" in caplog.text
    assert not torch.equal(guided, call(own_pipe))


def test_without_guidance_only_the_prompt_is_prefilled(own_pipe, call, monkeypatch):
    own_pipe.model.config.sampling = SAMPLING
    encoded = []
    encode = own_pipe.model.encode_context
    monkeypatch.setattr(
        own_pipe.model, "encode_context", lambda **inputs: encoded.append(len(inputs["input_ids"])) or encode(**inputs)
    )
    call(own_pipe)
    assert encoded == [1]


def test_an_adapter_brings_its_steps_until_it_is_unloaded(own_pipe, call, adapter):
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=own_pipe.model.config.expert_boundaries, new_noise=0.5)
    plain = call(own_pipe)
    own_pipe.load_lora_weights(str(adapter), adapter_name="fast")
    assert own_pipe.model.sampling == SAMPLING
    fast = call(own_pipe)
    assert own_pipe.num_timesteps == 3 and own_pipe.scheduler.config.new_noise == 0.5
    with pytest.raises(ValueError, match="was distilled to steps_per_expert"):
        call(own_pipe, num_inference_steps=40)
    own_pipe.disable_lora()
    assert torch.equal(call(own_pipe), plain)
    own_pipe.enable_lora()
    assert torch.equal(call(own_pipe), fast)
    own_pipe.set_adapters("fast", 0.0)
    assert torch.equal(call(own_pipe), plain)
    own_pipe.set_adapters("fast", 1.0)
    own_pipe.unload_lora_weights()
    assert own_pipe.model.sampling == {} and torch.equal(call(own_pipe), plain)


def test_a_fused_adapter_leaves_its_steps_in_the_pipeline(own_pipe, call, adapter, tmp_path):
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=own_pipe.model.config.expert_boundaries, new_noise=0.5)
    own_pipe.load_lora_weights(str(adapter))
    fast = call(own_pipe)
    own_pipe.fuse_lora()
    own_pipe.unload_lora_weights()
    assert own_pipe.model.config.sampling == SAMPLING and own_pipe.scheduler.config.new_noise == 0.0
    torch.testing.assert_close(call(own_pipe), fast, atol=1e-4, rtol=1e-4)
    own_pipe.save_pretrained(tmp_path / "fused")
    assert LatteFlowPipeline.from_pretrained(tmp_path / "fused").model.config.sampling == SAMPLING


def test_an_adapter_for_other_boundaries_is_refused(own_pipe, make_model, tmp_path):
    other = make_model(expert_boundaries=[1.0, 0.7, 0.0])
    folder = save_few_step_adapter(other, tmp_path / "other", SAMPLING, [0, 1])
    with pytest.raises(ValueError, match="was distilled for a model with expert_boundaries"):
        own_pipe.load_lora_weights(str(folder))
    assert own_pipe.get_list_adapters() == {}


def test_adapters_that_contradict_each_other_are_refused(own_pipe, call, adapter, make_model, tmp_path):
    sampling = {**SAMPLING, "steps_per_expert": [1, 1]}
    other = save_few_step_adapter(make_model(), tmp_path / "other", sampling, [0, 1])
    own_pipe.load_lora_weights(str(adapter), adapter_name="three")
    own_pipe.load_lora_weights(str(other), adapter_name="two")
    call(own_pipe)
    assert own_pipe.num_timesteps == 2
    own_pipe.set_adapters(["three", "two"])
    with pytest.raises(ValueError, match="distilled to different steps"):
        call(own_pipe)


def test_an_adapter_of_one_expert_leaves_the_noise_of_the_others(own_pipe, call, make_model, tmp_path):
    sampling = {"steps_per_expert": [1, 3], "guidance_scale": [1.0, 2.0], "distilled_experts": [0]}
    folder = save_few_step_adapter(make_model(), tmp_path / "one", sampling, [0])
    boundaries = own_pipe.model.config.expert_boundaries
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=boundaries, new_noise=[0.5, 0.25])
    own_pipe.load_lora_weights(str(folder))
    used = []
    call(own_pipe, callback_on_step_end=lambda pipe, *_: used.append(pipe.scheduler.config.new_noise) or {})
    assert used == [[0.0, 0.25]] * 4


def test_distilled_experts_keep_the_new_noise_they_were_trained_with(own_pipe, call, make_model, tmp_path):
    sampling = {**SAMPLING, "new_noise": [0.5, 0.0]}
    folder = save_few_step_adapter(make_model(), tmp_path / "noisy", sampling, [0, 1])
    own_pipe.load_lora_weights(str(folder))
    noisy = call(own_pipe)
    own_pipe.fuse_lora()
    own_pipe.unload_lora_weights()
    assert own_pipe.scheduler.config.new_noise == [0.5, 0.0] and own_pipe.model.config.sampling == sampling
    torch.testing.assert_close(call(own_pipe), noisy, atol=1e-4, rtol=1e-4)
    own_pipe.scheduler = LatteFlowScheduler(expert_boundaries=own_pipe.model.config.expert_boundaries)
    assert (call(own_pipe) - noisy).abs().mean() > 1e-2


def test_the_mark_survives_in_the_expression(model):
    mark = sampling_mark(model.config, SAMPLING)
    assert read_sampling_mark(f"{mark}tower") == {**SAMPLING, "expert_boundaries": model.config.expert_boundaries}
    assert read_sampling_mark("tower") is None and read_sampling_mark(["q_proj"]) is None


def test_a_configuration_with_wrong_defaults_is_refused(model):
    with pytest.raises(ValueError, match="steps_per_expert must be 2 whole numbers"):
        LatteFlowConfig.from_dict({**model.config.to_dict(), "sampling": {"steps_per_expert": [1, 1, 1]}})


def test_fast_generation_needs_its_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "__init__.py"))
    output = ["-o", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, ["generate", "a red circle", "--fast", *output])
    assert result.exit_code == 1 and "few-step adapter of the embedded checkpoint is not in" in result.stderr
    result = CliRunner().invoke(app, ["generate", "a red circle", "--fast", "--model", "other", *output])
    assert result.exit_code == 1 and "--fast is for the embedded checkpoint" in result.stderr


def test_fast_generation_fuses_its_adapter(tmp_path, monkeypatch):
    """The image is that of the adapter, and no layer runs through PEFT."""
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.load_lora_weights(checkpoints.few_step_checkpoint())
    call = {"output_type": "np", "generator": torch.Generator().manual_seed(0)}
    expected = pipe("a red circle", **call).images[0]
    loaded = []
    move = LatteFlowPipeline.to
    monkeypatch.setattr(LatteFlowPipeline, "to", lambda self, *args: loaded.append(self) or move(self, *args))
    output = tmp_path / "out.png"
    result = CliRunner().invoke(app, ["generate", "a red circle", "--fast", "--device", "cpu", "-o", str(output)])
    assert result.exit_code == 0, result.stderr
    assert loaded[-1].num_timesteps == 4 and not any("lora" in name for name, _ in loaded[-1].model.named_modules())
    found = np.asarray(Image.open(output)) / 255
    assert np.abs(found - expected).max() <= 1 / 255


def test_fast_generation_takes_four_evaluations(tmp_path, monkeypatch):
    model = LatteFlowPipeline.from_pretrained(tiny_checkpoint()).model
    sampling = {"steps_per_expert": [1, 1, 1, 1], "guidance_scale": 1.0, "distilled_experts": [0, 1, 2, 3]}
    adapter = save_few_step_adapter(model, tmp_path / "adapter", sampling, [0, 1, 2, 3])
    monkeypatch.setattr(checkpoints, "few_step_checkpoint", lambda: str(adapter))
    result = CliRunner().invoke(app, ["generate", "a red circle", "--fast", "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 0 and "expert 3 of 4: 100%" in result.stderr and "4/4" in result.stderr
    (tmp_path / "prompts.txt").write_text("a red circle\na handwritten seven\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "images"), "--batch-size", "2"]
    result = CliRunner().invoke(app, ["generate", "--fast", *arguments])
    assert result.exit_code == 0 and "2 new images" in result.stdout
