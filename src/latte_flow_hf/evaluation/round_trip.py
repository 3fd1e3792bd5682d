# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The round trip: an image is generated from a prompt, and the same model says what it sees in it.

Descriptions are compared by what they mean: `a circle left of a square` and `a square right of a circle` agree.
"""

from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..tinyworld.oracle import find_errors, read_digit, read_scene
from ..tinyworld.questions import parse_prompt
from ..tinyworld.shapes import Scene
from .tinyworld import answer_questions, check_world


QUESTION = "what is in the picture?"


def parse_description(text: str) -> Scene | int | None:
    """The canonical scene, or the digit's value, that a description means; `None` if it is none of the tiny world.
    Capital letters and a full stop do not matter."""
    try:
        content = parse_prompt(text.strip().lower().removesuffix("."))
    except ValueError:
        return None
    return content.canonical if isinstance(content, Scene) else content


def make_round_trip(
    pipe: Any, prompts: dict[str, list[str]], seed: int, batch_size: int = 50, **call: Any
) -> dict[str, dict[str, Any]]:
    """Generate one image for each prompt, ask the same model what it sees, and compare its answer with the prompt and
    with what the oracle reads.

    Args:
        pipe ([`LatteFlowPipeline`]): a pipeline of the tiny world.
        prompts (`dict`): lists of prompts by kind, see [`tinyworld.generation_prompts`].
        seed (`int`): image i of a kind is generated from the noise of seed + i, the same images as in
            [`tinyworld.evaluate_generation`].
        batch_size (`int`, defaults to 50): the number of images generated, and of questions answered, at once.
        call: further arguments of the pipeline, such as `guidance_scale` and `num_inference_steps`.

    Returns:
        `dict`: by kind,

            - `count`: the number of prompts.
            - `agreement`: the share of answers that agree with the prompt, 0 to 1.
            - `oracle_accuracy`: the share of images that show what the prompt describes according to the oracle.
            - `oracle_agreement`, `oracle_count`: the share of answers that agree with what the oracle reads, among the
              images in which it reads something.
            - `table`: the number of images that are right or wrong according to the oracle, by whether the answer
              agrees with the prompt: `{"right": {"agrees", "differs"}, "wrong": {"agrees", "differs"}}`.
            - `differing`: index, prompt, answer and `errors` (see `find_errors`) of each that is wrong or differs.

    Raises:
        `ValueError`: if the pipeline is of another world, or a prompt is not of this one.
    """
    check_world(pipe)
    expected = {kind: [parse_description(prompt) for prompt in items] for kind, items in prompts.items()}
    for kind, items in prompts.items():
        for prompt, content in zip(items, expected[kind]):
            if content is None:
                raise ValueError(f"prompt {prompt!r} of {kind!r} is not a prompt of the tiny world.")
        if not items:
            raise ValueError(f"prompts of {kind!r} are empty.")
    results = {}
    for kind, items in prompts.items():
        rows = []
        for start in tqdm(range(0, len(items), batch_size), desc=f"round trip: {kind}"):
            batch = items[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
            images = pipe(batch, generator=generators, **call).images
            answers = answer_questions(pipe, [(image, QUESTION) for image in images])
            for index, (prompt, image, answer) in enumerate(zip(batch, images, answers), start):
                rows.append(_compare(index, prompt, image, answer, expected[kind][index]))
        results[kind] = _summarize(rows)
    return results


def _compare(index: int, prompt: str, image: Image.Image, answer: str, expected: Scene | int | None) -> dict[str, Any]:
    reading = read_scene(image) if isinstance(expected, Scene) else read_digit(image)
    said = parse_description(answer)
    return {
        "index": index,
        "prompt": prompt,
        "answer": answer,
        "errors": list(find_errors(image, prompt)),
        "agrees": said == expected,
        # `None` if the oracle reads nothing.
        "agrees_with_oracle": None if reading is None else said == reading,
    }


def _summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = {"right": {"agrees": 0, "differs": 0}, "wrong": {"agrees": 0, "differs": 0}}
    for row in rows:
        table["wrong" if row["errors"] else "right"]["agrees" if row["agrees"] else "differs"] += 1
    read = [row["agrees_with_oracle"] for row in rows if row["agrees_with_oracle"] is not None]
    return {
        "count": len(rows),
        "agreement": sum(row["agrees"] for row in rows) / len(rows),
        "oracle_accuracy": sum(not row["errors"] for row in rows) / len(rows),
        "oracle_agreement": sum(read) / len(read) if read else None,
        "oracle_count": len(read),
        "table": table,
        "differing": [
            {name: row[name] for name in ("index", "prompt", "answer", "errors")}
            for row in rows
            if row["errors"] or not row["agrees"]
        ],
    }
