# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Where the time of one image goes: a call of the pipeline, divided into the functions that it runs.

The functions are timed at their classes, each without what it calls, so that the parts add up to the call. A timer
costs about a microsecond: parts that are called hundreds of times would look slower than they are, so none is.
"""

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.image_processor import VaeImageProcessor

from latte_flow_hf import (
    LatteFlowForConditionalGeneration,
    LatteFlowPipeline,
    LatteFlowScheduler,
)
from latte_flow_hf.modeling.modeling_latte_flow import (
    LatteFlowHead,
    LatteFlowLatentEmbedding,
    LatteFlowLayer,
    LatteFlowTower,
)
from latte_flow_hf.modeling.processing_latte_flow import LatteFlowProcessorMixin

from .scenarios import EmbeddedCheckpoint, LatteFlow, materialize
from .suite import Suite


# In the order of a call. What none of them covers is `REST`.
PARTS: tuple[tuple[str, tuple[tuple[type, str], ...]], ...] = (
    ("chat template, tokens", ((LatteFlowProcessorMixin, "encode_conversations"),)),
    ("prefill", ((LatteFlowForConditionalGeneration, "encode_context"),)),
    ("contexts of the prompts", ((LatteFlowPipeline, "encode_prompt"),)),
    ("positions and masks", ((LatteFlowForConditionalGeneration, "latent_layout"),)),
    ("modulation", ((LatteFlowForConditionalGeneration, "modulate"),)),
    ("latent embedding", ((LatteFlowLatentEmbedding, "forward"),)),
    ("layers", ((LatteFlowLayer, "forward"),)),
    ("head", ((LatteFlowHead, "forward"),)),
    ("rest of a velocity", ((LatteFlowForConditionalGeneration, "predict_velocity"), (LatteFlowTower, "forward"))),
    ("solver", ((LatteFlowScheduler, "set_timesteps"), (LatteFlowScheduler, "step"))),
    ("decoding", ((AutoencoderDC, "decode"),)),
    ("pixels to images", ((LatteFlowPipeline, "decode_latents"), (VaeImageProcessor, "postprocess"))),
)
REST = "rest: checks, state of the call, loop"


@contextlib.contextmanager
def timed_parts(
    parts: Sequence[tuple[str, Sequence[tuple[type, str]]]] = PARTS, now: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, float]]:
    """Time functions inside the block.

    Args:
        parts: the name of each part, and its functions: a class, and the name of the method.
        now: the clock, in seconds.

    Yields:
        `dict[str, float]`: seconds spent in each part so far, without the parts that it calls.
    """
    seconds: dict[str, float] = defaultdict(float)
    # The part that runs, below those that called it, and when it began or went on.
    running: list[str] = [REST]
    since = now()

    def switch() -> None:
        nonlocal since
        switched = now()
        seconds[running[-1]] += switched - since
        since = switched

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            switch()
            running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return wrapped

    originals = [(owner, name, vars(owner)[name]) for _, functions in parts for owner, name in functions]
    for part, functions in parts:
        for owner, name in functions:
            setattr(owner, name, timed(vars(owner)[name], part))
    try:
        yield seconds
    finally:
        switch()
        for owner, name, original in originals:
            setattr(owner, name, original)


def time_parts(suite: Suite, name: str) -> dict[str, float]:
    """The parts of an image of one scenario, measured in this process, `num_rounds` times with and without timers.

    Args:
        suite ([`Suite`]): the suite.
        name (`str`): a scenario of kind `latte_flow` or `embedded`.

    Returns:
        `dict[str, float]`: seconds by part, and of a whole image without timers as `image`, each the median.

    Raises:
        `ValueError`: if there is no such scenario, it is of another kind, or the device is a GPU, where functions
            return before their work is done.
    """
    scenarios = {key: item for key, item in suite.build_scenarios().items() if type(item) in TIMED}
    if name not in scenarios:
        raise ValueError(f"parts can be timed of the scenarios {list(scenarios)}, got {name!r}.")
    if torch.device(suite.device).type != "cpu":
        raise ValueError(f"parts can be timed on the device cpu, got {suite.device!r}; use torch.profiler on a GPU.")
    with num_threads(suite.num_threads):
        return _time_parts(suite, scenarios[name])


@contextlib.contextmanager
def num_threads(number: int | None) -> Iterator[None]:
    """Use this number of threads inside the block; torch's own number if `None`."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_parts(suite: Suite, scenario: LatteFlow) -> dict[str, float]:
    networks = scenario.build_networks()
    materialize(networks, {}, suite.device, getattr(torch, suite.dtype))
    generate = scenario.prepare(networks, compiled=scenario.compile)

    now = time.process_time if suite.clock == "cpu" else time.perf_counter

    def run() -> float:
        start = now()
        generate(scenario.num_steps, lambda part: None)
        return now() - start

    for _ in range(suite.num_warmup_calls):
        run()
    images, parts = [], []
    for _ in range(suite.num_rounds):
        images.append(run())
        with timed_parts(now=now) as seconds:
            run()
        parts.append(dict(seconds))
    names = [*(part for part, _ in PARTS), REST]
    medians = {part: statistics.median(item.get(part, 0.0) for item in parts) for part in names}
    return {**medians, "image": statistics.median(images)}


TIMED = (LatteFlow, EmbeddedCheckpoint)


def parts_to_markdown(parts: dict[str, float]) -> str:
    """A row per part, with its share of their sum."""
    total = sum(seconds for part, seconds in parts.items() if part != "image")
    lines = ["| part | ms | share |", "|---|---|---|"]
    for part, seconds in parts.items():
        if part != "image":
            lines.append(f"| {part} | {1000 * seconds:.4g} | {seconds / total:.1%} |")
    return "\n".join([*lines, f"| whole image, without timers | {1000 * parts['image']:.4g} | |"]) + "\n"
