# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""All usual ways to load one saved pipeline of small random weights: each gives the same image."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from latte_flow_hf import (
    LatteFlowConfig,
    LatteFlowForConditionalGeneration,
    LatteFlowPipeline,
    LatteFlowProcessor,
    LatteFlowScheduler,
)


MODEL_CLASSES = [LatteFlowForConditionalGeneration, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM]


def with_model(pipe, model) -> LatteFlowPipeline:
    return LatteFlowPipeline(model, pipe.processor, pipe.vae, pipe.scheduler)


# Parts.


@pytest.mark.parametrize("as_subfolder", [True, False])
@pytest.mark.parametrize("load_with", MODEL_CLASSES)
def test_model(saved, pipe, generate, expected, load_with, as_subfolder):
    model = (
        load_with.from_pretrained(saved, subfolder="model")
        if as_subfolder
        else load_with.from_pretrained(saved / "model")
    )
    assert type(model) is LatteFlowForConditionalGeneration and not model.training
    assert not any(parameter.requires_grad for parameter in model.vlm.parameters())
    assert np.array_equal(generate(with_model(pipe, model)), expected)


def test_config_processor_and_scheduler(saved, pipe):
    config = AutoConfig.from_pretrained(saved, subfolder="model")
    assert type(config) is LatteFlowConfig and config.expert_boundaries == pipe.model.config.expert_boundaries
    for processor in (
        AutoProcessor.from_pretrained(saved, subfolder="processor"),
        AutoProcessor.from_pretrained(saved / "processor"),
        LatteFlowProcessor.from_pretrained(saved, subfolder="processor"),
    ):
        assert type(processor) is LatteFlowProcessor and processor.chat_template == pipe.processor.chat_template
    scheduler = LatteFlowScheduler.from_pretrained(saved, subfolder="scheduler")
    assert scheduler.config.expert_boundaries == pipe.model.config.expert_boundaries


