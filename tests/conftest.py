# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Small real classes that all tests share: nothing here is mocked, only made tiny and random.

What is expensive is made once a session and must not be changed: a test that trains, perturbs or moves weights takes a
copy (`make_model`, `copy.deepcopy`). Weights that are zero at the start of training are filled, or every velocity
would be zero and half of the tests could not fail.
"""

import os


# Before transformers and huggingface_hub are imported: the suite never asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte_flow_hf import (
    LatteFlowForConditionalGeneration,
    LatteFlowPipeline,
    LatteFlowProcessor,
    LatteFlowScheduler,
    tiny_checkpoint,
)


# Matrices this small gain nothing from more, and two suites side by side stay out of each other's way.
torch.set_num_threads(min(2, torch.get_num_threads()))

LATENT_CHANNELS = 4


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run what takes minutes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: --run-slow"))


def fill(module: torch.nn.Module, seed: int, std: float) -> None:
    """Small random numbers in every parameter: norms around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1.0 + noise if "norm" in name and name.endswith("weight") else noise)


@pytest.fixture(scope="session")
def processor() -> LatteFlowProcessor:
    return LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor")


@pytest.fixture(scope="session")
def backbone(processor) -> Qwen2VLForConditionalGeneration:
    """The stock class: 4 layers, 4 heads of 8 over 2 key-value heads, a vision tower of one layer."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "vocab_size": len(processor.tokenizer),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "bos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    # Transformers' own 0.02 leaves every attention map nearly uniform, so that no test would see it change.
    fill(model, seed=1, std=0.25)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def make_model(backbone):
    """A model around its own copy of the backbone; `filled=False` leaves it as `from_vlm` makes it."""

    def make(filled: bool = True, **config) -> LatteFlowForConditionalGeneration:
        config = {"num_experts": 2, "latent_channels": LATENT_CHANNELS, "timestep_frequency_dim": 16, **config}
        torch.manual_seed(2)
        model = LatteFlowForConditionalGeneration.from_vlm(copy.deepcopy(backbone), **config)
        if filled:
            fill(model.tower, seed=3, std=0.25)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model) -> LatteFlowForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="session")
def make_vae():
    def make(latent_channels: int = LATENT_CHANNELS) -> AutoencoderDC:
        torch.manual_seed(4)
        return AutoencoderDC(
            latent_channels=latent_channels,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(0, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
            scaling_factor=0.7,
        ).eval()

    return make


@pytest.fixture(scope="session")
def vae(make_vae) -> AutoencoderDC:
    return make_vae()


@pytest.fixture
def pipe(model, processor, vae) -> LatteFlowPipeline:
    """A new pipeline around the session's components, which must not be changed."""
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    pipe = LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own_pipe(pipe) -> LatteFlowPipeline:
    """A pipeline whose components are copies, which a test may change."""
    own_pipe = LatteFlowPipeline(**{name: copy.deepcopy(component) for name, component in pipe.components.items()})
    own_pipe.set_progress_bar_config(disable=True)
    return own_pipe


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """64x64, random: 8x8 patches, merged to 16 image tokens."""
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def encode(processor):
    """Prompts (and one picture for all) -> the model's inputs, padded on the left."""

    def encode(*prompts: str, image=None):
        return processor.encode_conversations([processor.conversation(prompt, image) for prompt in prompts])

    return encode


@pytest.fixture(scope="session")
def count_layers():
    """Inside `with count_layers(model) as calls`, `calls[i]` counts how often tower layer i runs."""

    @contextlib.contextmanager
    def count(model):
        calls = Counter()
        handles = [
            layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
            for index, layer in enumerate(model.tower.layers)
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    return count


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A file that is no picture, whatever its name says."""
    path = tmp_path / "picture.png"
    path.write_text("this is no picture")
    return path


@pytest.fixture(scope="session")
def pipeline(model, processor, vae, tmp_path_factory) -> str:
    """The folder of a random pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "random"
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(folder)
    return str(folder)
