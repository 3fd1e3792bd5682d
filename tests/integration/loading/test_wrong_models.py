# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A wrong model cannot pass silently: the embedded checkpoint in every dtype on every device, and broken ones."""

import copy

import numpy as np
import pytest
import torch

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint


DEVICES = ["cpu"] + [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def generate(pipe, prompt="a red circle", **arguments) -> np.ndarray:
    """(height, width, 3) in [0, 1]; the noise is drawn on the CPU, so that every device starts from the same."""
    arguments = {"num_inference_steps": 20, "generator": torch.Generator().manual_seed(0), **arguments}
    return pipe(prompt, output_type="np", **arguments).images[0]


@pytest.fixture(scope="module")
def reference():
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return generate(pipe)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def tiny(request, device):
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint(), dtype=request.param).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_images_are_close_to_single_precision(tiny, reference):
    found = generate(tiny)
    assert np.isfinite(found).all() and found.std() > 0.05
    assert np.abs(found - reference).mean() < 0.01


def test_the_prompt_and_guidance_change_the_image(tiny):
    red = generate(tiny)
    for other in (
        generate(tiny, "a blue square"),
        generate(tiny, guidance_scale=1.0),
        generate(tiny, negative_prompt="a white cross"),
    ):
        assert np.abs(red - other).mean() > 0.01


# Broken ones.


@pytest.fixture
def broken(pipe):
    """A pipeline whose parts may be spoilt."""
    scheduler = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries)
    spoilt = LatteFlowPipeline(copy.deepcopy(pipe.model), pipe.processor, copy.deepcopy(pipe.vae), scheduler)
    spoilt.set_progress_bar_config(disable=True)
    return spoilt


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_numbers_that_are_not_finite_are_refused(broken, output_type):
    """Weights that overflow in half precision, as of a model that was trained in bfloat16."""
    with torch.no_grad():
        broken.model.tower.head.proj.weight *= 1e5
    broken("a red circle", num_inference_steps=2, output_type="latent")
    broken.to(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"LatteFlow.* not finite in dtype torch\.float16\. Use .*float32"):
        broken("a red circle", num_inference_steps=2, output_type=output_type)


def test_autoencoder_that_overflows_is_named(broken):
    with torch.no_grad():
        next(broken.vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"AutoencoderDC .*not finite in dtype torch\.float32"):
        broken("a red circle", num_inference_steps=2)


def test_an_untrained_tower_is_logged(broken, make_model, caplog):
    broken("a red circle", num_inference_steps=2)
    assert caplog.messages == []
    broken.model = make_model(filled=False)
    broken("a red circle", num_inference_steps=2)
    assert ["untrained" in message for message in caplog.messages] == [True]


def test_an_image_of_a_single_colour_is_logged(broken, caplog):
    with torch.no_grad():
        for parameter in broken.vae.decoder.parameters():
            parameter.zero_()
    broken("a red circle", num_inference_steps=2)
    assert ["single colour" in message for message in caplog.messages] == [True]
