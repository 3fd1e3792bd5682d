# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Requests that come and go get the images that the pipeline gives each of them alone.

The oracle is always `pipe(...)` itself. Most tests call `tick` by hand, so that what runs together is known.
"""

import copy
import dataclasses
import random
import threading
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from peft import get_peft_model
from PIL import Image

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.serving import Engine, EngineClosedError, GenerationError, ImageRequest, Preview, QueueFullError
from latte_flow_hf.serving.chat import ChatRequest
from latte_flow_hf.serving.engine import FairLock
from latte_flow_hf.training import expert_lora_config


def assert_same(found, expected) -> None:
    """Within 1e-5 of the largest value: latents of random models with strong guidance are far larger than 1."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape and (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1.0)


def latents_of(**arguments) -> ImageRequest:
    return ImageRequest(**{"output_type": "latent", "num_inference_steps": 4, **arguments})


def run(engine: Engine, requests: list[ImageRequest], order: random.Random | None = None) -> list:
    """All results, in the order of the requests, which arrive all at once or at random times."""
    waiting, futures = list(enumerate(requests)), {}
    while waiting or not all(future.done() for future in futures.values()):
        while waiting and (order is None or order.random() < 0.4):
            number, request = waiting.pop(0)
            futures[number] = engine.submit(request)
        engine.tick()
    return [futures[number].result().images for number in range(len(requests))]


def assert_equals_alone(alone, pipe, engine, requests, order=None):
    expected = [alone(pipe, request) for request in requests]
    for found, images in zip(run(engine, requests, order), expected, strict=True):
        assert_same(found, images)


SOURCE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.where(np.arange(64)[:, None] < [32] * 64, 255, 0).astype(np.uint8))

MIXED = [
    latents_of(prompt="a red circle", seed=1),
    latents_of(prompt="a blue square above a green cross", seed=2, num_inference_steps=7, guidance_scale=7.5),
    latents_of(prompt="a cross", seed=3, guidance_scale=1.0),
    latents_of(prompt="a red circle", seed=4, num_images=3, guidance_scale=[3.0, 1.0]),
    latents_of(prompt="a triangle", seed=5, height=32, width=48),
    latents_of(prompt="a triangle", negative_prompt="a red circle left of a cross", seed=6, num_inference_steps=1),
    latents_of(prompt="a white square", seed=7, num_inference_steps=None, steps_per_expert=[3, 1]),
    latents_of(prompt="a yellow cross", seed=8, num_inference_steps=9, guidance_interval=(0.3, 0.7)),
    latents_of(prompt="a yellow cross", seed=9, height=32, width=48, num_inference_steps=6),
    latents_of(prompt="a cross", seed=11, source_image=SOURCE, num_inference_steps=8, strength=0.4),
    latents_of(prompt="a cross", seed=12, source_image=SOURCE, mask_image=MASK, num_inference_steps=6, num_images=2),
]


# The same images.


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_images_equal_those_of_the_pipeline_alone(pipe, picture, seed, alone):
    requests = [*MIXED, latents_of(prompt="this one in red", image=picture, seed=10)]
    order = None if seed is None else random.Random(seed)
    assert_equals_alone(alone, pipe, Engine(pipe, max_images=8), requests, order)


def schedulers(boundaries) -> dict:
    return {
        "heun": LatteFlowScheduler(expert_boundaries=boundaries, solver="heun"),
        "new noise": LatteFlowScheduler(expert_boundaries=boundaries, new_noise=[0.5, 1.0]),
        "shift": LatteFlowScheduler(expert_boundaries=boundaries, shift=3.0),
        "unipc": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    }


@pytest.mark.parametrize("name", ["heun", "new noise", "shift", "unipc"])
def test_each_image_has_its_own_solver(pipe, name, alone):
    pipe.scheduler = schedulers(pipe.model.config.expert_boundaries)[name]
    requests = [request for request in MIXED if name != "unipc" or request.steps_per_expert is None]
    assert_equals_alone(alone, pipe, Engine(pipe), requests, random.Random(2))


@pytest.mark.parametrize("mode", ["probabilities", None])
def test_each_kind_of_attention_hides_the_padding(make_model, processor, vae, mode, alone):
    model = make_model(residual_attention=mode)
    pipe = LatteFlowPipeline(model, processor, vae, LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0]))
    pipe.set_progress_bar_config(disable=True)
    assert_equals_alone(alone, pipe, Engine(pipe), MIXED[:4])


def test_an_image_without_company_is_equal_bit_for_bit(pipe, alone):
    for request in MIXED[:3]:
        ((found,),) = run(Engine(pipe), [request])
        assert torch.equal(found, alone(pipe, request)[0])


