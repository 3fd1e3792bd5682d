# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How much of the tiny world a checkpoint knows: prompts painted and read back by the oracle, questions answered.

Prompts and pictures come from seeds that no training uses, held-out digits and pairs among them.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..tinyworld.digits import digit_indices, digit_prompt, draw_digit, load_digits
from ..tinyworld.oracle import shows
from ..tinyworld.questions import questions_about
from ..tinyworld.shapes import Scene, draw_scene, place_objects, sample_scene


# Training draws from its recipe's seed; this offset keeps the evaluation's generators apart from it.
_EVALUATION = 1_000_003


def generation_prompts(seed: int, one: int = 100, two: int = 200, held_out: int = 100, digits: int = 100) -> dict:
    """Prompts by kind: `one` and `two` objects, two with a held-out colour-shape pair, handwritten digits."""
    rng = np.random.default_rng((_EVALUATION, seed))
    return {
        "one object": [sample_scene(rng, 1).prompt for _ in range(one)],
        "two objects": [sample_scene(rng, 2).prompt for _ in range(two)],
        "held-out pair": [sample_scene(rng, 2, held_out=True).prompt for _ in range(held_out)],
        "digit": [digit_prompt(int(rng.integers(10))) for _ in range(digits)],
    }


def evaluate_generation(
    pipe: Any,
    prompts: dict,
    seed: int,
    batch_size: int = 50,
    judge: Callable[[Image.Image, str], bool] = shows,
    **call: Any,
) -> dict:
    """Paint every prompt once and read the pictures back.

    Args:
        pipe ([`LatteFlowPipeline`]): what paints.
        prompts (`dict`): lists of prompts by kind, as of `generation_prompts`.
        seed (`int`): picture i of a kind starts from the noise of seed + i.
        batch_size (`int`): pictures painted at once.
        judge (*optional*): says whether a picture shows what a prompt asks for; the oracle of the embedded world.
        call: more arguments of the pipeline, such as `guidance_scale` and `num_inference_steps`.

    Returns:
        `dict`: by kind, `right` (share, 0 to 1), `count`, and `wrong` (prompt and index of each failure).
    """
    results = {}
    for kind, asked in prompts.items():
        wrong = []
        for start in tqdm(range(0, len(asked), batch_size), desc=f"painting: {kind}"):
            batch = asked[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
            images = pipe(batch, generator=generators, **call).images
            judged = zip(range(start, start + len(batch)), batch, images)
            wrong += [{"index": i, "prompt": prompt} for i, prompt, image in judged if not judge(image, prompt)]
        results[kind] = {"right": 1 - len(wrong) / len(asked), "count": len(asked), "wrong": wrong}
    return results


def evaluate_variety(pipe: Any, prompt: str, seeds: int = 16, **call: Any) -> dict:
    """Whether one prompt gives different pictures: how many of `seeds` differ, and how far apart the closest two are.

    The distance is the mean absolute difference of all pixels, in 0 to 255.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    images = pipe(prompt, num_images_per_prompt=seeds, generator=generators, **call).images
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    distances = [np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]]
    return {
        "prompt": prompt,
        "pictures": seeds,
        "different": len({image.tobytes() for image in images}),
        "closest": float(min(distances)),
    }


def understanding_questions(seed: int, scenes: int = 200) -> dict[str, list[tuple[Image.Image, str, str, str]]]:
    """(picture, question, answer, kind of question): about new drawings, and about every held-out digit."""
    rng = np.random.default_rng((_EVALUATION, seed, 1))
    about_shapes, about_digits = [], []
    for index in range(scenes):
        scene: Scene = sample_scene(rng, 1 + index % 2)
        picture = draw_scene(scene, place_objects(scene, rng))
        about_shapes += [(picture, asked.question, asked.answer, asked.kind) for asked in questions_about(scene, rng)]
    for index in digit_indices(held_out=True):
        picture, value = draw_digit(int(index)), int(load_digits()[1][index])
        about_digits += [(picture, asked.question, asked.answer, asked.kind) for asked in questions_about(value, rng)]
    return {"shapes": about_shapes, "held-out digits": about_digits}


def evaluate_understanding(pipe: Any, questions: dict, batch_size: int = 64) -> dict:
    """Ask every question (greedy decoding) and count the answers that are right to the letter.

    Returns:
        `dict`: by subject, `right` (share), `count`, `kinds` (share by kind of question) and `wrong`.
    """
    results = {}
    for subject, asked in questions.items():
        by_kind: dict[str, list[bool]] = defaultdict(list)
        wrong = []
        for start in tqdm(range(0, len(asked), batch_size), desc=f"asking: {subject}"):
            batch = asked[start : start + batch_size]
            conversations = [pipe.processor.conversation(question, picture) for picture, question, _, _ in batch]
            inputs = pipe.processor.encode_conversations(conversations).to(pipe.model.device)
            tokens = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=24)
            said = pipe.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (_, question, answer, kind), words in zip(batch, said):
                by_kind[kind].append(words.strip() == answer)
                if words.strip() != answer:
                    wrong.append({"question": question, "answer": answer, "said": words.strip()})
        results[subject] = {
            "right": 1 - len(wrong) / len(asked),
            "count": len(asked),
            "kinds": {kind: float(np.mean(right)) for kind, right in sorted(by_kind.items())},
            "wrong": wrong,
        }
    return results
