# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Follows the two guides that train in minutes, as written, and counts and draws what comes out.

    python docs/figures/follow_guides.py add_a_class
    python docs/figures/follow_guides.py train_from_a_vlm

The code of the page runs block by block in a temporary folder. Printed are the processor time and how many images are
right, by the oracle of the tiny world; the page's figure is written beside this file.
"""

import argparse
import os
import re
import shlex
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from latte_flow_cli import app
from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts
from latte_flow_hf.tinyworld.oracle import read_scene, shows
from latte_flow_hf.tinyworld.shapes import ALL_OBJECTS, Scene, WiderObject


FOLDER = Path(__file__).parent
GUIDES = FOLDER.parent / "guides"
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def follow(guide: str) -> None:
    """Run the blocks of a page in the current folder: Python, titled files, and `latte-flow` commands."""
    names: dict = {"__name__": "guide"}
    for kind, title, block in BLOCK.findall((GUIDES / f"{guide}.md").read_text()):
        if kind == "python":
            exec(compile(block, guide, "exec"), names)
        elif kind == "yaml":
            Path(title).write_text(block)
        elif kind == "sh":
            for line in block.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                if program != "latte-flow":
                    raise ValueError(f"{guide} has the command {line!r}; only latte-flow runs here.")
                if app(arguments, standalone_mode=False):
                    raise RuntimeError(f"{guide}: {line!r} failed.")


def generate(pipe: LatteFlowPipeline, prompts: list[str], first_seed: int = 0) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(first_seed + number) for number in range(len(prompts))]
    return pipe(prompts, generator=generators).images


def draw(images: list[Image.Image], num_columns: int, name: str) -> None:
    width, height = images[0].size
    sheet = Image.new("RGB", (num_columns * width, -(-len(images) // num_columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % num_columns * width, number // num_columns * height))
    sheet.save(FOLDER / name)


def count_add_a_class() -> None:
    pipe = LatteFlowPipeline.from_pretrained("with-stars")
    pipe.set_progress_bar_config(disable=True)
    prompt = Scene((WiderObject("yellow", "star"),)).prompt
    images = generate(pipe, [prompt] * 16)
    scenes = [read_scene(image, WiderObject) for image in images]
    num_right = sum(scene is not None and scene.prompt == prompt for scene in scenes)
    print(f"{prompt}: {num_right} of {len(images)} seeds are right")
    results = evaluate_generation(pipe, generation_prompts(2, one=4, two=4, held_out=4, digits=4), seed=2)
    num_right = sum(round(result["accuracy"] * result["count"]) for result in results.values())
    print(f"old prompts: {num_right} of {sum(result['count'] for result in results.values())} images are right")
    draw(images, 8, "add-a-class.png")


def count_train_from_a_vlm() -> None:
    pipe = LatteFlowPipeline.from_pretrained("my-checkpoint")
    pipe.set_progress_bar_config(disable=True)
    prompts = [Scene((item,)).prompt for item in ALL_OBJECTS]
    images = generate(pipe, prompts)
    both = [*images, *generate(pipe, prompts, first_seed=len(prompts))]
    num_right = sum(shows(image, prompt) for image, prompt in zip(both, prompts * 2, strict=True))
    print(f"{num_right} of {len(both)} images are right, two of each prompt")
    draw(images, 6, "train-from-a-vlm.png")


COUNTS = {"add_a_class": count_add_a_class, "train_from_a_vlm": count_train_from_a_vlm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guide", choices=COUNTS)
    options = parser.parse_args()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.process_time()
        follow(options.guide)
        print(f"the guide took {time.process_time() - start:.0f} processor seconds")
        COUNTS[options.guide]()
        os.chdir(before)


if __name__ == "__main__":
    main()