def test_images_are_of_the_type_that_is_asked_for(pipe):
    arguments = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 1}
    requests = [ImageRequest(**arguments), ImageRequest(**arguments, output_type="pt")]
    (image,), (pixels,) = run(Engine(pipe), requests)
    expected = pipe(
        "a red circle", num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(1)
    ).images[0]
    assert_same([pixels], [expected])
    assert image.size == (pixels.shape[2], pixels.shape[1]) and image.mode == "RGB"


def test_experts_may_be_off_loaded(own_pipe, alone):
    expected = [alone(own_pipe, request) for request in MIXED[:4]]
    own_pipe.enable_expert_offload("cpu")
    found = run(Engine(own_pipe), MIXED[:4])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_other_off_loading_is_refused(own_pipe):
    own_pipe.enable_group_offload("cpu", offload_type="leaf_level")
    with pytest.raises(ValueError, match="without off-loading"):
        Engine(own_pipe)


# One step of many.


def test_a_step_runs_one_expert_for_all_its_images_at_once(pipe, model, count_layers):
    engine = Engine(pipe)
    steps = []
    engine.on_step = lambda expert, num_images, seconds: steps.append((expert, num_images))
    futures = [engine.submit(latents_of(prompt="a cross", seed=seed)) for seed in range(3)]
    engine.tick()
    late = engine.submit(latents_of(prompt="a cross", seed=3))
    with count_layers(model) as calls:
        engine.tick()
    # The late one joins at once, at its own timestep.
    assert steps == [(0, 3), (0, 4)] and calls == dict.fromkeys(model.expert_layers(0), 1)
    while engine.tick():
        pass
    assert all(future.done() for future in [*futures, late])
    assert sum(num_images for _, num_images in steps) == 16 and len(steps) < 12


def test_the_batch_of_the_first_image_goes_first(pipe):
    """Two experts: when the first image reaches the second one, those that came later wait, up to `patience` ticks."""
    engine, steps = Engine(pipe, patience=4), []
    engine.on_step = lambda expert, num_images, seconds: steps.append((expert, num_images))
    first = engine.submit(latents_of(prompt="a cross", num_inference_steps=4))
    engine.tick()
    later = engine.submit(latents_of(prompt="a cross", num_inference_steps=4, num_images=2))
    while not first.done():
        engine.tick()
    assert steps == [(0, 1), (0, 3), (1, 1), (1, 1)]
    while not later.done():
        engine.tick()
    assert steps[4:] == [(0, 2), (1, 2), (1, 2)]


def test_nobody_starves(pipe):
    """An image of another size comes after one with many steps, which would keep its place for all of them."""
    engine = Engine(pipe, max_images=8, patience=3)
    long = engine.submit(latents_of(prompt="a cross", num_inference_steps=200))
    other = engine.submit(latents_of(prompt="a cross", height=32, width=32))
    num_ticks = 0
    while not other.done():
        engine.tick()
        num_ticks += 1
        assert num_ticks < 40
    # Passed over for `patience` ticks and one before each of its 4 steps.
    assert num_ticks == 4 * (3 + 2) and not long.done()
    engine.close(finish=False)


def test_memory_is_limited_by_the_number_of_images(pipe):
    engine = Engine(pipe, max_images=3)
    futures = [engine.submit(latents_of(prompt="a cross", num_images=2)) for _ in range(3)]
    most = 0
    while engine.tick():
        most = max(most, engine.num_running)
    assert most == 2 and all(len(future.result().images) == 2 for future in futures)
    with pytest.raises(ValueError, match="num_images must be at most 3, got 4"):
        engine.submit(latents_of(prompt="a cross", num_images=4))


def test_the_queue_has_an_end(pipe):
    engine = Engine(pipe, max_images=1, max_waiting=2)
    for _ in range(2):
        engine.submit(latents_of(prompt="a cross"))
    with pytest.raises(QueueFullError):
        engine.submit(latents_of(prompt="a cross"))
    engine.tick()
    engine.submit(latents_of(prompt="a cross"))


# Leaving, and errors.


def test_cancelled_requests_are_dropped_at_the_next_tick(pipe, alone):
    engine = Engine(pipe, max_images=3)
    kept, gone, waiting = (engine.submit(latents_of(prompt="a cross", seed=seed, num_images=2)) for seed in range(3))
    extra = engine.submit(latents_of(prompt="a cross", seed=9))
    engine.tick()
    assert engine.num_running == 2 and engine.num_waiting == 3
    assert gone.cancel() and waiting.cancel()
    engine.tick()
    assert engine.num_running == 3 and engine.num_waiting == 0
    assert extra.cancel()
    engine.tick()
    assert engine.num_running == 2
    while engine.tick():
        pass
    assert_same(kept.result().images, alone(pipe, latents_of(prompt="a cross", num_images=2)))
    with pytest.raises(CancelledError):
        gone.result()
    assert not engine.batches.images and not engine._job_of