def test_tokenizer_and_image_processor(saved, pipe, picture):
    tokenizer = AutoTokenizer.from_pretrained(saved, subfolder="processor")
    assert tokenizer("a red circle").input_ids == pipe.processor.tokenizer("a red circle").input_ids
    image_processor = AutoImageProcessor.from_pretrained(saved, subfolder="processor")
    one, other = (p(images=picture, return_tensors="pt") for p in (image_processor, pipe.processor.image_processor))
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_task_pipeline_of_transformers(saved, pipe, picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    task = pipeline("image-text-to-text", model=str(saved / "model"), processor=str(saved / "processor"))
    (answer,) = task(text=messages, max_new_tokens=8, return_full_text=False)
    assert answer["generated_text"].strip() == pipe.chat(messages, max_new_tokens=8)


# The pipeline.


@pytest.mark.parametrize("load_with", [LatteFlowPipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"local_files_only": True},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": "balanced"},
        {"use_safetensors": True},
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_pipeline(saved, generate, expected, load_with, arguments):
    loaded = load_with.from_pretrained(saved, **arguments)
    assert type(loaded) is LatteFlowPipeline
    assert np.array_equal(generate(loaded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_pipeline_and_of_its_model(saved, dtype):
    loaded = DiffusionPipeline.from_pretrained(saved, dtype=dtype)
    assert {p.dtype for module in (loaded.model, loaded.vae) for p in module.parameters()} == {dtype}
    model = AutoModel.from_pretrained(saved, subfolder="model", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_dtype_by_component(saved, generate, expected):
    loaded = DiffusionPipeline.from_pretrained(saved, dtype={"model": torch.bfloat16, "default": torch.float32})
    assert loaded.model.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    assert generate(loaded).shape == expected.shape and np.isfinite(generate(loaded)).all()


PLACED = [{"": "cpu"}, {"vlm": "cpu", "tower": "cpu"}, {"vlm": "cpu", "tower": "disk"}]


@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", "sequential", *PLACED], ids=str)
def test_device_map_of_the_model(saved, pipe, generate, expected, tmp_path, device_map):
    model = AutoModel.from_pretrained(saved, subfolder="model", device_map=device_map, offload_folder=tmp_path)
    on_disk = any(parameter.is_meta for parameter in model.tower.parameters())
    assert on_disk == (isinstance(device_map, dict) and "disk" in device_map.values())
    assert np.array_equal(generate(with_model(pipe, model)), expected)


def test_variant(saved, pipe, generate, tmp_path):
    half = LatteFlowPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert names == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    for load_with in (LatteFlowPipeline, DiffusionPipeline):
        loaded = load_with.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert np.array_equal(generate(loaded), generate(half))
    model = AutoModel.from_pretrained(tmp_path, subfolder="model", variant="fp16")
    assert model.dtype == torch.float16
    with pytest.raises((OSError, ValueError), match="bf16"):
        DiffusionPipeline.from_pretrained(tmp_path, variant="bf16")
    with pytest.raises(OSError, match="no file named"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def sharded(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    pipe.save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_shards(sharded, generate, expected):
    for component, least in (("model", 3), ("vae", 2)):
        assert len(list((sharded / component).glob("*.safetensors"))) >= least
        assert len(list((sharded / component).glob("*.safetensors.index.json"))) == 1
    for load_with in (LatteFlowPipeline, DiffusionPipeline):
        assert np.array_equal(generate(load_with.from_pretrained(sharded)), expected)


@pytest.mark.parametrize("component", ["model", "vae"])
@pytest.mark.parametrize("how", ["missing", "truncated", "index truncated"])
def test_broken_shards_are_named(sharded, tmp_path, component, how):
    folder = shutil.copytree(sharded, tmp_path / "broken")
    broken = sorted((folder / component).glob("*.safetensors"))[1]
    if how == "missing":
        broken.unlink()
    else:
        broken = broken if how == "truncated" else next((folder / component).glob("*.index.json"))
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(OSError, match=broken.name):
        LatteFlowPipeline.from_pretrained(folder)


@pytest.mark.parametrize("load_with", MODEL_CLASSES)
def test_weights_of_another_architecture_are_refused(saved, tmp_path, load_with):
    """Transformers would fill what is missing with random numbers and pass over the rest."""
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "residual_attention": None}))
    with pytest.raises(ValueError, match=r"4 weights are not of this model, .*residual_gate"):
        load_with.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 1}))
    with pytest.raises(ValueError, match=r"layers_per_expert must be num_experts = 1 positive numbers"):
        load_with.from_pretrained(folder)
    one = {"num_experts": 1, "layers_per_expert": None, "expert_boundaries": None}
    (folder / "config.json").write_text(json.dumps({**config, **one}))
    with pytest.raises(ValueError, match=r"weights are missing, .*layers\.2\.self_attn\.residual_gate"):
        load_with.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    with pytest.raises(ValueError, match=r"weights have another shape .*tower\.head\.proj.*4.*8"):
        load_with.from_pretrained(folder)
    resized = load_with.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert resized.tower.head.proj.out_features == 8


def test_loading_information_is_still_given(saved):
    model, info = AutoModel.from_pretrained(saved, subfolder="model", output_loading_info=True)
    assert type(model) is LatteFlowForConditionalGeneration and not info["missing_keys"]


def test_answers_end_without_a_generation_config(saved, tmp_path):
    """Of a pipeline on the hub, diffusers does not fetch it."""
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    model = AutoModel.from_pretrained(folder)
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id is not None


def test_components_go_from_pipeline_to_pipeline(pipe, saved, generate, expected):
    vae = AutoencoderDC.from_pretrained(saved, subfolder="vae")
    loaded = DiffusionPipeline.from_pretrained(saved, vae=vae, model=pipe.model)
    assert loaded.vae is vae and loaded.model is pipe.model
    again = LatteFlowPipeline(**loaded.components)
    assert np.array_equal(generate(again), expected)
    assert np.array_equal(generate(LatteFlowPipeline.from_pipe(loaded)), expected)
