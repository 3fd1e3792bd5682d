# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Each backbone from its stock processor to images, answers, training and files.

A test is a column of the table in docs/guides/backbone_table.md, which docs/backbone_table.py makes from the results.
"""

import copy
import functools
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLOSE, fill, noise
from peft import get_peft_model
from PIL import Image
from processors import PROCESSORS, processor_and_backbone
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, DynamicCache, Trainer, TrainingArguments

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline, LatteFlowProcessor, LatteFlowScheduler
from latte_flow_hf.conversion import extract_backbone, from_single_file, initialize, to_single_file
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.modeling.generation import PROCESSOR_OUTPUTS
from latte_flow_hf.training import expert_lora_config
from latte_flow_hf.training.collator import ConversationCollator, PromptTokenizer, TextToImageCollator
from latte_flow_hf.training.recipe import Recipe
from latte_flow_hf.training.train import train


FAMILIES = pytest.mark.parametrize("family", list(PROCESSORS))
# What takes seconds for each, or does not depend on much: some of them, and the others with --run-slow.
FEW = ("smolvlm", "gemma3")
FEW_FAMILIES = pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in PROCESSORS]
)
# Those of the autoencoder in conftest.py.
LATENT_CHANNELS = 4
SMALL = {"num_experts": 2, "timestep_frequency_dim": 16}
CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}


def random_image(seed: int, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, width, 3), dtype=np.uint8))


ONE, OTHER = random_image(0), random_image(1)
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": ONE}, {"type": "image", "image": OTHER}, {"type": "text", "text": "a"}],
    }
]


def new_model(family: str) -> LatteFlowForConditionalGeneration:
    torch.manual_seed(2)
    backbone = copy.deepcopy(processor_and_backbone(family)[1])
    return LatteFlowForConditionalGeneration.from_vlm(backbone, latent_channels=LATENT_CHANNELS, **SMALL)


@functools.cache
def filled_model(family: str) -> LatteFlowForConditionalGeneration:
    """It must not be changed."""
    model = new_model(family)
    fill(model.tower, seed=3, std=0.25)
    return model.eval()


@pytest.fixture
def make_pipe(vae):
    def make(family: str, own_model: bool = False) -> LatteFlowPipeline:
        model = copy.deepcopy(filled_model(family)) if own_model else filled_model(family)
        processor, _ = processor_and_backbone(family)
        scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
        pipe = LatteFlowPipeline(model, processor, copy.deepcopy(vae) if own_model else vae, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generate(pipe: LatteFlowPipeline, prompt: str | None = "a red circle", **arguments) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**CALL, **arguments}).images


@FAMILIES
def test_text(family, make_pipe):
    """Logits and answers equal those of the stock class, bit for bit, with images."""
    processor, backbone = processor_and_backbone(family)
    pipe = make_pipe(family)
    inputs = processor.encode_conversations([processor.conversation("what?", ONE), processor.conversation("a word")])
    with torch.no_grad():
        assert torch.equal(pipe.model(**inputs).logits, backbone(**inputs).logits)
    # The Trainer removes what `forward` does not name, and `generate(generation_mode="image")` passes these on.
    assert set(inputs) <= set(PROCESSOR_OUTPUTS) <= set(inspect.signature(pipe.model.forward).parameters)
    inputs = processor.encode_conversations([processor.conversation("what?", [ONE, OTHER])])
    # A context is the stock class's own cache, so its positions are the backbone's.
    context = pipe.model.encode_context(**inputs)
    with torch.no_grad():
        cache = backbone(**inputs, past_key_values=DynamicCache(), use_cache=True).past_key_values
    for layer, keys, values in zip(cache.layers, context.keys, context.values, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    # The position that `generate` gives to the next token.
    delta = getattr(backbone.model, "rope_deltas", None)
    offset = int(family.startswith("paligemma")) if delta is None else int(delta)
    assert context.next_position.tolist() == [inputs["input_ids"].shape[1] + offset]
    tokens = backbone.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = pipe.chat("what?", images=[ONE, OTHER], max_new_tokens=4, do_sample=False)
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@FAMILIES
def test_prompt_with_image(family, make_pipe):
    """Images from a prompt, a prompt with an image, and messages with two."""
    pipe = make_pipe(family)
    found = [
        generate(pipe),
        generate(pipe, image=ONE),
        generate(pipe, image=OTHER),
        generate(pipe, None, messages=MESSAGES),
    ]
    assert all(image.shape == (1, 3, 32, 32) and image.isfinite().all() for image in found)
    for index, image in enumerate(found):
        assert not any(torch.equal(image, other) for other in found[:index])


@FAMILIES
def test_padded(family, make_pipe):
    """A prompt in a batch with longer ones gives the velocity that it gives alone, with and without images."""
    pipe = make_pipe(family)
    processor, model = pipe.processor, pipe.model
    conversations = [
        processor.conversation("", None),
        processor.conversation("a red circle left of a blue square", ONE),
        processor.conversation("a", [OTHER, ONE]),
    ]
    latents = noise(1, LATENT_CHANNELS, 4, 4)
    batch = model.encode_context(**processor.encode_conversations(conversations))
    assert batch.has_padding
    for row, conversation in enumerate(conversations):
        alone = model.encode_context(**processor.encode_conversations([conversation]))
        for timestep in (900.0, 100.0):
            expected = model.predict_velocity(latents, timestep, alone)
            found = model.predict_velocity(latents, timestep, batch.select(torch.tensor([row])))
            torch.testing.assert_close(found, expected, **CLOSE)
    assert len(LatteFlowContext.cat(batch.split())) == 3


class TwoImages(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        # `IndexError` ends an iteration.
        return {"prompt": ["a red circle", "a cross"][index], "latents": noise(LATENT_CHANNELS, 4, 4, seed=index)}


@FEW_FAMILIES
def test_training_step(family, make_pipe, tmp_path):
    """Steps of the stock Trainer on images and, with a chat template, conversations: the tower learns, the backbone is
    unchanged."""
    pipe = make_pipe(family, own_model=True)
    conversations = {}
    if pipe.processor.chat_template is not None:
        answered = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
        conversations = {
            "conversations": [{"messages": answered}],
            "conversation_collator": ConversationCollator(pipe.processor),
        }
    arguments = TrainingArguments(
        str(tmp_path),
        dataloader_pin_memory=False,
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        seed=0,
    )
    examples = TwoImages()
    # Often, for a mean over many timesteps.
    latents = torch.stack([example["latents"] for example in examples] * 32)
    context = PromptTokenizer(pipe.processor)([example["prompt"] for example in examples] * 32)

    def loss() -> float:
        with torch.no_grad():
            return float(pipe.model.flow_loss(latents, context, generator=torch.Generator().manual_seed(0))[0])

    before = loss()
    collator = TextToImageCollator(PromptTokenizer(pipe.processor), 0.0, **conversations)
    Trainer(pipe.model, arguments, train_dataset=examples, data_collator=collator).train()
    assert loss() < before
    expected = processor_and_backbone(family)[1].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.model.vlm.state_dict().items())


@FEW_FAMILIES
def test_recipe(family, vae, tmp_path):
    """`latte-flow train` makes a pipeline from the folders of a backbone and an autoencoder, with a cache of images
    and prompts and, with a chat template, questions about images."""
    processor, backbone = processor_and_backbone(family)
    backbone.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    vae.save_pretrained(tmp_path / "vae")
    content = {
        "model": {"backbone": str(tmp_path / "backbone"), "autoencoder": str(tmp_path / "vae"), "experts": SMALL},
        "data": {"source": {"path": "tinyworld", "num_images": 4}, "cache": str(tmp_path / "cache")},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True},
    }
    if processor.chat_template is not None:
        content["understanding"] = {"source": {"path": "tinyworld", "num_conversations": 4}, "share": 0.5}
    pipe = LatteFlowPipeline.from_pretrained(train(Recipe.from_dict(content), tmp_path / "work", tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.processor) is type(processor)
    assert generate(pipe, image=ONE).isfinite().all()


@FEW_FAMILIES
def test_lora(family, make_pipe, tmp_path):
    """An adapter of one expert is trained, saved and loaded again; the other expert is unchanged."""
    pipe = make_pipe(family, own_model=True)
    before = generate(pipe, output_type="latent")
    peft_model = get_peft_model(pipe.model, expert_lora_config(pipe.model, [1], r=2))
    inputs = PromptTokenizer(pipe.processor)(["a red circle"])
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
    latents = noise(1, LATENT_CHANNELS, 4, 4)
    for _ in range(2):
        peft_model(**inputs, latents=latents, generator=torch.Generator().manual_seed(0)).loss.backward()
        optimizer.step()
    weights = pipe.model.state_dict()
    for name, tensor in filled_model(family).state_dict().items():
        # PEFT moves what it adapts to `base_layer`.
        path, _, leaf = name.rpartition(".")
        assert torch.equal(weights[name] if name in weights else weights[f"{path}.base_layer.{leaf}"], tensor), name
    adapted = {int(name.split("tower.layers.")[1].split(".")[0]) for name in weights if "lora_" in name}
    assert adapted == set(pipe.model.expert_layers(1))
    peft_model.save_pretrained(tmp_path)
    expected = generate(pipe, output_type="latent")
    loaded = make_pipe(family, own_model=True)
    loaded.load_lora_weights(tmp_path)
    assert torch.equal(generate(loaded, output_type="latent"), expected) and not torch.equal(expected, before)


@FEW_FAMILIES
def test_save_and_load(family, make_pipe, tmp_path):
    """The saved pipeline gives the same images and answers."""
    pipe = make_pipe(family)
    pipe.save_pretrained(tmp_path)
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.processor) is type(pipe.processor)
    assert loaded.processor.to_dict() == pipe.processor.to_dict()
    assert torch.equal(generate(loaded, image=ONE), generate(pipe, image=ONE))
    answers = [p.chat("what?", images=ONE, max_new_tokens=4, do_sample=False) for p in (loaded, pipe)]
    assert answers[0] == answers[1]


@FEW_FAMILIES
def test_convert(family, make_pipe, vae, tmp_path):
    """A backbone's folder becomes a pipeline, one file, a pipeline and the backbone's folder again."""
    processor, backbone = processor_and_backbone(family)
    backbone.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    vae.save_pretrained(tmp_path / "vae")
    initialize(tmp_path / "backbone", tmp_path / "vae", **SMALL).write(tmp_path / "pipeline")
    to_single_file(tmp_path / "pipeline").write(tmp_path / "one.safetensors")
    from_single_file(tmp_path / "one.safetensors").write(tmp_path / "again")
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "again")
    pipe.set_progress_bar_config(disable=True)
    # The tower of a new model is copied from the backbone, and its velocity zero.
    found = pipe.model.state_dict()
    for name, tensor in new_model(family).state_dict().items():
        is_random = "latent_embedding" in name or "timestep_embedding" in name
        assert found[name].shape == tensor.shape and (is_random or torch.equal(found[name], tensor)), name
    assert generate(pipe, image=ONE).isfinite().all()

    extract_backbone(tmp_path / "again").write(tmp_path / "extracted")
    extracted = AutoModelForImageTextToText.from_pretrained(tmp_path / "extracted")
    own = LatteFlowProcessor.from_pretrained(tmp_path / "extracted")
    assert own.to_dict() == processor.to_dict()
    inputs = own.encode_conversations([own.conversation("what?", ONE)])
    with torch.no_grad():
        assert torch.equal(extracted(**inputs).logits, backbone(**inputs).logits)


@FEW_FAMILIES
def test_bfloat16(family, make_pipe):
    """In bfloat16, images and answers from prompts with images."""
    pipe = make_pipe(family, own_model=True).to(torch.bfloat16)
    assert generate(pipe, image=ONE).isfinite().all()
    assert isinstance(pipe.chat("what?", images=ONE, max_new_tokens=2), str)


@pytest.mark.slow
@FAMILIES
def test_compile(family, make_pipe):
    """Compiled layers, for calls with and without an image and padding, give the same images."""
    pipe, compiled = make_pipe(family), make_pipe(family, own_model=True)
    torch._dynamo.reset()
    compiled.compile(backend="eager", fullgraph=True)
    for arguments in ({}, {"image": ONE}, {"guidance_scale": 1.0}):
        torch.testing.assert_close(generate(compiled, **arguments), generate(pipe, **arguments), **CLOSE)
    torch._dynamo.reset()


@FEW_FAMILIES
def test_offload(family, make_pipe):
    """Off-loading of experts and of whole components gives the same images."""
    pipe = make_pipe(family)
    expected = generate(pipe, image=ONE)
    by_expert, by_component = (make_pipe(family, own_model=True) for _ in range(2))
    by_expert.enable_expert_offload("cpu")
    assert torch.equal(generate(by_expert, image=ONE), expected)
    by_component.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(generate(by_component, image=ONE), expected, **CLOSE)


def test_the_table_has_a_row_for_each_backbone_and_a_column_for_each_check():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("backbone_table", root / "docs" / "backbone_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    checks = [name for name, value in globals().items() if hasattr(value, "pytestmark") and name.startswith("test_")]
    assert list(table.COLUMNS) == checks
    page = table.PAGE.read_text()
    assert f"| Backbone | Processor | {' | '.join(table.COLUMNS.values())} |" in page
    assert all(f"| {family} | `{PROCESSORS[family]['class']}` |" in page for family in PROCESSORS)
