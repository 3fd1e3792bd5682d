# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A folder of images from many prompts, by all processes, resumed by running it again.

There is no list of finished images. The name of an image's file contains a digest of everything the image depends on,
and files are written atomically, so an image is finished if its file exists and was not cut since.
"""

import hashlib
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils.torch_utils import get_device
from PIL import Image
from tqdm.auto import tqdm

from ..files import check_output, is_whole_png
from .fingerprint import pipeline_fingerprint
from .image_metadata import record_call, record_pipeline, write_metadata


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line. Blank lines are skipped and not counted: the numbers of the prompts,
    and so their seeds, are the same with and without them.

    Raises:
        `ValueError`: if it is not UTF-8, or contains no prompt.
        `OSError`: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path} is not a text file in UTF-8: {error}") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {path} contains no prompt; write one per line.")
    return prompts


def check_image_folder(folder: Path) -> None:
    """
    Raises:
        `ValueError`: if `folder` has the extension of an image.
        `OSError`: if it is a file, or images cannot be written there.
    """
    if folder.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"output must be a folder for many prompts, got {str(folder)!r}.")
    check_output(folder / "image.png", replace=True)


def image_name(number: int, prompt: str, seed: int, model: Any, call: dict[str, Any]) -> str:
    """`00003-a-red-circle-5d41402abc4b.png`: the number, the prompt's first words, and a digest of all arguments;
    `model` is a `pipeline_fingerprint`."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"
    arguments = json.dumps([prompt, seed, model, call], sort_keys=True)
    return f"{number:05d}-{words}-{hashlib.sha256(arguments.encode()).hexdigest()[:12]}.png"


def start_processes(pipe: Any, device: str | None) -> PartialState:
    """The group of processes that `accelerate launch` started, or this one alone; the pipeline is moved to the device
    of this process, or to `device` if it is alone."""
    # Without an accelerator, processes form a group only if `cpu` is set. The first one to end waits for the last,
    # whose share may take longer than the half hour after which torch gives up.
    state = PartialState(cpu=(device or get_device()) == "cpu", timeout=timedelta(days=7))
    pipe.to(device if device is not None and state.num_processes == 1 else state.device)
    return state


def generate_seeded(pipe: Any, prompts: list[str], seeds: list[int], **call: Any) -> list[Image.Image]:
    """One image for each prompt, in one batch, from the noise of its seed."""
    # On the CPU, so that the noise is the same for every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, **call).images


def generate_images(
    pipe: Any,
    prompts: list[str],
    folder: Path,
    seed: int = 0,
    num_images_per_prompt: int = 1,
    batch_size: int = 1,
    device: str | None = None,
    adapter_names: dict[str, str] | None = None,
    **call: Any,
) -> tuple[int, int]:
    """Generate the images that do not exist yet. With `accelerate launch`, each process generates its share.

    Image i belongs to prompt i // num_images_per_prompt and starts from the noise of seed + i, on any device. It is
    identified by its number, prompt, seed, `call`, and the pipeline itself: the weights, the active adapters and their
    strengths, the configurations of the components (see `pipeline_fingerprint`). With another adapter or scheduler,
    images are generated beside those that exist. Each file says how to make it again (see [`read_metadata`]).

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline; it is moved to the device.
        prompts (`list[str]`): see [`read_prompts`].
        folder (`Path`): made if it does not exist; it must be shared by all processes.
        seed (`int`, defaults to 0): the seed of the first image.
        num_images_per_prompt (`int`, defaults to 1): the number of images of each prompt.
        batch_size (`int`, defaults to 1): the number of images in a batch. 1 makes each image independent of the
            others, bit for bit; larger batches are faster on an accelerator and equal up to rounding.
        device (`str`, *optional*): where a single process runs; several processes run on the accelerator of each, or
            all of them on the CPU. Defaults to the accelerator if there is one.
        adapter_names (`dict[str, str]`, *optional*): what to call loaded adapters in the metadata of the files.
        call: further arguments of the pipeline, numbers and strings only, e.g. `num_inference_steps=20`.

    Returns:
        `tuple[int, int]`: the number of images that all processes generated, and of those that existed.

    Raises:
        `ValueError`: if an argument is invalid, before anything is written.
        `OSError`: if `folder` is a file, or cannot be written to.
    """
    check_image_folder(folder)
    for name, number in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    state = start_processes(pipe, device)
    prompt_of_image = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    model = pipeline_fingerprint(pipe)
    paths = [folder / image_name(i, prompt, seed + i, model, call) for i, prompt in enumerate(prompt_of_image)]
    missing = [i for i, path in enumerate(paths) if not is_whole_png(path)]
    # No process may write before all of them have listed what is missing, or their lists would differ.
    state.wait_for_everyone()
    record = record_pipeline(pipe, adapter_names, model) if missing else None
    with state.split_between_processes(missing) as share:
        starts = range(0, len(share), batch_size)
        for start in tqdm(starts, desc="generating", disable=not state.is_local_main_process):
            batch = share[start : start + batch_size]
            images = generate_seeded(pipe, [prompt_of_image[i] for i in batch], [seed + i for i in batch], **call)
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in zip(batch, images):
                assert record is not None
                write_metadata(
                    image,
                    record_call(pipe, record, prompt_of_image[i], seed + i, batch_size=len(batch), **call),
                    paths[i],
                )
    state.wait_for_everyone()
    return len(missing), len(paths) - len(missing)
