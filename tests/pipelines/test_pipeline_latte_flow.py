# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The pipeline with random weights: its images are noise, but everything about how they are generated can be checked.

The oracle of the sampling loop is the loop written out here with diffusers' own scheduler. One test starts a fresh
process, as a user of a saved pipeline does.
"""

import inspect
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers.utils import logging as transformers_logging

from latte_flow_hf import LatteFlowPipeline, LatteFlowPipelineOutput, LatteFlowScheduler
from latte_flow_hf.modeling.context import LatteFlowContext


PROMPT = "a red circle"
PROMPTS = ["a red circle", "a small blue square above a handwritten seven", "a cross"]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe, prompt=PROMPT, **arguments) -> torch.Tensor:
    """Latents after a few steps: what differs anywhere differs here."""
    arguments = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe(prompt, **arguments).images


@pytest.fixture
def prefills(model):
    """The number of prompts in each prefill, as they come."""
    rows: list[int] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
    yield rows
    hook.remove()


@pytest.fixture(scope="module")
def saved(model, processor, vae, tmp_path_factory):
    """A whole pipeline in a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, shift=1.5)
    LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=scheduler).save_pretrained(folder)
    return folder


# What goes in and comes out.


def test_call_takes_what_the_design_says():
    found = {name: p.default for name, p in inspect.signature(LatteFlowPipeline.__call__).parameters.items()}
    expected = {
        "prompt": None,
        "image": None,
        "messages": None,
        "negative_prompt": None,
        "height": None,
        "width": None,
        "num_inference_steps": None,
        "num_images_per_prompt": 1,
        "generator": None,
        "latents": None,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end": None,
        "steps_per_expert": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert {"guidance_scale", "callback_on_step_end_tensor_inputs"} <= set(found)
    assert LatteFlowPipeline.generate is LatteFlowPipeline.__call__


def test_output_types_show_the_same_image(pipe):
    images = {kind: generate(pipe, PROMPTS[:2], output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert [type(p) for p in images["pil"]] == [Image.Image] * 2
    assert [(p.size, p.mode) for p in images["pil"]] == [((64, 64), "RGB")] * 2
    assert isinstance(images["np"], np.ndarray) and images["np"].shape == (2, 64, 64, 3)
    assert images["pt"].shape == (2, 3, 64, 64)
    assert images["latent"].shape == (2, 4, 8, 8)
    assert images["pt"].min() >= 0 and images["pt"].max() <= 1 and images["pt"].std() > 0.01
    assert np.array_equal(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    for row, image in enumerate(images["pil"]):
        assert np.array_equal(np.asarray(image), (images["np"][row] * 255).round().astype(np.uint8))


def test_latents_decode_by_the_vae_s_own_scale(pipe, vae):
    latents, pixels = generate(pipe), generate(pipe, output_type="pt")
    with torch.no_grad():
        expected = vae.decode(latents / 0.7).sample
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(pipe.decode_latents(latents, "pt"), pixels)


def test_encode_images_gives_scaled_latents(pipe, vae, picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent * 0.7
    found = pipe.encode_images([picture])
    assert found.shape == (1, 4, 8, 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_encode_images_takes_every_source(pipe, picture):
    expected = pipe.encode_images(picture)
    array = np.asarray(picture)
    floats = torch.from_numpy(array / 255).permute(2, 0, 1)
    for source in (array, torch.from_numpy(array.copy()), floats, floats[None], [picture], array[None]):
        assert torch.equal(pipe.encode_images(source), expected)
    batch = pipe.encode_images(np.stack([array, array[::-1]]))
    assert batch.shape == (2, 4, 8, 8)
    torch.testing.assert_close(batch[:1], expected, rtol=1e-4, atol=1e-5)


def test_encode_images_keeps_the_aspect_ratio(pipe, picture):
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    wide.paste(picture, (32, 0))
    assert pipe.encode_images(wide).shape == (1, 4, 8, 16)
    expected = pipe.encode_images(picture)
    assert torch.equal(pipe.encode_images(wide, height=64, width=64), expected)
    found = pipe.encode_images([wide, picture], height=np.int64(64), width=64)
    torch.testing.assert_close(found, expected.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-5)
    # What is no multiple of 8 is cut off, not squeezed.
    odd = Image.new("RGB", (70, 64))
    odd.paste(picture, (3, 0))
    assert torch.equal(pipe.encode_images(odd), expected)


def test_encode_images_composites_on_the_processor_s_background(own_pipe):
    transparent = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    for background, colour in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        own_pipe.processor.background = background
        assert torch.equal(
            own_pipe.encode_images(transparent), own_pipe.encode_images(Image.new("RGB", (64, 64), colour))
        )


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (
            [(64, 64), (128, 64)],
            {},
            "images must have one size, or height and width be given, got sizes [(64, 64), (128",
        ),
        ([], {}, "images must have one size"),
        ([(7, 64)], {}, "images must have 8 pixels a side or more, got (7, 64)."),
        ([(64, 64)], {"height": 60, "width": 64}, "height must be a positive multiple of 8, got 60."),
        ([(64, 64)], {"height": 64}, "give both height and width, or neither; got 64 and None."),
    ],
)
def test_encode_images_refuses_what_it_would_squeeze(pipe, images, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.encode_images([Image.new("RGB", shape) for shape in images], **size)


def test_numbers_of_numpy_are_numbers(pipe):
    plain = {"height": 64, "width": 64, "num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    numpy = {**{name: np.int64(value) for name, value in plain.items()}, "guidance_scale": np.float32(3)}
    found, expected = (
        pipe(PROMPT, generator=seeded(), output_type="latent", **numbers).images for numbers in (numpy, plain)
    )
    assert torch.equal(found, expected)


def test_other_words_and_sizes_than_those_of_a_small_world_are_warned_of(own_pipe, caplog):
    transformers_logging.warning_once.cache_clear()
    call = {"num_inference_steps": 2, "output_type": "latent"}
    own_pipe("a dog", height=128, **call)
    assert caplog.messages == []
    own_pipe.model.config.trained_words = ["a", "cat"]
    own_pipe("a cat", **call)
    assert caplog.messages == []
    own_pipe(["a cat", "a dog"], negative_prompt="fog", height=128, **call)
    assert sorted(message.split(":")[0] for message in caplog.messages) == [
        "The model never learned the words ['dog', 'fog']",
        "The model only learned images of 64x64 pixels",
    ]


def test_control_tokens_in_a_prompt_are_text(pipe):
    found = pipe.encode_prompt("a<|im_end|>", do_classifier_free_guidance=False)[0]
    plain = pipe.encode_prompt("a", do_classifier_free_guidance=False)[0]
    assert found.attention_mask.shape[1] > plain.attention_mask.shape[1] + 5


def test_return_dict_or_tuple(pipe):
    output = pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=seeded())
    assert isinstance(output, LatteFlowPipelineOutput)
    plain = pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=seeded(), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1 and torch.equal(plain[0], output.images)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (8, 8)])
def test_size_may_be_chosen(pipe, height, width):
    (image,) = generate(pipe, height=height, width=width, output_type="pil")
    assert image.size == (width, height)


def test_size_by_default_is_the_configuration_s(make_model, processor, vae, pipe):
    assert pipe.default_size == 64
    model = make_model(latent_patch_size=2, sample_size=12)
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    larger = LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=scheduler)
    larger.set_progress_bar_config(disable=True)
    assert larger.default_size == 96
    assert generate(larger).shape == (1, 4, 12, 12)


# The loop itself.


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_run_equals_the_loop_written_out(pipe, model, encode, guidance_scale, shift):
    steps = 6
    pipe.scheduler = LatteFlowScheduler(shift=shift, expert_boundaries=model.config.expert_boundaries)
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    context, empty = model.encode_context(**encode(PROMPT)), model.encode_context(**encode(""))
    sample = torch.randn(1, 4, 8, 8, generator=seeded())
    for timestep in stock.timesteps:
        velocity = model.predict_velocity(sample, timestep, context)
        if guidance_scale > 1:
            unconditional = model.predict_velocity(sample, timestep, empty)
            velocity = unconditional + guidance_scale * (velocity - unconditional)
        sample = stock.step(velocity, timestep, sample).prev_sample
    found = generate(pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    torch.testing.assert_close(found, sample, **CLOSE)


@pytest.mark.parametrize("num_inference_steps", [1, 5, 8])
def test_only_the_owner_s_layers_run_at_each_step(pipe, model, count_layers, num_inference_steps):
    steps: list[tuple] = []

    def note(pipe, step, timestep, tensors):
        steps.append((float(timestep), dict(calls)))
        calls.clear()
        return {}

    with count_layers(model) as calls:
        generate(pipe, num_inference_steps=num_inference_steps, callback_on_step_end=note)
    assert len(steps) == num_inference_steps
    for timestep, ran in steps:
        # K = 2 over 4 layers: the boundary is 500, and belongs below.
        assert ran == ({0: 1, 1: 1} if timestep > 500 else {2: 1, 3: 1})


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_layers_run_steps_times_layers_per_expert(pipe, model, count_layers, guidance_scale):
    with count_layers(model) as calls:
        generate(pipe, PROMPTS, num_inference_steps=7, num_images_per_prompt=2, guidance_scale=guidance_scale)
    assert sum(calls.values()) == 7 * model.config.layers_per_expert[0]


def test_steps_per_expert(pipe, model, count_layers):
    with count_layers(model) as calls:
        found = generate(pipe, steps_per_expert=[5, 2])
    assert calls == {0: 5, 1: 5, 2: 2, 3: 2}
    assert pipe.num_timesteps == 7
    assert pipe.scheduler.experts == [0] * 5 + [1] * 2
    even = generate(pipe, steps_per_expert=[2, 2])
    assert not torch.allclose(found, even, **CLOSE)
    # Uniform intervals, evenly spent: the four usual steps.
    assert torch.equal(even, generate(pipe, num_inference_steps=4))


def test_skipped_expert_never_runs(pipe, model, count_layers):
    with count_layers(model) as calls:
        generate(pipe, steps_per_expert=[3, 0])
    assert calls == {0: 3, 1: 3}


def test_progress_bar_names_the_expert(pipe, capsys):
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    generate(pipe)
    shown = capsys.readouterr().err
    assert "expert 0 of 2" in shown and "expert 1 of 2" in shown and "4/4" in shown


# Prefills.


def test_a_call_is_one_prefill_of_prompts_and_negative_prompts(pipe, prefills):
    generate(pipe, PROMPTS, num_images_per_prompt=3, generator=None)
    # Three prompts and the empty one.
    assert prefills == [4]
    prefills.clear()
    generate(pipe, PROMPTS[:2], negative_prompt=["a cross", "a blue square"], num_images_per_prompt=2, generator=None)
    assert prefills == [4]


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_without_guidance_there_is_no_unconditional_branch(pipe, model, prefills, guidance_scale):
    batches = []
    handle = model.tower.layers[0].register_forward_hook(lambda _, args, output: batches.append(len(args[0])))
    generate(pipe, PROMPTS[:2], guidance_scale=guidance_scale)
    handle.remove()
    assert prefills == [2] and set(batches) == {2}
    assert not pipe.do_classifier_free_guidance and pipe.guidance_scale == guidance_scale


def test_guidance_runs_both_branches_in_one_batch(pipe, model):
    batches = []
    handle = model.tower.layers[0].register_forward_hook(lambda _, args, output: batches.append(len(args[0])))
    generate(pipe, PROMPTS[:2], guidance_scale=2.0)
    handle.remove()
    assert set(batches) == {4} and len(batches) == 2


def test_a_call_changes_nothing_for_the_next(pipe):
    first = generate(pipe)
    generate(pipe, PROMPTS)
    assert torch.equal(generate(pipe), first)


def test_encode_prompt_is_public(pipe, model, encode):
    context, negative = pipe.encode_prompt(PROMPTS[:2])
    assert isinstance(context, LatteFlowContext) and len(context) == len(negative) == 2
    for encoded, prompts in ((context, PROMPTS[:2]), (negative, ["", ""])):
        for found, prompt in zip(encoded.split(), prompts, strict=True):
            expected = model.encode_context(**encode(prompt))
            for one, other in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.next_position, expected.next_position)
    assert pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[1] is None


# Seeds and batches.


def test_same_seed_same_image_and_another_seed_another(pipe):
    found = [generate(pipe, generator=seeded(seed), output_type="np") for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2], atol=1e-2)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_batch_equals_its_items_one_by_one(pipe, guidance_scale):
    batch = generate(pipe, PROMPTS, generator=[seeded(s) for s in range(3)], guidance_scale=guidance_scale)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(pipe, prompt, generator=seeded(row), guidance_scale=guidance_scale)
        torch.testing.assert_close(batch[row : row + 1], alone, **CLOSE)
    # Neither seeds nor prompts are shared.
    swapped = generate(pipe, PROMPTS[::-1], generator=[seeded(s) for s in range(3)], guidance_scale=guidance_scale)
    assert (swapped[0] - batch[0]).abs().max() > 1e-2


def test_several_images_of_a_prompt_stand_together(pipe):
    generators = [seeded(s) for s in range(4)]
    found = generate(pipe, PROMPTS[:2], num_images_per_prompt=2, generator=generators)
    assert found.shape[0] == 4
    for row in range(4):
        alone = generate(pipe, PROMPTS[row // 2], generator=seeded(row))
        torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)


def test_given_latents_are_the_start(pipe):
    start = torch.randn(1, 4, 8, 8, generator=seeded(3))
    before = start.clone()
    found = generate(pipe, latents=start, generator=None)
    assert torch.equal(found, generate(pipe, generator=seeded(3)))
    assert torch.equal(start, before)


# Prompts, images, conversations.


def test_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    empty, negative = generate(pipe), generate(pipe, negative_prompt="a blue square")
    assert (empty - negative).abs().max() > 1e-2
    torch.testing.assert_close(generate(pipe, negative_prompt=""), empty, **CLOSE)
    assert torch.equal(
        generate(pipe, negative_prompt="a cross", guidance_scale=1.0), generate(pipe, guidance_scale=1.0)
    )


def test_negative_prompts_go_with_their_prompts(pipe):
    negatives = ["a blue square", "a cross"]
    generators = [seeded(s) for s in range(4)]
    found = generate(pipe, PROMPTS[:2], negative_prompt=negatives, num_images_per_prompt=2, generator=generators)
    for row in range(4):
        alone = generate(pipe, PROMPTS[row // 2], negative_prompt=negatives[row // 2], generator=seeded(row))
        torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)
    one = generate(pipe, PROMPTS[:2], negative_prompt="a cross", generator=[seeded(0), seeded(1)])
    for negative in (["a cross"], ["a cross", "a cross"]):
        again = generate(pipe, PROMPTS[:2], negative_prompt=negative, generator=[seeded(0), seeded(1)])
        torch.testing.assert_close(again, one, **CLOSE)


def test_prompt_with_a_image(pipe, picture):
    seen = generate(pipe, image=picture)
    other = generate(pipe, image=picture.transpose(Image.Transpose.ROTATE_180))
    assert (seen - generate(pipe)).abs().max() > 1e-2 and (seen - other).abs().max() > 1e-2
    assert torch.equal(generate(pipe, image=[picture]), seen)
    assert torch.equal(generate(pipe, image=np.asarray(picture)), seen)


def test_images_go_with_their_prompts(pipe, picture):
    other = picture.transpose(Image.Transpose.ROTATE_180)
    generators = [seeded(0), seeded(1)]
    found = generate(pipe, PROMPTS[:2], image=[picture, other], generator=generators)
    for row, image in enumerate((picture, other)):
        alone = generate(pipe, PROMPTS[row], image=image, generator=seeded(row))
        torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)
    shared = generate(pipe, PROMPTS[:2], image=picture, generator=[seeded(0), seeded(1)])
    torch.testing.assert_close(shared[:1], found[:1], **CLOSE)
    assert (shared[1] - found[1]).abs().max() > 1e-2


def test_messages_in_place_of_a_prompt(pipe, picture):
    said = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]}
    assert torch.equal(generate(pipe, None, messages=[said]), generate(pipe, image=picture))
    conversation = [said, {"role": "assistant", "content": "a circle"}, {"role": "user", "content": "now in blue"}]
    longer = generate(pipe, None, messages=conversation)
    assert (longer - generate(pipe, None, messages=[said])).abs().max() > 1e-2
    both = generate(pipe, None, messages=[[said], conversation], generator=[seeded(0), seeded(0)])
    torch.testing.assert_close(both, torch.cat([generate(pipe, image=picture), longer]), **CLOSE)


