# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One run: a variant is trained with a seed, and measured on the way.

The training goes from point to point with [`training.train`]: each point is the result of a run that ends there, and
the next one resumes from its checkpoint. What is measured at a point is a file of its own, so that a stopped run loses
no more than the steps since its last checkpoint, or one measurement.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ..evaluation.tinyworld import understanding_questions
from ..files import save_image, write_json
from ..folder_lock import lock_folder
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..training.train import train
from .machine import package_versions
from .plan import RESULT_FILE, RUNS_FOLDER, Plan, load_result, read_own
from .quality import QualityMeter, generate
from .settings import PARTS_FOLDER, GridSettings, Variant


MODEL_FOLDER = "model"
SAMPLES_FILE = "samples.png"
SAMPLE_PROMPTS = (
    "a red circle",
    "a green cross",
    "a blue square",
    "a yellow triangle",
    "a purple circle",
    "a blue square left of a yellow triangle",
    "a handwritten three",
    "a handwritten seven",
)

# How many questions compare the answers of the model with those of the backbone alone.
_NUM_SCENES, _NUM_QUESTIONS = 6, 24


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Yields a dictionary that gets the seconds that the block took: `cpu`, of this process, and `wall`."""
    seconds: dict[str, float] = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield seconds
    seconds.update(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def load_pipeline(folder: Path, plan: Plan) -> LatteFlowPipeline:
    """Load the pipeline of a run, computed as in training."""
    pipe = LatteFlowPipeline.from_pretrained(folder)
    attention = (plan.settings.recipe.get("model") or {}).get("attn_implementation")
    if attention is not None:
        pipe.model.set_attn_implementation(attention)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(plan.device)


def run(folder: Path, name: str) -> dict[str, Any]:
    """Train and measure one run, or go on where it was stopped.

    Args:
        folder (`Path`): the output folder, with the plan and what the runs share.
        name (`str`): of the run, see [`Reproduction.runs`].

    Returns:
        `dict`: what is stored as `result.json`: `points`, each with `step` and what [`QualityMeter.measure`] returns;
        `grid`; `understanding`; and the seconds that all took.

    Raises:
        `ValueError`: if the folder belongs to another recipe.
        `OSError`: if a file is missing or damaged, or another process has the run.
        `FloatingPointError`: if a loss is not finite.
    """
    plan = Plan.read(folder)
    finished = load_result(folder, name, plan)
    if finished is not None:
        return finished
    with lock_folder(folder / RUNS_FOLDER / name):
        return _run(folder, name, plan)


def _run(folder: Path, name: str, plan: Plan) -> dict[str, Any]:
    run_folder = folder / RUNS_FOLDER / name
    variant, seed = plan.settings.runs[name]
    meter = QualityMeter(plan.settings.evaluation, folder, plan.device)
    points: list[dict[str, Any]] = []
    steps = plan.points(variant)
    model = run_folder / MODEL_FOLDER
    for step in steps:
        path = run_folder / f"point-{step}.json"
        output = model if step == steps[-1] else run_folder / f"model-{step}"
        if not path.exists() or (step == steps[-1] and not model.exists()):
            recipe = plan.settings.training_recipe(variant, seed, folder, step)
            if plan.device == "cpu":
                recipe = recipe.model_copy(update={"training": {**recipe.training, "use_cpu": True}})
            seconds: dict[str, Any] = {"training": None}
            if not output.exists():
                with stopwatch() as seconds["training"]:
                    train(recipe, run_folder / "training", output)
            pipe = load_pipeline(output, plan)
            with stopwatch() as seconds["evaluation"]:
                quality = meter.measure(pipe, seed)
            write_json({"run": name, "plan": plan.id, "step": step, **quality, "seconds": seconds}, path)
        points.append(read_own(path, name, plan))
        if output != model and output.exists():
            shutil.rmtree(output)
    pipe = load_pipeline(model, plan)
    save_samples(pipe, run_folder / SAMPLES_FILE, plan)
    with stopwatch() as grid_seconds:
        grid = measure_grid(pipe, variant, seed, meter, plan.settings.grid)
    result = {
        "run": name,
        "plan": plan.id,
        "points": points,
        "grid": grid,
        "grid_seconds": grid_seconds,
        "understanding": compare_understanding(pipe, folder, plan),
        "versions": package_versions(),
    }
    write_json(result, run_folder / RESULT_FILE)
    shutil.rmtree(run_folder / "training", ignore_errors=True)
    return result


def save_samples(pipe: LatteFlowPipeline, path: Path, plan: Plan) -> None:
    """Images of the sample prompts beside each other; the same noise for every run."""
    settings = plan.settings.evaluation
    call = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    images = generate(pipe, list(SAMPLE_PROMPTS), 0, settings.batch_size, **call)
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    save_image(strip, path)


def measure_grid(
    pipe: LatteFlowPipeline, variant: Variant, seed: int, meter: QualityMeter, grid: GridSettings | None
) -> list[dict[str, Any]]:
    """The quality for every pair of steps and guidance; empty if the recipe does not ask for it."""
    if grid is None or variant.num_experts not in grid.num_experts or variant.residual_attention != "scores":
        return []
    cells = []
    for steps in grid.num_inference_steps:
        for scale in grid.guidance_scale:
            quality = meter.measure(pipe, seed, num_inference_steps=steps, guidance_scale=scale)
            cells.append({"num_inference_steps": steps, "guidance_scale": scale, **quality})
    return cells


@torch.inference_mode()
def compare_understanding(pipe: LatteFlowPipeline, folder: Path, plan: Plan) -> dict[str, Any]:
    """Ask the model and the stock backbone about images: are the logits equal to the bit, and the answers?

    Returns:
        `dict`: `num_questions`, `num_equal_answers`, `are_logits_equal` and `max_difference` of the logits.
    """
    backbone = AutoModelForImageTextToText.from_pretrained(folder / PARTS_FOLDER / "backbone", dtype=torch.float32)
    backbone.set_attn_implementation(pipe.model.vlm.config._attn_implementation)
    backbone.to(plan.device).eval()
    questions = understanding_questions(plan.settings.evaluation.seed, _NUM_SCENES)
    pairs = [pair for subject in questions.values() for pair in subject[: _NUM_QUESTIONS // len(questions)]]
    conversations = [pipe.processor.conversation(item.question, image) for image, item in pairs]
    inputs = pipe.processor.encode_conversations(conversations).to(plan.device)
    ours, stock = pipe.model(**inputs).logits, backbone(**inputs).logits
    call = {"do_sample": False, "max_new_tokens": 24}
    answers = [
        pipe.processor.batch_decode(model.generate(**inputs, **call)[:, inputs["input_ids"].shape[1] :])
        for model in (pipe.model, backbone)
    ]
    return {
        "num_questions": len(pairs),
        "num_equal_answers": sum(first == second for first, second in zip(*answers)),
        "are_logits_equal": torch.equal(ours, stock),
        "max_difference": float((ours - stock).abs().max()),
    }
