# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The whole comparison: prepare what the runs share, train and measure the runs, measure times, write the report.

Started again with the same folder, it goes on where it was stopped; when everything is measured, it only writes the
report.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from ..checkpoints import tiny_checkpoint
from ..conversion.extract import extract_backbone
from ..files import atomic_write, read_json, write_json
from ..folder_lock import lock_folder
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..pipelines.fingerprint import hash_module, hash_processor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..training.data import UnreadableImages, load_image_rows
from ..training.recipe import Recipe
from ..training.train import load_data, load_pipeline, prepare_model, set_image_size
from .plan import (
    PLAN_FILE,
    REFERENCE_FILE,
    RESULT_FILE,
    RUNS_FOLDER,
    Plan,
    begin_study,
    check_common_steps,
    check_runs,
    check_study,
    load_result,
    points_of,
)
from .quality import write_reference
from .report import write_report
from .settings import PARTS_FOLDER, Reproduction, Variant
from .timing import TIMING_FILE, is_current, measure_timing


def reproduce(
    settings: Reproduction,
    folder: Path,
    device: str = "cpu",
    num_processes: int | None = None,
    tell: Callable[[str], None] = print,
) -> Path:
    """Make the comparison in `folder`, or go on with it.

    Args:
        settings ([`Reproduction`]): what is compared.
        folder (`Path`): for everything that is made; it belongs to one recipe and one starting model, whose backbone,
            autoencoder and processor count.
        device (`str`, defaults to `"cpu"`): `"cpu"`, or the type of the accelerator.
        num_processes (`int`, *optional*): how many runs are trained at a time, each in a process of its own with one
            thread; defaults to the number of cores on a CPU, and to 1 on an accelerator.
        tell (`Callable`): what is done, in lines.

    Returns:
        `Path`: the report, `report.md`; `report.html` and the figures are beside it.

    Raises:
        `ValueError`: if the recipe does not fit the starting model, the budget is too small, or `folder` contains
            other results.
        `OSError`: if a file is missing or damaged, another process uses the folder, or a run failed; finished runs are
            kept.
        `ModuleNotFoundError`: if a package of the extra `benchmarks` is missing.
    """
    # Before hours of training.
    import matplotlib  # noqa: F401
    import torchmetrics  # noqa: F401

    if device == "cuda" and torch.cuda.device_count() > 1:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible, which the Trainer would all use for each run; choose one "
            "by the environment variable CUDA_VISIBLE_DEVICES."
        )
    if num_processes is None:
        num_processes = (os.cpu_count() or 1) if device == "cpu" else 1
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}.")
    start = settings.pipeline if settings.pipeline != "tinyworld" else tiny_checkpoint()
    check_layers(settings, start)
    pipe = LatteFlowPipeline.from_pretrained(start)
    study = {
        "settings": settings.model_dump(mode="json"),
        # What the runs use of it: they train experts of their own.
        "starting_model": {
            "backbone": hash_module(pipe.model.vlm),
            "autoencoder": hash_module(pipe.vae),
            "processor": hash_processor(pipe.processor),
        },
        "device": device,
    }
    # Before the lock makes the folder.
    check_study(folder, study)
    with lock_folder(folder):
        begin_study(folder, study)
        if not (folder / PLAN_FILE).exists():
            prepare(settings, folder, pipe, start, device, tell)
        plan = Plan.read(folder)
        check_runs(folder, plan)
        run_all(folder, plan, num_processes, tell)
        timing = read_json(folder / TIMING_FILE) if (folder / TIMING_FILE).exists() else {}
        if not is_current(timing, plan):
            tell("measuring the time per image; let nothing else run")
            write_json(measure_timing(folder, plan), folder / TIMING_FILE)
        results = {name: load_result(folder, name, plan) for name in plan.settings.runs}
        return write_report(folder, plan, results, read_json(folder / TIMING_FILE))


def check_layers(settings: Reproduction, start: str | Path) -> None:
    """
    Raises:
        `ValueError`: if a number of experts does not divide the layers of the backbone.
        `OSError`: if there is no such pipeline.
    """
    config = LatteFlowConfig.from_pretrained(start, subfolder="model")
    num_layers = config.text_config.num_hidden_layers
    for variant in settings.variants:
        if num_layers % variant.num_experts:
            raise ValueError(
                f"num_experts must divide the {num_layers} layers of the backbone, got {variant.num_experts}."
            )