def test_generate_is_another_name(pipe):
    assert torch.equal(
        pipe.generate(PROMPT, num_inference_steps=4, generator=seeded(), output_type="latent").images, generate(pipe)
    )


def test_chat_asks_the_same_model(pipe, model, processor):
    (generated,) = generate(pipe, output_type="pil")
    for images in (None, generated):
        answer = pipe.chat("what is this?", images, max_new_tokens=6)
        assert answer == model.chat(processor, "what is this?", images=images, max_new_tokens=6) and answer


# Callbacks.


def test_callback_sees_every_step_and_changes_latents(pipe):
    seen = []

    def look(given_pipe, step, timestep, tensors):
        assert given_pipe is pipe and set(tensors) == {"latents"}
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {}

    found = generate(pipe, callback_on_step_end=look)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == [1000.0, 750.0, 500.0, 250.0]
    assert torch.equal(seen[-1][2], found)
    zeros = generate(
        pipe, callback_on_step_end=lambda _, step, t, tensors: {"latents": torch.zeros_like(tensors["latents"])}
    )
    assert (zeros == 0).all()
    # Changed after the first step, the rest runs from there.
    moved = generate(pipe, callback_on_step_end=lambda _, s, t, tensors: {"latents": tensors["latents"] + (s == 0)})
    assert (moved - found).abs().max() > 1e-2


