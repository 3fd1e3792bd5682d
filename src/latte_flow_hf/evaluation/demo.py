# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The demo: images are generated for a few prompts, and the same model answers questions about them."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..tinyworld.digits import DIGIT_NAMES
from ..tinyworld.oracle import shows
from ..tinyworld.questions import QuestionAnswer, parse_prompt
from ..tinyworld.shapes import Scene


DEMO_PROMPTS = (
    "a red circle",
    "a green cross",
    "a blue square left of a yellow triangle",
    "a purple triangle above a red square",
    "a white cross right of a green circle",
    "a yellow circle below a blue cross",
    "a handwritten three",
    "a handwritten seven",
)


@dataclass
class DemoItem:
    """One prompt of the demo.

    Args:
        prompt (`str`): the prompt.
        image (`PIL.Image.Image`): the generated image.
        seconds (`float`): the time for generating it.
        is_correct (`bool`): whether it shows what the prompt describes, according to the oracle.
        questions (`list[QuestionAnswer]`): the questions about the image.
        answers (`list[str]`): the answers of the model.
    """

    prompt: str
    image: Image.Image
    seconds: float
    is_correct: bool
    questions: list[QuestionAnswer]
    answers: list[str]


def demo_questions(prompt: str) -> list[QuestionAnswer]:
    """Two questions with known answers about the image that `prompt` describes."""
    content = parse_prompt(prompt)
    if not isinstance(content, Scene):
        return [
            QuestionAnswer("what is in the picture?", prompt, "what"),
            QuestionAnswer("which digit is this?", DIGIT_NAMES[content], "digit"),
        ]
    scene = content.canonical
    what = QuestionAnswer("what is in the picture?", scene.prompt, "what")
    if scene.relation is None:
        return [what, QuestionAnswer("what colour is it?", scene.objects[0].colour, "colour")]
    question = f"what is {scene.relation} the {scene.objects[1]}?"
    return [what, QuestionAnswer(question, f"a {scene.objects[0]}", "relation")]


def generate_and_ask(pipe: Any, prompt: str, seed: int) -> DemoItem:
    """Generate an image with the pipeline's defaults, then ask the same model about it."""
    start = time.perf_counter()
    image = pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]
    seconds = time.perf_counter() - start
    questions = demo_questions(prompt)
    answers = [pipe.chat(item.question, images=image, do_sample=False, max_new_tokens=24) for item in questions]
    return DemoItem(prompt, image, seconds, shows(image, prompt), questions, answers)


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def contact_sheet(items: list[DemoItem], columns: int = 4) -> Image.Image:
    """One image with all images of the demo, their prompts, questions and answers."""
    scale, margin, line = 4, 16, 17
    side = items[0].image.width * scale
    cell_height = side + margin + line * (2 + 2 * len(items[0].questions))
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (cell_height + margin) + margin), "white")
    drawing = ImageDraw.Draw(sheet)
    plain, large = ImageFont.load_default(12), ImageFont.load_default(14)
    for index, item in enumerate(items):
        left = margin + (index % columns) * (side + margin)
        top = margin + (index // columns) * (cell_height + margin)
        sheet.paste(item.image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        y = top + side + 6
        drawing.text((left, y), item.prompt, fill="black", font=large)
        y += line + 4
        for question, answer in zip(item.questions, item.answers):
            colour = (20, 110, 50) if answer == question.answer else (190, 30, 30)
            drawing.text((left, y), question.question, fill=(110, 110, 110), font=plain)
            drawing.text((left + 8, y + line), answer, fill=colour, font=plain)
            y += 2 * line
    return sheet