INVALID = [
    (latents_of(prompt="a cross", height=33), "height must be a positive multiple"),
    (latents_of(prompt="a cross", guidance_scale=[1.0]), "guidance_scale must be"),
    (latents_of(prompt="a cross", steps_per_expert=[1, 1]), None),
    (latents_of(), "give either `prompt` or `messages`"),
    (latents_of(prompt="a cross", image="no such file"), "cannot be read"),
    (latents_of(prompt="a cross", adapter="style"), "adapter must be one of"),
    (latents_of(prompt="a cross", strength=0.5), "need a source_image"),
    (latents_of(prompt="a cross", source_image=SOURCE, strength=0.0), "strength must be"),
    (latents_of(prompt="a cross", source_image=SOURCE, mask_image=SOURCE.resize((8, 8))), "mask_image must be"),
    (latents_of(prompt=["a cross"]), "prompt must be one string"),
]


def test_invalid_requests_do_not_disturb_others(pipe, alone):
    engine = Engine(pipe)
    good = engine.submit(MIXED[0])
    engine.tick()
    bad = [(engine.submit(request), message) for request, message in INVALID if message is not None]
    while engine.tick():
        pass
    for future, message in bad:
        with pytest.raises(ValueError, match=message):
            future.result(timeout=0)
    assert_same(good.result().images, alone(pipe, MIXED[0]))


def test_a_failed_image_does_not_take_the_others_along(pipe):
    """Guidance this strong leaves the range of float32; the others share every batch with it, and the decoding."""
    broken = ImageRequest(prompt="a cross", seed=1, num_inference_steps=4, guidance_scale=3e38, num_images=2)
    others = [dataclasses.replace(MIXED[0], output_type="pt"), dataclasses.replace(broken, guidance_scale=4.0)]
    engine = Engine(pipe)
    futures = [engine.submit(request) for request in (broken, *others)]
    while engine.tick():
        pass
    with pytest.raises(GenerationError, match="not finite"):
        futures[0].result()
    assert torch.isfinite(futures[1].result().images[0]).all() and len(futures[2].result().images) == 2
    assert not engine._job_of


def test_a_batch_that_fails_is_tried_image_by_image(own_pipe, alone):
    """A hook stands for a device whose memory holds two images with guidance."""

    def limited(module, args):
        if len(args[0]) > 4:
            raise MemoryError("out of memory")

    requests = [latents_of(prompt="a cross", seed=seed, num_images=1) for seed in range(3)]
    expected = [alone(own_pipe, request) for request in requests]
    own_pipe.model.tower.layers[0].register_forward_pre_hook(limited)
    found = run(Engine(own_pipe), requests)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_previews_approach_the_image(pipe):
    engine, events = Engine(pipe), []
    request = latents_of(prompt="a cross", num_inference_steps=8, num_previews=3, num_images=2)
    future = engine.submit(request, events.append)
    while engine.tick():
        pass
    assert events[0] is None and [(event.image, event.number) for event in events[1:]] == [
        (image, number) for number in range(3) for image in range(2)
    ]
    assert all(isinstance(event, Preview) for event in events[1:])
    final = future.result().images[0]
    distances = [float((event.preview - final).norm()) for event in events[1:] if event.image == 0]
    assert distances == sorted(distances, reverse=True)


# Threads.


def test_the_thread_serves_many_and_finishes_before_it_closes(pipe, alone):
    engine = Engine(pipe)
    engine.start()
    expected = [alone(pipe, request) for request in MIXED]
    futures = [engine.submit(request) for request in MIXED]
    engine.close()
    for future, images in zip(futures, expected, strict=True):
        assert_same(future.result(timeout=0).images, images)
    with pytest.raises(EngineClosedError):
        engine.submit(MIXED[0])


def test_closing_can_cancel(pipe):
    engine = Engine(pipe)
    engine.start()
    future = engine.submit(latents_of(prompt="a cross", num_inference_steps=1000))
    engine.close(finish=False)
    assert future.cancelled() and not engine.is_alive


def test_a_fair_lock_is_given_in_the_order_of_asking():
    lock, order, started = FairLock(), [], []

    def ask(number):
        with lock:
            order.append(number)

    with lock:
        for number in range(5):
            started.append(threading.Thread(target=ask, args=(number,)))
            started[-1].start()
            while len(lock._waiting) <= number:
                pass
    for thread in started:
        thread.join()
    assert order == list(range(5))


