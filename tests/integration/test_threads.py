# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One pipeline in several threads: overlapping calls give the images of calls one after the other, bit for bit.

A barrier in the callbacks makes calls overlap: no call takes its next step before all others have taken theirs.
"""

import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.hooks import apply_layerwise_casting
from PIL import Image

from latte_flow_hf import (
    LatteFlowImg2ImgPipeline,
    LatteFlowInpaintPipeline,
    LatteFlowPipeline,
    LatteFlowScheduler,
)
from latte_flow_hf.training import expert_lora_config


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CALLS = [
    {"prompt": "a red circle", "num_inference_steps": 4},
    {"prompt": "a small blue square above a handwritten seven", "num_inference_steps": 9, "guidance_scale": 7.0},
    {"prompt": ["a cross", "a"], "num_inference_steps": 6, "guidance_scale": [3.0, 1.0]},
    {"prompt": "a green square", "steps_per_expert": [5, 2], "guidance_scale": 1.0},
]


def generate(pipe, **call) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


def together(*functions) -> list:
    """The results of the functions, each in a thread of its own; the first error is raised."""
    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [threads.submit(function) for function in functions]
        return [future.result(timeout=120) for future in futures]


def overlapping(pipes, calls, steps: int = 4) -> list[torch.Tensor]:
    """The latents of all calls, which wait for each other after each of their first steps."""
    barrier = threading.Barrier(len(calls))

    def wait(pipe, step, timestep, tensors):
        if step < steps:
            barrier.wait(timeout=60)

    return together(
        *(lambda p=p, c=c: generate(p, **c, callback_on_step_end=wait) for p, c in zip(pipes, calls, strict=True))
    )


def schedulers(model) -> list:
    boundaries = model.config.expert_boundaries
    return [
        LatteFlowScheduler(expert_boundaries=boundaries, new_noise=0.5),
        LatteFlowScheduler(expert_boundaries=boundaries, solver="heun"),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        FlowMatchHeunDiscreteScheduler(),
    ]


@pytest.mark.parametrize("index", range(5))
def test_overlapping_calls_equal_serial_ones(pipe, model, index):
    pipe.scheduler = schedulers(model)[index]
    calls = [
        call for call in CALLS if "steps_per_expert" not in call or isinstance(pipe.scheduler, LatteFlowScheduler)
    ]
    expected = [generate(pipe, **call) for call in calls]
    found = overlapping([pipe] * len(calls), calls)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_pipelines_that_share_components_may_overlap(pipe):
    expected = [generate(pipe, **call) for call in CALLS]
    pipes = [pipe, *(LatteFlowPipeline.from_pipe(pipe) for _ in CALLS[1:])]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
    assert len({id(each.scheduler) for each in pipes}) == 1
    assert all(torch.equal(*pair) for pair in zip(overlapping(pipes, CALLS), expected, strict=True))


def test_all_pipelines_together(pipe, picture):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    pipes = [pipe, LatteFlowImg2ImgPipeline.from_pipe(pipe), LatteFlowInpaintPipeline.from_pipe(pipe)] * 2
    sources = [{}, {"image": picture}, {"image": picture, "mask_image": mask}]
    calls = [
        {**source, "prompt": prompt, "num_inference_steps": steps}
        for prompt, steps in (("a red circle", 8), ("a cross", 5))
        for source in sources
    ]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
    expected = [generate(p, **call) for p, call in zip(pipes, calls, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(overlapping(pipes, calls), expected, strict=True))


def test_many_calls_from_a_pool(pipe):
    expected = [generate(pipe, **call) for call in CALLS]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda call: generate(pipe, **call), CALLS * 4))
    assert all(torch.equal(*pair) for pair in zip(found, expected * 4, strict=True))


def test_chats_and_images_together(pipe, picture):
    questions = [("what is this?", picture), ("how many?", None), ("a longer question about it", picture)]
    answers = [pipe.chat(text, image, max_new_tokens=8) for text, image in questions]
    image = generate(pipe, **CALLS[0])
    functions = [lambda q=q: pipe.chat(*q, max_new_tokens=8) for q in questions]
    for _ in range(3):
        *found, latents = together(*functions, lambda: generate(pipe, **CALLS[0]))
        assert found == answers and torch.equal(latents, image)


# What belongs to a call.


def test_a_call_uses_a_copy_of_the_scheduler(pipe):
    scheduler = pipe.scheduler
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((len(pipe.scheduler.timesteps), pipe.scheduler.step_index, float(timestep)))
        assert pipe.scheduler is not scheduler and len(scheduler.timesteps) == 1000
        assert pipe.components["scheduler"] is pipe.scheduler

    generate(pipe, **CALLS[0], callback_on_step_end=look)
    # Callbacks see the scheduler of their call.
    assert seen == [(4, 1, 1000.0), (4, 2, 750.0), (4, 3, 500.0), (4, 4, 250.0)]
    # Afterwards it shows the steps of the last call.
    assert pipe.scheduler is scheduler and scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]


def test_a_scheduler_set_during_a_call_is_for_the_next(pipe):
    first, other = generate(pipe, **CALLS[0]), LatteFlowScheduler(expert_boundaries=[1.0, 0.5, 0.0], shift=3.0)

    def exchange(pipe, step, timestep, tensors):
        pipe.scheduler = other

    assert torch.equal(generate(pipe, **CALLS[0], callback_on_step_end=exchange), first)
    assert pipe.scheduler is other and not torch.equal(generate(pipe, **CALLS[0]), first)


def test_attributes_are_those_of_the_thread_s_call(pipe):
    seen: dict[int, set] = {}
    barrier = threading.Barrier(2)

    def look(pipe, step, timestep, tensors):
        barrier.wait(timeout=60)
        values = (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt)
        seen.setdefault(threading.get_ident(), set()).add(values)

    def call(**arguments):
        generate(pipe, prompt="a cross", num_inference_steps=3, callback_on_step_end=look, **arguments)
        return pipe.num_timesteps, pipe.guidance_scale

    assert together(lambda: call(guidance_scale=2.0), lambda: call(guidance_scale=1.0)) == [(3, 2.0), (3, 1.0)]
    assert sorted(map(sorted, seen.values())) == [[(3, 1.0, False, False)], [(3, 2.0, True, False)]]
    with pytest.raises(AttributeError, match="guidance_scale"):
        _ = pipe.guidance_scale


@pytest.mark.parametrize("closure", [False, True])
def test_a_callback_changes_its_own_call_only(pipe, closure):
    alone = {"prompt": "a red circle", "num_inference_steps": 6, "guidance_scale": 3.0}
    expected = generate(pipe, **alone)
    unguided = generate(pipe, **{**alone, "guidance_scale": [3.0, 1.0]})
    barrier = threading.Barrier(3)

    def wait(*_):
        barrier.wait(timeout=60)

    def end_guidance(given, step, timestep, tensors):
        if step == 2:
            (pipe if closure else given)._guidance_scale = 1.0
        barrier.wait(timeout=60)

    def interrupt(given, step, timestep, tensors):
        barrier.wait(timeout=60)
        if step == 1:
            (pipe if closure else given)._interrupt = True
            barrier.abort()

    def until_abort(callback):
        def called(*arguments):
            # The third call has ended.
            with contextlib.suppress(threading.BrokenBarrierError):
                callback(*arguments)

        return called

    first, second, third = together(
        lambda: generate(pipe, **alone, callback_on_step_end=until_abort(wait)),
        lambda: generate(pipe, **alone, callback_on_step_end=until_abort(end_guidance)),
        lambda: generate(pipe, **alone, callback_on_step_end=until_abort(interrupt)),
    )
    assert torch.equal(first, expected) and torch.equal(second, unguided)
    assert not torch.equal(third, expected)
    assert torch.equal(generate(pipe, **alone), expected)


def test_another_thread_interrupts_all_calls(pipe):
    started, interrupted = threading.Barrier(3), threading.Event()
    steps = []

    def wait(pipe, step, timestep, tensors):
        steps.append(step)
        started.wait(timeout=60)
        interrupted.wait(timeout=60)

    def press_stop():
        started.wait(timeout=60)
        pipe._interrupt = True
        interrupted.set()

    together(*[lambda: generate(pipe, **CALLS[0], callback_on_step_end=wait)] * 2, press_stop)
    assert steps == [0, 0]


def test_a_callback_may_call_its_pipeline(pipe):
    expected, inner = generate(pipe, **CALLS[1]), []

    def call_again(pipe, step, timestep, tensors):
        if step == 2:
            inner.append(generate(pipe, **CALLS[0]))
        assert pipe.num_timesteps == 9 and pipe.guidance_scale == 7.0

    assert torch.equal(generate(pipe, **CALLS[1], callback_on_step_end=call_again), expected)
    assert torch.equal(inner[0], generate(pipe, **CALLS[0]))


def test_a_failed_call_leaves_nothing_behind(pipe):
    expected, scheduler = generate(pipe, **CALLS[0]), pipe.scheduler

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generate(pipe, **CALLS[0], callback_on_step_end=fail)
    assert pipe.scheduler is scheduler and torch.equal(generate(pipe, **CALLS[0]), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_used_pipeline_can_be_copied(pipeline, clone):
    # Its own model: one whose hidden states were asked for has hooks of transformers that cannot be pickled.
    pipe = LatteFlowPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    expected = generate(pipe, **CALLS[0])
    assert torch.equal(generate(clone(pipe), **CALLS[0]), expected)


# What two threads cannot share.


def test_a_call_that_scales_adapters_has_the_model_alone(own_pipe):
    own_pipe.model.add_adapter(expert_lora_config(own_pipe.model, [0, 1], r=2, init_lora_weights=False), "style")
    full = generate(own_pipe, **CALLS[0])
    scaled = {**CALLS[0], "attention_kwargs": {"scale": 0.5}}
    expected = generate(own_pipe, **scaled)
    other = LatteFlowImg2ImgPipeline.from_pipe(own_pipe)
    errors = []

    def try_in_another_thread(call):
        def callback(pipe, step, timestep, tensors):
            if step == 1:
                for each in (own_pipe, other):
                    with pytest.raises(ValueError, match="attention_kwargs") as caught:
                        together(lambda each=each: call(each))
                    errors.append(str(caught.value))

        return callback

    sources = {"image": Image.new("RGB", (64, 64))}

    def plain(pipe):
        generate(pipe, **CALLS[0], **(sources if pipe is other else {}))

    def with_scale(pipe):
        generate(pipe, **scaled, **(sources if pipe is other else {}))

    assert torch.equal(generate(own_pipe, **scaled, callback_on_step_end=try_in_another_thread(plain)), expected)
    assert torch.equal(generate(own_pipe, **CALLS[0], callback_on_step_end=try_in_another_thread(with_scale)), full)
    assert len(errors) == 4 and all("LatteFlowForConditionalGeneration is in use by another" in e for e in errors)
    # One after the other, from any thread; nothing is left of the refused calls.
    assert torch.equal(*together(lambda: generate(own_pipe, **scaled)), expected)
    assert torch.equal(*together(lambda: generate(own_pipe, **CALLS[0])), full)


def enable_layerwise_casting(pipe):
    apply_layerwise_casting(pipe.model.tower.layers, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_expert_offload("cpu"),
        lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
        enable_layerwise_casting,
    ],
    ids=["experts", "groups", "casting"],
)
def test_a_second_call_is_refused_where_weights_move(own_pipe, enable):
    enable(own_pipe)
    expected = generate(own_pipe, **CALLS[0])
    # Another pipeline with the same model.
    other = LatteFlowPipeline(**own_pipe.components)
    second_calls = [
        lambda: generate(own_pipe, **CALLS[1]),
        lambda: generate(other, **CALLS[1]),
        lambda: own_pipe.chat("what?", max_new_tokens=2),
    ]
    errors = []

    def try_in_another_thread(pipe, step, timestep, tensors):
        if step == 1:
            for call in second_calls:
                with pytest.raises(ValueError, match="is in use by another thread") as caught:
                    together(call)
                errors.append(str(caught.value))
            # The thread of the call itself may use the pipeline.
            pipe.chat("what?", max_new_tokens=2)

    assert torch.equal(generate(own_pipe, **CALLS[0], callback_on_step_end=try_in_another_thread), expected)
    assert len(errors) == 3 and all(
        error.startswith("LatteFlowForConditionalGeneration is in use") for error in errors
    )
    # One after the other, from any thread.
    assert torch.equal(*together(lambda: generate(other, **CALLS[0])), expected)
