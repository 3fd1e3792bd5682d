# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The parts of a pipeline, each in its own copy of it, as processes on several devices have them."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.serving import ImageRequest
from latte_flow_hf.serving.chat import ChatRequest, run_chat
from latte_flow_hf.serving.engine import decode_each
from latte_flow_hf.serving.running_image import start_images
from latte_flow_hf.serving.stages import ExpertStage, for_expert, keep_backbone, keep_decoder, keep_expert


SOURCE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.where(np.arange(64)[:, None] < [32] * 64, 255, 0).astype(np.uint8))
REQUESTS = [
    ImageRequest(prompt="a red circle", seed=1, num_inference_steps=5),
    ImageRequest(prompt="a blue square above a green cross", seed=2, num_inference_steps=8, guidance_scale=2.0),
    ImageRequest(prompt="a cross", seed=3, num_inference_steps=6, guidance_scale=1.0),
    ImageRequest(prompt="a cross", seed=4, num_inference_steps=6, negative_prompt="a circle", num_images=2),
    ImageRequest(prompt="a cross", seed=5, num_inference_steps=8, source_image=SOURCE, strength=0.75),
    ImageRequest(prompt="a cross", seed=6, num_inference_steps=8, source_image=SOURCE, mask_image=MASK, num_images=2),
]


def num_weights(module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.device.type != "meta")


@pytest.fixture
def make_part(pipe):
    """A copy of the pipeline, of which a function keeps a part."""

    def make(keep, *options) -> LatteFlowPipeline:
        components = {name: copy.deepcopy(component) for name, component in pipe.components.items()}
        part = LatteFlowPipeline(**components)
        keep(part, *options, "cpu")
        return part

    return make


SCHEDULERS = {
    "euler": lambda: LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0]),
    "new noise": lambda: LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], new_noise=0.5),
    "heun": lambda: LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], solver="heun"),
    "unipc": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_pass_from_part_to_part(pipe, make_part, name, alone):
    """Everything between two parts is pickled, as between processes."""
    pipe.scheduler = SCHEDULERS[name]()
    backbone, decoder = make_part(keep_backbone), make_part(keep_decoder)
    experts = [make_part(keep_expert, expert) for expert in range(2)]
    stages = [ExpertStage(part.model, expert) for expert, part in enumerate(experts)]
    images = [image for images in start_images(backbone, REQUESTS) for image in images]
    contexts = [{"context": image.context, "negative_context": image.negative_context} for image in images]
    for stage in stages:
        sent = [pickle.loads(pickle.dumps(for_expert(image, pipe.model.config))) for image in images]
        futures = [stage.submit(image.to("cpu")) for image in sent]
        images = [
            dataclasses.replace(pickle.loads(pickle.dumps(future.result(timeout=5))), **context)
            for future, context in zip(futures, contexts, strict=True)
        ]
        stage.close()
    assert all(image.is_done for image in images)
    found = decode_each(decoder, [image.latents for image in images], ["pt"] * len(images))
    expected = [image for request in REQUESTS for image in alone(pipe, dataclasses.replace(request, output_type="pt"))]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-5)


def test_each_part_holds_its_share_of_the_weights(pipe, make_part):
    model, vae = pipe.model, pipe.vae
    layers = [num_weights(layer) for layer in model.tower.layers]
    shared = num_weights(model.tower) - sum(layers)
    part = make_part(keep_backbone)
    assert num_weights(part.model) == num_weights(model.vlm) and num_weights(part.vae) == num_weights(vae.encoder)
    for expert in range(2):
        own = sum(layers[index] for index in model.expert_layers(expert))
        part = make_part(keep_expert, expert)
        assert num_weights(part.model) == own + shared and num_weights(part.vae) == 0
    part = make_part(keep_decoder)
    assert num_weights(part.model) == 0 and num_weights(part.vae) == num_weights(vae)


def test_only_the_keys_and_values_of_an_expert_travel(pipe):
    ((image,),) = start_images(pipe, REQUESTS[:1])
    sent = for_expert(image, pipe.model.config)
    for context, whole in ((sent.context, image.context), (sent.negative_context, image.negative_context)):
        assert [keys.numel() > 0 for keys in context.keys] == [True, True, False, False]
        assert all(torch.equal(*pair) for pair in zip(context.keys[:2], whole.keys[:2]))
    whole = len(pickle.dumps(image.context)) + len(pickle.dumps(image.negative_context))
    part = len(pickle.dumps(sent.context)) + len(pickle.dumps(sent.negative_context))
    assert part < 0.75 * whole
    # Also if the prompts were encoded together.
    ((together,), *_) = start_images(pipe, [REQUESTS[0]] * 4)
    assert len(pickle.dumps(for_expert(together, pipe.model.config))) < 1.1 * len(
        pickle.dumps(for_expert(image, pipe.model.config))
    )


def test_a_stage_takes_images_of_its_expert_only(pipe):
    ((image,),) = start_images(pipe, REQUESTS[:1])
    stage = ExpertStage(pipe.model, 1)
    with pytest.raises(ValueError, match="image must be at expert 1, got one at 0"):
        stage.submit(image)
    stage.close()


def test_a_stage_drops_what_is_cancelled_and_reports_what_fails(pipe, make_part):
    ((image,), (other,)) = start_images(pipe, [dataclasses.replace(REQUESTS[0], num_inference_steps=1000)] * 2)
    stage = ExpertStage(pipe.model, 0)
    future = stage.submit(image)
    assert future.cancel()
    broken = ExpertStage(make_part(keep_expert, 1).model, 0)
    with pytest.raises(Exception, match="meta"):
        broken.submit(other).result(timeout=5)
    for each in (stage, broken):
        each.close()
        assert not len(each.batches)
    assert image.index < 500


def test_the_backbone_alone_chats(pipe, make_part, picture):
    conversation = pipe.processor.conversation("what is this?", picture)
    expected = pipe.chat(conversation, max_new_tokens=8)
    assert run_chat(make_part(keep_backbone), ChatRequest(conversation, max_new_tokens=8)).text == expected