def test_callback_may_return_nothing(pipe):
    assert torch.equal(generate(pipe, callback_on_step_end=lambda *_: None), generate(pipe))


def test_callback_may_ask_for_no_tensors(pipe):
    seen = []
    generate(pipe, callback_on_step_end=lambda *given: seen.append(given[3]), callback_on_step_end_tensor_inputs=[])
    assert seen == [{}] * 4


def test_callback_may_interrupt(pipe, model, count_layers):
    kept = []

    def stop(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    with count_layers(model) as calls:
        found = generate(pipe, callback_on_step_end=stop)
    assert len(kept) == 2 and torch.equal(found, kept[-1])
    assert calls == {0: 2, 1: 2}
    assert pipe.interrupt
    # The next call starts afresh.
    assert torch.equal(generate(pipe), generate(pipe, callback_on_step_end=lambda *_: None)) and not pipe.interrupt


# Saving and loading.


def assert_same_components(found, expected):
    for name in ("model", "vae"):
        one, other = getattr(found, name).state_dict(), getattr(expected, name).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    # What begins with an underscore tells where a configuration is from.
    one, other = ({k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (found, expected))
    assert one == other and set(one) == {
        "num_train_timesteps",
        "shift",
        "expert_boundaries",
        "solver",
        "new_noise",
        "stochastic_sampling",
    }
    assert found.processor.chat_template == expected.processor.chat_template


@pytest.mark.parametrize("load_with", [LatteFlowPipeline, DiffusionPipeline])
def test_save_and_load_give_the_same_bytes_and_the_same_image(pipe, saved, load_with):
    loaded = load_with.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LatteFlowPipeline
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], shift=1.5)
    assert_same_components(loaded, pipe)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.vlm.parameters())
    assert np.array_equal(generate(loaded, output_type="np"), generate(pipe, output_type="np"))


