# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Evaluation on the tiny world: generated images are checked by the oracle, answers by exact match.

Prompts and images are sampled from seeds that are not used in training, and include held-out digits and pairs.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..modeling.context import unknown_words
from ..tinyworld.digits import digit_indices, digit_prompt, draw_digit, load_digits
from ..tinyworld.oracle import ERRORS, find_errors
from ..tinyworld.questions import QuestionAnswer, questions_about
from ..tinyworld.shapes import (
    ALL_OBJECTS,
    IMAGE_SIZE,
    RELATIONS,
    Scene,
    draw_scene,
    place_objects,
    sample_scene,
)


# Part of the seed, so that the generators differ from those of training, which are seeded by a recipe's seed.
_EVALUATION = 1_000_003

# GenEval's categories, as far as this world has them, with the errors that an image must not have. Counting is not
# among them: no prompt of this world says a number.
_PRESENT = ("missing", "extra", "shape")
_OF_TWO = {
    "two objects": _PRESENT,
    "position": (*_PRESENT, "relation"),
    "colour attribution": (*_PRESENT, "colour"),
}
CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "one object": {"single object": _PRESENT, "colours": (*_PRESENT, "colour")},
    "two objects": _OF_TWO,
    "held-out pair": _OF_TWO,
    "digit": {"digits": ("digit",)},
}


def check_world(pipe: Any) -> None:
    """Refuse a pipeline that cannot know the tiny world, before images are generated.

    Raises:
        `ValueError`: if its images are of another size, or it was trained on other words.
    """
    if pipe.default_size != IMAGE_SIZE:
        raise ValueError(
            f"the tiny world has images of {IMAGE_SIZE}x{IMAGE_SIZE}, and this model generates "
            f"{pipe.default_size}x{pipe.default_size}: it is of another world. Use `latte-flow evaluate generate` "
            "and the benchmarks that it is for."
        )
    texts = [Scene((item,)).prompt for item in ALL_OBJECTS] + [digit_prompt(value) for value in range(10)]
    unknown = unknown_words([*texts, *RELATIONS], pipe.model.trained_words)
    if unknown:
        raise ValueError(
            f"this model was trained on another world: it does not know the words {', '.join(sorted(set(unknown)))}."
        )


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
    prompts: dict[str, list[str]],
    seed: int,
    batch_size: int = 50,
    is_correct: Callable[[Image.Image, str], bool] | None = None,
    **call: Any,
) -> dict:
    """Generate one image for each prompt and check whether it shows what the prompt describes.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        prompts (`dict`): lists of prompts by kind, see `generation_prompts`.
        seed (`int`): image i of a kind is generated from the noise of seed + i.
        batch_size (`int`, defaults to 50): the number of images generated at once.
        is_correct (`Callable`, *optional*): whether an image shows what a prompt describes; defaults to the oracle.
        call: further arguments of the pipeline, such as `guidance_scale` and `num_inference_steps`.

    Returns:
        `dict`: by kind, `accuracy` (0 to 1), `count`, and `wrong` (index and prompt of each failure). With the oracle,
            `wrong` also has the `errors` of each (see `find_errors`), and there are `errors` (the number of images
            that have each) and `categories` (the accuracy in GenEval's, see `CATEGORIES`; unlike there, an object
            that was not asked for is an error in each of them).
    """
    results = {}
    for kind, kind_prompts in prompts.items():
        wrong: list[dict[str, Any]] = []
        for start in tqdm(range(0, len(kind_prompts), batch_size), desc=f"generating: {kind}"):
            batch = kind_prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
            images = pipe(batch, generator=generators, **call).images
            for index, (prompt, image) in enumerate(zip(batch, images), start):
                if is_correct is None:
                    if errors := find_errors(image, prompt):
                        wrong.append({"index": index, "prompt": prompt, "errors": list(errors)})
                elif not is_correct(image, prompt):
                    wrong.append({"index": index, "prompt": prompt})
        count = len(kind_prompts)
        results[kind] = {"accuracy": 1 - len(wrong) / count, "count": count, "wrong": wrong}
        if is_correct is None:
            results[kind] |= _describe_errors([item["errors"] for item in wrong], count, CATEGORIES.get(kind, {}))
    return results


