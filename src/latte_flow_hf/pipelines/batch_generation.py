# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Many prompts -> a folder of pictures, by all processes, going on where it was stopped.

What is unusual here: there is no list of what is done. A picture's file name holds a digest of all that it depends on,
and the file appears whole or not at all: it is there, or it is still to be painted.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils.torch_utils import get_device
from PIL import Image
from tqdm.auto import tqdm

from ..files import save_image


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines at its end do not count.

    Raises:
        `ValueError`: if it is not UTF-8, holds no prompt, or a line between prompts is blank: it would shift the
            numbers, and with them the seeds, of those that follow as soon as someone removes it.
        `OSError`: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path} is not a text file in UTF-8: {error}") from error
    prompts = [line.strip() for line in text.rstrip().split("\n")]
    if prompts == [""]:
        raise ValueError(f"prompts {path} holds no prompt; write one a line.")
    if "" in prompts:
        raise ValueError(f"prompts {path}: line {prompts.index('') + 1} is blank; remove it.")
    return prompts


def check_image_folder(folder: Path) -> None:
    """
    Raises:
        `ValueError`: if `folder` is a file, or is called like a picture.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder for many prompts, and {folder} is a file.")
    if folder.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"output must be a folder for many prompts, got {str(folder)!r}.")


def image_name(number: int, prompt: str, seed: int, model: str, call: dict[str, Any]) -> str:
    """`00003-a-red-circle-5d41402abc4b.png`: the number, the prompt's first words, a digest of all arguments."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"
    depends_on = json.dumps([prompt, seed, model, call], sort_keys=True)
    return f"{number:05d}-{words}-{hashlib.sha256(depends_on.encode()).hexdigest()[:12]}.png"


def generate_images(
    pipe: Any,
    prompts: list[str],
    folder: Path,
    seed: int = 0,
    num_images_per_prompt: int = 1,
    batch_size: int = 1,
    **call: Any,
) -> tuple[int, int]:
    """Paint what is not there yet. Under `accelerate launch` each process paints its share.

    Picture i, of prompt i // num_images_per_prompt, starts from the noise of seed + i, whatever paints it. It is known
    by its number, prompt, seed, `call`, and the name by which the pipeline was loaded: another model that is loaded by
    the same name needs another folder.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline; it goes to the process's own device.
        prompts (`list[str]`): see [`read_prompts`].
        folder (`Path`): made if it is not there; on a disk that all processes share.
        seed (`int`, defaults to 0): of the first picture.
        num_images_per_prompt (`int`, defaults to 1): pictures of each prompt.
        batch_size (`int`, defaults to 1): how many go through at once. With 1 a picture has the same bits in whatever
            company it comes; more is faster on an accelerator and equal up to rounding.
        call: further arguments of the pipeline, numbers and words alone, e.g. `num_inference_steps=20`.

    Returns:
        `tuple[int, int]`: how many pictures all processes painted, and how many were there.

    Raises:
        `ValueError`: if `folder` is a file, or an argument is not the pipeline's, before anything is written.
    """
    check_image_folder(folder)
    for name, number in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    # Without an accelerator, processes find each other only if told that there is none.
    state = PartialState(cpu=get_device() == "cpu")
    pipe.to(state.device)
    asked = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    model = str(pipe.config.get("_name_or_path", ""))
    paths = [folder / image_name(i, prompt, seed + i, model, call) for i, prompt in enumerate(asked)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    # Before any process paints, all of them have looked: their lists, which are shared out, are the same.
    state.wait_for_everyone()
    with state.split_between_processes(missing) as share:
        for start in tqdm(range(0, len(share), batch_size), desc="painting", disable=not state.is_local_main_process):
            batch = share[start : start + batch_size]
            # On the CPU, so that every device starts from the same noise.
            generators = [torch.Generator().manual_seed(seed + i) for i in batch]
            images = pipe([asked[i] for i in batch], generator=generators, **call).images
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in zip(batch, images):
                save_image(image, paths[i])
    state.wait_for_everyone()
    return len(missing), len(paths) - len(missing)