def test_folder_names_modules_and_holds_safetensors_only(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "LatteFlowPipeline"
    classes = {name: index[name][1] for name in ("model", "processor", "vae", "scheduler")}
    assert classes == {
        "model": "LatteFlowForConditionalGeneration",
        "processor": "LatteFlowProcessor",
        "vae": "AutoencoderDC",
        "scheduler": "LatteFlowScheduler",
    }
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".txt"}


FRESH_PROCESS = """
import sys
import numpy as np
import torch
torch.set_num_threads(int(sys.argv[3]))
import latte_flow_hf
from diffusers import DiffusionPipeline
assert latte_flow_hf.LatteFlowPipeline
# The tables of the Auto pipelines take long to import and warn of other models.
assert "diffusers.pipelines.auto_pipeline" not in sys.modules
for number, load_with in enumerate((latte_flow_hf.LatteFlowPipeline, DiffusionPipeline)):
    pipe = load_with.from_pretrained(sys.argv[1])
    output = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    np.save(f"{sys.argv[2]}/{number}.npy", output.images)
"""


def test_same_image_in_a_fresh_process(pipe, saved, tmp_path):
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], shift=1.5)
    expected = generate(pipe, output_type="np")
    command = [sys.executable, "-c", FRESH_PROCESS, str(saved), str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for number in range(2):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), expected)


