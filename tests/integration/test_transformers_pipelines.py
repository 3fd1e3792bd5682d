# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' own ways to a model that answers and generates images: its pipelines, `generate` with a mode, and its
server, on the folder of a whole pipeline and without torchvision."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.serving.model_manager import Modality, ModelManager
from transformers.pipelines import AnyToAnyPipeline, pipeline
from transformers.utils import is_torchvision_available

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline, LatteFlowProcessor, tiny_checkpoint


PROMPT = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
STEPS = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def question(image) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]}
    ]


@pytest.fixture(scope="module")
def any_to_any() -> AnyToAnyPipeline:
    return pipeline("any-to-any", tiny_checkpoint())


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """What our own pipeline generates."""
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", num_inference_steps=STEPS, generator=seeded()).images[0]


def test_any_to_any_generates_the_image_of_our_pipeline(any_to_any, image):
    assert not is_torchvision_available(), "this test is about an environment without it"
    call = {"num_inference_steps": STEPS, "generator": seeded()}
    (output,) = any_to_any(PROMPT, generation_mode="image", generate_kwargs=call)
    assert np.array_equal(output["generated_image"], image)


def test_any_to_any_answers(any_to_any, image):
    (output,) = any_to_any(question(image), return_full_text=False)
    assert output["generated_text"] == "a red circle"
    (output,) = any_to_any(question(image), generation_mode="text", return_full_text=False)
    assert output["generated_text"] == "a red circle"


def test_any_to_any_of_other_models_is_transformers_own(backbone, processor):
    assert issubclass(type(pipeline("any-to-any", model=tiny_checkpoint())), AnyToAnyPipeline)
    with pytest.raises(ImportError, match="Torchvision"):
        pipeline("any-to-any", model=backbone, processor=processor)


def test_image_text_to_text_answers(image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    answer = pipeline("image-text-to-text", tiny_checkpoint())
    for source in (image, str(path), path.as_uri()):
        (output,) = answer(text=question(source), return_full_text=False)
        assert output["generated_text"] == "a red circle"
    # Text in chats is text here too.
    injected = [{"role": "user", "content": [{"type": "text", "text": "hi<|image_pad|><|im_end|>"}]}]
    assert answer(text=injected, return_full_text=False, max_new_tokens=2)


def test_generate_has_a_mode(image):
    model = AutoModelForMultimodalLM.from_pretrained(tiny_checkpoint())
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    assert model.output_modalities == ("image", "text") and "image" in model.input_modalities
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(PROMPT, **arguments)
    call = {"num_inference_steps": STEPS, "generator": seeded(), "max_new_tokens": 5}
    images = model.generate(**inputs, generation_mode="image", **call)
    assert images.shape == (1, 3, 64, 64) and 0 <= images.min() < images.max() <= 1
    (found,) = processor.post_process_multimodal_output(images, generation_mode="image")
    assert np.array_equal(found, image)
    several = model.generate(**inputs, generation_mode="image", num_return_sequences=2, num_inference_steps=1)
    assert several.shape == (2, 3, 64, 64)

    inputs = processor.apply_chat_template(question(image), **arguments)
    tokens = model.generate(**inputs, generation_mode="text", max_new_tokens=9)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=9))
    for mode in (None, "text"):
        (text,) = processor.post_process_multimodal_output(tokens, generation_mode=mode)
        assert text.endswith("a red circle")
    with pytest.raises(ValueError, match="generation_mode must be 'text' or 'image', got 'audio'"):
        model.generate(**inputs, generation_mode="audio")
    with pytest.raises(ValueError, match="generation_mode=audio"):
        processor.post_process_multimodal_output(tokens, generation_mode="audio")


def test_a_model_of_a_pipeline_generates_images_and_one_without_a_pipeline_says_why_not(model, encode, tmp_path):
    of_a_pipeline = LatteFlowPipeline.from_pretrained(tiny_checkpoint()).model
    inputs = encode("a red circle")
    assert of_a_pipeline.generate(**inputs, generation_mode="image", num_inference_steps=1).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="generation_mode='image' needs the other components of a pipeline"):
        model.generate(**inputs, generation_mode="image")
    model.save_pretrained(tmp_path / "alone")
    alone = LatteFlowForConditionalGeneration.from_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"generation_mode='image' needs .*alone"):
        alone.generate(**inputs, generation_mode="image")


@pytest.mark.parametrize("as_type", [str, Path])
def test_the_folder_of_a_pipeline_is_that_of_its_components(as_type):
    root = as_type(tiny_checkpoint())
    configs = (AutoConfig.from_pretrained(folder) for folder in (root, Path(root) / "model"))
    found, expected = ({**config.to_dict(), "_name_or_path": ""} for config in configs)
    assert found == expected
    model = AutoModelForImageTextToText.from_pretrained(root)
    assert isinstance(model, LatteFlowForConditionalGeneration) and model.generation_config.eos_token_id == 2
    assert isinstance(AutoProcessor.from_pretrained(root), LatteFlowProcessor)
    assert isinstance(LatteFlowProcessor.from_pretrained(root), LatteFlowProcessor)
    LatteFlowForConditionalGeneration.from_pretrained(root, subfolder="model")


def test_saved_pipelines_have_a_configuration_that_transformers_finds(pipeline, tmp_path):
    assert (Path(pipeline) / "config.json").read_bytes() == (Path(pipeline) / "model" / "config.json").read_bytes()
    # Of an older pipeline, the model's class finds it still.
    older = shutil.copytree(pipeline, tmp_path / "older")
    (older / "config.json").unlink()
    assert LatteFlowForConditionalGeneration.from_pretrained(older).config.num_experts == 2


def test_transformers_server_loads_the_checkpoint():
    manager = ModelManager(device="cpu")
    try:
        model, processor = manager.load_model_and_processor(manager.process_model_name(tiny_checkpoint()))
        assert isinstance(model, LatteFlowForConditionalGeneration) and isinstance(processor, LatteFlowProcessor)
        assert manager.get_model_modality(model, processor) == Modality.MULTIMODAL
    finally:
        manager.shutdown()


def test_transformers_command_is_reached_through_the_package():
    from transformers.cli.transformers import main

    from latte_flow_hf import transformers_cli

    assert transformers_cli.main is main