def test_chats_and_images_take_turns(pipe, picture, alone):
    conversation = pipe.processor.conversation("what is this?", picture)
    expected_text = pipe.chat(conversation, max_new_tokens=12)
    expected_image = alone(pipe, MIXED[1])
    engine, pieces, steps = Engine(pipe), [], []
    engine.on_step = lambda expert, num_images, seconds: steps.append(len(pieces))
    chats = [engine.submit(ChatRequest(conversation, max_new_tokens=12), pieces.append) for _ in range(2)]
    image = engine.submit(MIXED[1])
    engine.start()
    wait([*chats, image], timeout=60)
    for chat in chats:
        answer = chat.result(timeout=0)
        assert answer.text == expected_text and 0 < answer.num_tokens <= 12 and answer.num_prompt_tokens > 16
    assert_same(image.result(timeout=0).images, expected_image)
    engine.close()
    assert len(steps) == 7


# Adapters.


@pytest.fixture(scope="module")
def base(make_model):
    return make_model(num_experts=2)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A folder of random adapters: of the first expert, of the second, of both; and one folder that is none."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, experts) in enumerate({"early": [0], "late": [1], "both": [0, 1]}.items()):
        torch.manual_seed(seed)
        config = expert_lora_config(base, experts, r=2, init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / name)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def adapted(base, adapters, processor, vae, alone):
    """A pipeline of its own, and a function that gives the image of a request by a pipeline with its adapter."""

    def make() -> LatteFlowPipeline:
        pipe = LatteFlowPipeline(
            copy.deepcopy(base), processor, vae, LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0])
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def expected(request: ImageRequest) -> list[torch.Tensor]:
        pipe = make()
        if request.adapter is not None:
            pipe.load_lora_weights(adapters / request.adapter)
        return alone(pipe, request)

    return make(), expected


def test_adapters_are_never_mixed_up(adapted, adapters):
    pipe, expected = adapted
    names = [None, "early", "late", "both", "late", None, "early"]
    requests = [
        latents_of(prompt="a red circle", seed=seed, adapter=name, num_inference_steps=4 + seed % 3)
        for seed, name in enumerate(names)
    ]
    engine = Engine(pipe, adapters=adapters)
    assert engine.adapters() == ["both", "early", "late"]
    found = run(engine, requests, random.Random(3))
    for request, images in zip(requests, found, strict=True):
        assert_same(images, expected(request))
    assert not torch.allclose(found[0][0], expected(dataclasses.replace(requests[0], adapter="late"))[0], atol=1e-3)


def test_the_adapter_that_was_not_used_for_longest_is_dropped(adapted, adapters):
    pipe, expected = adapted
    engine = Engine(pipe, adapters=adapters, max_adapters=2)
    for name in ("early", "late", "early", "both"):
        run(engine, [latents_of(prompt="a cross", adapter=name)])
    assert engine.adapter_cache.loaded == ["early", "both"] and set(pipe._adapters()) == {"early", "both"}
    # Those in use are not dropped: the third waits until there is room.
    requests = [latents_of(prompt="a cross", adapter=name, seed=1) for name in ("early", "both", "late")]
    found = run(engine, requests)
    for request, images in zip(requests, found, strict=True):
        assert_same(images, expected(request))
    assert len(engine.adapter_cache.loaded) == 2 and "late" in engine.adapter_cache.loaded


def test_adapters_of_the_pipeline_stay_active_beside_others(adapted, adapters, alone):
    pipe, _ = adapted
    pipe.load_lora_weights(adapters / "early", adapter_name="house")
    requests = [latents_of(prompt="a cross", adapter=name) for name in (None, "late")]
    expected = alone(pipe, requests[0])
    pipe.load_lora_weights(adapters / "late", adapter_name="other")
    pipe.set_adapters(["house", "other"])
    both = alone(pipe, requests[0])
    pipe.delete_adapters("other")
    pipe.set_adapters("house")
    found = run(Engine(pipe, adapters=adapters), requests)
    assert_same([images[0] for images in found], [expected[0], both[0]])


def test_names_of_adapters_are_no_paths(adapted, adapters):
    engine = Engine(adapted[0], adapters=adapters / "early")
    assert engine.adapters() == []
    future = engine.submit(latents_of(prompt="a cross", adapter="../late"))
    engine.tick()
    with pytest.raises(ValueError, match="adapter must be one of"):
        future.result(timeout=0)


@pytest.mark.parametrize("name", ["max_images", "max_waiting", "max_chats", "max_adapters", "patience"])
def test_limits_out_of_range_are_refused(pipe, name):
    with pytest.raises(ValueError, match="must"):
        Engine(pipe, **{name: -1})