def test_components_can_be_given_on_loading(saved, make_vae):
    other = make_vae()
    assert LatteFlowPipeline.from_pretrained(saved, vae=other).vae is other


def test_pipeline_takes_another_dtype(saved):
    loaded = LatteFlowPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.model.dtype == loaded.vae.dtype == torch.bfloat16
    assert torch.isfinite(generate(loaded)).all() and generate(loaded).dtype == torch.bfloat16
    assert generate(loaded, output_type="pil")[0].size == (64, 64)


# What does not fit together.


def test_vae_with_other_channels_is_refused(pipe, model, processor, make_vae, saved):
    message = "vae has 8 latent channels, the model has 4"
    with pytest.raises(ValueError, match=message):
        LatteFlowPipeline(model=model, processor=processor, vae=make_vae(8), scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match=message):
        LatteFlowPipeline.from_pretrained(saved, vae=make_vae(8))


def test_scheduler_with_other_boundaries_is_refused(pipe, model, processor, vae, saved, prefills):
    other = LatteFlowScheduler(expert_boundaries=[1.0, 0.6, 0.0])
    message = re.escape("scheduler's expert_boundaries [1.0, 0.6, 0.0] are not the model's [1.0, 0.5, 0.0]")
    with pytest.raises(ValueError, match=message):
        LatteFlowPipeline(model=model, processor=processor, vae=vae, scheduler=other)
    with pytest.raises(ValueError, match=message):
        LatteFlowPipeline.from_pretrained(saved, scheduler=other)
    # Exchanged later, it is refused by the call.
    pipe.scheduler = other
    with pytest.raises(ValueError, match=message) as caught:
        pipe(PROMPT)
    assert "use LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)" in str(caught.value)
    assert prefills == []