def prepare(
    settings: Reproduction, folder: Path, pipe: Any, start: str | Path, device: str, tell: Callable[[str], None]
) -> None:
    """Make what the runs share: the parts of the starting model, latents and contexts, drawn images, the plan."""
    backbone, autoencoder = (folder / PARTS_FOLDER / name for name in ("backbone", "autoencoder"))
    if not backbone.exists():
        extract_backbone(start).write(backbone)
    if not autoencoder.exists():
        with atomic_write(autoencoder) as partial:
            pipe.vae.save_pretrained(partial)
    step_flops, parameters, points = {}, {}, {}
    for variant in settings.variants:
        step_flops[variant.name], parameters[variant.name] = count_training_step(settings, variant, folder, device)
        points[variant.name] = points_of(settings.budget, step_flops[variant.name], settings.num_points)
    check_common_steps(points)
    for seed in settings.seeds:
        tell(f"encoding the images and prompts of seed {seed}")
        build_cache_of(settings, seed, folder, device)
    if not (folder / REFERENCE_FILE).exists():
        write_reference(settings, folder)
    Plan(settings, device, step_flops, parameters).write(folder)


def count_training_step(settings: Reproduction, variant: Variant, folder: Path, device: str) -> tuple[int, int]:
    """Count the operations of a training step, forward and backward, on the first examples of the first seed.

    Returns:
        `tuple[int, int]`: the operations, and the number of trained parameters.
    """
    recipe = settings.training_recipe(variant, settings.seeds[0], folder, max_steps=1)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": None})})
    set_seed(recipe.seed)
    pipe, dataset, collator = load_examples(recipe, device)
    model = prepare_model(recipe, pipe).train()
    examples = [dataset[index % len(dataset)] for index in range(recipe.training["per_device_train_batch_size"])]
    batch = collator(examples)
    # For error messages of the Trainer's callback.
    batch.pop("names", None)
    batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    passes = int(recipe.training.get("gradient_accumulation_steps", 1))
    return passes * counter.get_total_flops(), number


def build_cache_of(settings: Reproduction, seed: int, folder: Path, device: str) -> None:
    """Compute the latents and contexts of a seed, which all variants share, if they are not there yet."""
    load_examples(settings.training_recipe(settings.variants[0], seed, folder, max_steps=1), device)


def load_examples(recipe: Recipe, device: str) -> tuple[Any, Any, Any]:
    """The pipeline of a recipe before training, its dataset and its collator."""
    pipe = load_pipeline(recipe.model).to(device)
    rows = load_image_rows(set_image_size(recipe.data, pipe), recipe.seed)
    dataset, collator = load_data(recipe, pipe, rows, UnreadableImages(recipe.data.max_unreadable))
    return pipe, dataset, collator


def run_all(folder: Path, plan: Plan, num_processes: int, tell: Callable[[str], None]) -> None:
    """Make the runs that are not finished, some at a time.

    Raises:
        `OSError`: if one fails, with its last words; those that are under way are finished first.
    """
    names = list(plan.settings.runs)
    missing = [name for name in names if load_result(folder, name, plan) is None]
    if not missing:
        return
    num_processes = min(num_processes, len(missing))
    tell(
        f"{len(missing)} of {len(names)} runs to make, {num_processes} at a time, {plan.settings.budget:.3g} "
        f"operations each; what they print is in {folder / RUNS_FOLDER}/*/log.txt"
    )
    start = time.perf_counter()
    with ThreadPoolExecutor(num_processes) as pool:
        futures = {pool.submit(start_run, folder, name, plan.device): name for name in missing}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                name, minutes = futures[future], (time.perf_counter() - start) / 60
                last = read_json(folder / RUNS_FOLDER / name / RESULT_FILE)["points"][-1]
                tell(
                    f"{name}: {last['step']} steps, accuracy {last['accuracy']['all']:.1%}, Fréchet distance "
                    f"{last['frechet']:.3f} ({number} of {len(missing)} runs, {minutes:.1f} min)"
                )
        except BaseException:
            # Of an interruption, too: no other run is started.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def start_run(folder: Path, name: str, device: str) -> None:
    """Make one run in a process of its own, whose output is in `log.txt`.

    Raises:
        `OSError`: if it fails, with its last words.
    """
    run_folder = folder / RUNS_FOLDER / name
    run_folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {})}
    log = run_folder / "log.txt"
    with open(log, "ab") as file:
        process = subprocess.run(
            [sys.executable, "-m", "latte_flow_hf.reproduction", str(folder), name],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if process.returncode:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ChildProcessError(
            f"run {name} failed with code {process.returncode}: {words[-1] if words else 'no output'} (see {log}). "
            "Finished runs are kept; start again to go on."
        )
