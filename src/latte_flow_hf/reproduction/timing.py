# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Time and operations per image, of all variants in one process.

The variants take turns, so that whatever else the machine does meets all of them. A ratio of times is computed within
a round.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .machine import device_name, package_versions
from .plan import RUNS_FOLDER, Plan
from .runs import MODEL_FOLDER, SAMPLE_PROMPTS, load_pipeline
from .settings import TimingSettings


TIMING_FILE = "timing.json"


def measure_timing(folder: Path, plan: Plan) -> dict[str, Any]:
    """Measure the models of the first seed.

    Args:
        folder (`Path`): the output folder, whose runs are finished.
        plan ([`Plan`]): its plan.

    Returns:
        `dict`: `flops` by variant (see `count_flops`); `rounds`, by batch size and variant a list of
        `{"wall", "cpu"}`, seconds per image; `num_threads`, `device`, `versions` and the `load_average` of the last
        minute, this process included.
    """
    settings, seed = plan.settings.timing, plan.settings.seeds[0]
    pipes = {
        variant.name: load_pipeline(folder / RUNS_FOLDER / f"{variant.name}-seed-{seed}" / MODEL_FOLDER, plan)
        for variant in plan.settings.variants
    }
    # Without PyTorch's own threads on a CPU: matrices this small gain nothing from them, and waiting threads count.
    with num_threads(1) if plan.device == "cpu" else num_threads(torch.get_num_threads()):
        return {
            "plan": plan.id,
            "flops": {name: count_flops(pipe, settings) for name, pipe in pipes.items()},
            "rounds": {str(size): measure_rounds(pipes, size, settings) for size in settings.batch_sizes},
            "num_threads": torch.get_num_threads(),
            "device": device_name(plan.device),
            "versions": package_versions(),
            "load_average": os.getloadavg()[0],
        }


def is_current(timing: dict[str, Any], plan: Plan) -> bool:
    """Whether times are of this plan, and of this version, which notes the load of the machine."""
    return timing.get("plan") == plan.id and "load_average" in timing


def waiting_share(timing: dict[str, Any]) -> float:
    """The share of the measured time (0 to 1) in which the process had no processor: others had it. For one thread on
    a CPU; on an accelerator the process waits for that one."""
    items = [item for rounds in timing["rounds"].values() for runs in rounds.values() for item in runs]
    cpu, wall = (math.fsum(item[clock] for item in items) for clock in ("cpu", "wall"))
    return max(0.0, 1 - cpu / wall)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """The threads of PyTorch inside; restored on exit, since they decide the bits of later results."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate_batch(pipe: Any, batch_size: int, num_inference_steps: int, guidance_scale: float) -> None:
    """Images of one prompt, decoded."""
    generators = [torch.Generator().manual_seed(index) for index in range(batch_size)]
    pipe(
        SAMPLE_PROMPTS[0],
        num_images_per_prompt=batch_size,
        generator=generators,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()


def count_flops(pipe: Any, settings: TimingSettings) -> dict[str, int]:
    """The operations of one image; a multiplication and an addition are two.

    Returns:
        `dict`: `image`, all of it; `step`, one sampling step with its guidance; `loop`, all steps. A step is half of
        what an image takes more if two steps are added for each expert; the rest is the prompt and the decoder.
    """

    def count(num_inference_steps: int) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            generate_batch(pipe, 1, num_inference_steps, settings.guidance_scale)
        return counter.get_total_flops()

    few, many = settings.num_inference_steps, 2 * settings.num_inference_steps
    # The unconditional context is kept between calls.
    generate_batch(pipe, 1, few, settings.guidance_scale)
    image = count(few)
    loop = count(many) - image
    return {"image": image, "loop": loop, "step": round(loop / few)}


def measure_rounds(pipes: dict[str, Any], batch_size: int, settings: TimingSettings) -> dict[str, list[dict]]:
    """Seconds per image, one entry for each round; every round begins with another variant."""
    call = (batch_size, settings.num_inference_steps, settings.guidance_scale)
    for pipe in pipes.values():
        generate_batch(pipe, *call)
    names = list(pipes)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for index in range(settings.num_rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            cpu, wall = time.process_time(), time.perf_counter()
            generate_batch(pipes[name], *call)
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            results[name].append({clock: value / batch_size for clock, value in seconds.items()})
    return results