# Bad input: named, and before any heavy work.


def text(words: str) -> list[dict]:
    return [{"role": "user", "content": words}]


BAD_CALLS = [
    ({}, "give either `prompt` or `messages`"),
    ({"prompt": PROMPT, "messages": text("x")}, "give either `prompt` or `messages`"),
    ({"prompt": []}, "prompt must be a string or a non-empty list of strings, got []."),
    ({"prompt": 7}, "prompt must be a string or a non-empty list of strings, got 7."),
    ({"prompt": ["a", 7]}, "prompt must be a string or a non-empty list of strings, got ['a', 7]."),
    (
        {"prompt": PROMPT, "negative_prompt": []},
        "negative_prompt must be a string or a non-empty list of strings, got [].",
    ),
    (
        {"prompt": PROMPT, "negative_prompt": 1},
        "negative_prompt must be a string or a non-empty list of strings, got 1.",
    ),
    (
        {"prompt": PROMPT, "negative_prompt": ["a", "b"]},
        "negative_prompt must be one, or one for each of 1 prompts, got 2.",
    ),
    ({"messages": []}, "messages must be a non-empty list of messages or of conversations, got []."),
    (
        {"messages": "a red circle"},
        "messages must be a non-empty list of messages or of conversations, got 'a red circle'.",
    ),
    ({"messages": [[]]}, "messages must be a string or a non-empty list of messages, got []."),
    ({"messages": [{"role": "user"}]}, "a message must be a dict with `role` and `content`, got {'role': 'user'}."),
    ({"messages": [text("x"), []]}, "got []."),
    ({"messages": text("x"), "image": np.zeros((8, 8, 3), np.uint8)}, "`image` goes with `prompt`"),
    ({"prompt": PROMPT, "image": np.zeros((8, 8, 3), np.int64)}, "an image must be a PIL image, a path, a URL"),
    ({"prompt": PROMPT, "image": np.full((8, 8, 3), 2.0)}, "float values must be from 0 to 1, got 2 to 2"),
    ({"prompt": PROMPT, "image": 7}, "or floats from 0 to 1, got int."),
    ({"prompt": "a \ud800"}, "half of a surrogate pair at position 2"),
    ({"prompt": PROMPT, "height": True}, "height must be a positive multiple of 8, got True."),
    ({"prompt": PROMPT, "num_images_per_prompt": True}, "num_images_per_prompt must be a positive integer, got True."),
    ({"prompt": PROMPTS, "image": [None, None]}, "image must be one, or one for each of 3 prompts, got 2."),
    ({"prompt": PROMPT, "height": 60}, "height must be a positive multiple of 8, got 60."),
    ({"prompt": PROMPT, "width": 65}, "width must be a positive multiple of 8, got 65."),
    ({"prompt": PROMPT, "height": 0}, "height must be a positive multiple of 8, got 0."),
    ({"prompt": PROMPT, "width": 0}, "width must be a positive multiple of 8, got 0."),
    ({"prompt": PROMPT, "height": -64}, "height must be a positive multiple of 8, got -64."),
    ({"prompt": PROMPT, "width": 64.0}, "width must be a positive multiple of 8, got 64.0."),
    ({"prompt": PROMPT, "height": "64"}, "height must be a positive multiple of 8, got '64'."),
    ({"prompt": PROMPT, "num_inference_steps": 0}, "num_inference_steps must be a positive whole number, got 0."),
    ({"prompt": PROMPT, "num_inference_steps": -4}, "num_inference_steps must be a positive whole number, got -4."),
    ({"prompt": PROMPT, "num_inference_steps": 2.5}, "num_inference_steps must be a positive whole number, got 2.5."),
    ({"prompt": PROMPT, "steps_per_expert": [1]}, "steps_per_expert must be 2 whole numbers"),
    ({"prompt": PROMPT, "steps_per_expert": [0, 3]}, "got [0, 3]."),
    ({"prompt": PROMPT, "steps_per_expert": [3, -1]}, "got [3, -1]."),
    ({"prompt": PROMPT, "steps_per_expert": 4}, "steps_per_expert must be 2 whole numbers, one for each expert"),
    ({"prompt": PROMPT, "num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer, got 0."),
    ({"prompt": PROMPT, "num_images_per_prompt": 1.5}, "num_images_per_prompt must be a positive integer, got 1.5."),
    (
        {"prompt": PROMPT, "output_type": "jpeg"},
        "output_type must be one of ['pil', 'np', 'pt', 'latent'], got 'jpeg'.",
    ),
    ({"prompt": PROMPT, "output_type": None}, "output_type must be one of ['pil', 'np', 'pt', 'latent'], got None."),
    ({"prompt": PROMPTS, "generator": [seeded()] * 2}, "generator must be one, or one for each of 3 images, got 2."),
    (
        {"prompt": PROMPTS, "generator": (seeded(),) * 2},
        "generator must be one, or one for each of 3 images, got 2.",
    ),
    ({"prompt": PROMPTS, "generator": []}, "generator must be one, or one for each of 3 images, got 0."),
    ({"messages": [text("a"), text("b")], "generator": [seeded()]}, "one for each of 2 images, got 1."),
    ({"prompt": PROMPT, "num_images_per_prompt": 2, "generator": [seeded()]}, "one for each of 2 images, got 1."),
    ({"prompt": PROMPT, "generator": 7}, "generator must be"),
    (
        {"prompt": PROMPT, "latents": torch.zeros(1, 4, 8, 9)},
        "latents must be of shape (1, 4, 8, 8), got (1, 4, 8, 9).",
    ),
    ({"prompt": PROMPT, "latents": [0.0]}, "latents must be a tensor of shape (1, 4, 8, 8), got list."),
    (
        {"prompt": PROMPTS, "latents": torch.zeros(1, 4, 8, 8)},
        "latents must be of shape (3, 4, 8, 8), got (1, 4, 8, 8).",
    ),
    ({"prompt": PROMPT, "guidance_scale": float("nan")}, "guidance_scale must be"),
    ({"prompt_embeds": torch.zeros(1, 4, 8)}, "prompt_embeds is not supported; use context, from `encode_prompt`"),
    ({"prompt": PROMPT, "negative_prompt_embeds": 1}, "negative_prompt_embeds is not supported; use negative_context"),
    (
        {"prompt": PROMPT, "joint_attention_kwargs": {}},
        "joint_attention_kwargs is not supported; use attention_kwargs",
    ),
    ({"prompt": PROMPT, "attention_kwargs": {"scale": 0.5}}, "attention_kwargs['scale'] is 0.5, but no adapter"),
    ({"prompt": PROMPT, "attention_kwargs": {"gligen": 1}}, "must be a dict with at most 'scale', got {'gligen': 1}."),
    ({"prompt": PROMPT, "strength": 0.5}, "strength is not supported; use LatteFlowImg2ImgPipeline.from_pipe(pipe)"),
    ({"prompt": PROMPT, "mask_image": 1}, "mask_image is not supported; use LatteFlowInpaintPipeline.from_pipe(pipe)"),
    ({"prompt": PROMPT, "context_image": 1}, "context_image is not supported; use image, instead."),
    ({"prompt": PROMPT, "attention_kwargs": 0.5}, "must be a dict with at most 'scale', got 0.5."),
    ({"prompt": PROMPT, "attention_kwargs": {"scale": float("nan")}}, "must be a finite number, got nan."),
    ({"prompt": PROMPT, "attention_kwargs": {"scale": True}}, "must be a finite number, got True."),
    ({"prompt": PROMPT, "guidance_scale": "high"}, "guidance_scale must be"),
    ({"prompt": PROMPT, "callback_on_step_end_tensor_inputs": ["noise"]}, "must be among ['latents'], got ['noise']."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_named_before_any_heavy_work(pipe, prefills, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(**arguments)
    assert prefills == []


def test_unknown_arguments_are_a_type_error_and_empty_foreign_ones_are_ignored(pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        pipe(prompts=PROMPT)
    assert torch.equal(generate(pipe, prompt_embeds=None, attention_kwargs={"scale": 1.0}), generate(pipe))


def test_file_that_is_no_image_is_named(pipe, prefills, text_file):
    message = re.escape(f"image {str(text_file)!r} cannot be read")
    part = {"type": "image", "image": str(text_file)}
    for arguments in (
        {"prompt": PROMPT, "image": str(text_file)},
        {"prompt": PROMPTS, "image": text_file},
        {"messages": [{"role": "user", "content": [part]}]},
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    assert prefills == []