def _describe_errors(
    errors_of_wrong: list[list[str]], count: int, categories: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, float]]:
    numbers = Counter(name for errors in errors_of_wrong for name in errors)
    return {
        "errors": {name: numbers[name] for name in ERRORS if numbers[name]},
        "categories": {
            name: 1 - sum(not set(relevant).isdisjoint(errors) for errors in errors_of_wrong) / count
            for name, relevant in categories.items()
        },
    }


def evaluate_variety(pipe: Any, prompt: str, num_images: int = 16, **call: Any) -> dict:
    """Generate several images of one prompt and compare them.

    Returns:
        `dict`: `num_distinct`, the number of distinct images, and `min_distance` and `mean_distance`, the smallest
        and the mean over all pairs of the mean absolute difference between their pixels (0 to 255).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
    images = pipe(prompt, num_images_per_prompt=num_images, generator=generators, **call).images
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    distances = [np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]]
    return {
        "prompt": prompt,
        "num_images": num_images,
        "num_distinct": len({image.tobytes() for image in images}),
        "min_distance": float(min(distances)),
        "mean_distance": float(np.mean(distances)),
    }


def understanding_questions(seed: int, num_scenes: int = 200) -> dict[str, list[tuple[Image.Image, QuestionAnswer]]]:
    """Images with questions by subject: new scenes, and all held-out digits."""
    rng = np.random.default_rng((_EVALUATION, seed, 1))
    shapes, digits = [], []
    for index in range(num_scenes):
        scene = sample_scene(rng, 1 + index % 2)
        image = draw_scene(scene, place_objects(scene, rng))
        shapes += [(image, question) for question in questions_about(scene, rng)]
    for index in digit_indices(held_out=True):
        image, value = draw_digit(int(index)), int(load_digits()[1][index])
        digits += [(image, question) for question in questions_about(value, rng)]
    return {"shapes": shapes, "held-out digits": digits}


def answer_questions(pipe: Any, questions: list[tuple[Image.Image, str]]) -> list[str]:
    """The answers of the pipeline's model to one question about each image, in one batch, by greedy decoding."""
    conversations = [pipe.processor.conversation(question, image) for image, question in questions]
    inputs = pipe.processor.encode_conversations(conversations).to(pipe.model.device)
    tokens = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=24)
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in pipe.processor.batch_decode(new_tokens, skip_special_tokens=True)]


def evaluate_understanding(
    pipe: Any, questions: dict[str, list[tuple[Image.Image, QuestionAnswer]]], batch_size: int = 64
) -> dict:
    """Answer all questions with greedy decoding; an answer is correct if it matches exactly.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        questions (`dict`): images with questions by subject, see `understanding_questions`.
        batch_size (`int`, defaults to 64): the number of questions answered at once.

    Returns:
        `dict`: by subject, `accuracy` (0 to 1), `count`, `kinds` (accuracy by kind of question), and `wrong`
        (question, answer and prediction of each failure).
    """
    results = {}
    for subject, subject_questions in questions.items():
        by_kind: dict[str, list[bool]] = defaultdict(list)
        wrong = []
        for start in tqdm(range(0, len(subject_questions), batch_size), desc=f"answering: {subject}"):
            batch = subject_questions[start : start + batch_size]
            predictions = answer_questions(pipe, [(image, item.question) for image, item in batch])
            for (_, item), prediction in zip(batch, predictions):
                by_kind[item.kind].append(prediction == item.answer)
                if prediction != item.answer:
                    wrong.append({"question": item.question, "answer": item.answer, "prediction": prediction})
        results[subject] = {
            "accuracy": 1 - len(wrong) / len(subject_questions),
            "count": len(subject_questions),
            "kinds": {kind: float(np.mean(correct)) for kind, correct in sorted(by_kind.items())},
            "wrong": wrong,
        }
    return results
