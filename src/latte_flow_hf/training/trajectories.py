# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Trajectories of a teacher from noise to data, stored on disk: what a student with few steps learns from.

A folder is filled and resumed as in `cache.py`: shards that are written atomically and contain their hash, and a
`fingerprint.json` with what the numbers depend on. Only the states where a step of the student starts or ends are
stored. They are states of the teacher's own sampling: at the start of an expert's interval the student then sees what
the expert before it was trained to reach, and not an interpolation of data and noise.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from ..modeling.flow_matching import sigmas_per_expert
from ..pipelines.fingerprint import hash_module, hash_processor, pipeline_fingerprint
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from .cache import (
    CACHE_FORMAT,
    Shards,
    build_contexts,
    create_or_check,
    missing_shards,
    read_metadata,
    wait_for_shards,
    write_shard,
)
from .collator import ImagePromptEncoder
from .data import ImageRows, UnreadableImageError, UnreadableImages, draw_prompt, example_seed
from .recipe import DistillationSettings


def trajectory_sigmas(boundaries: list[float], steps_per_expert: list[int]) -> list[float]:
    """The S + 1 sigmas at which the states of a trajectory are stored: where a step of the student starts, and 0."""
    return [*sigmas_per_expert(boundaries, steps_per_expert).tolist(), 0.0]


def check_teacher(teacher: Any, student: Any, settings: DistillationSettings) -> None:
    """
    Raises:
        `ValueError`: if the trajectories of the teacher are not those of the student's experts and latents.
    """
    config, own = teacher.model.config, student.model.config
    for name, value, expected in (
        ("num_experts", config.num_experts, own.num_experts),
        ("expert_boundaries", config.expert_boundaries, own.expert_boundaries),
        ("hidden_size", config.text_config.hidden_size, own.text_config.hidden_size),
        ("latent_channels", config.latent_channels, own.latent_channels),
        ("latent_patch_size", config.latent_patch_size, own.latent_patch_size),
    ):
        if value != expected:
            raise ValueError(f"distillation: teacher has {name} {value}, but the student has {expected}.")
    if hash_module(teacher.vae) != hash_module(student.vae):
        raise ValueError("distillation: teacher has another autoencoder than the student: its latents differ.")
    if teacher.model.sampling.get("distilled_experts"):
        raise ValueError(
            "distillation: teacher was distilled to few steps itself; use the model that it was distilled from."
        )
    scale = settings.guidance_scale
    for name, values in (
        ("teacher_steps", settings.teacher_steps),
        ("steps_per_expert", settings.student_steps),
        ("guidance_scale", scale if isinstance(scale, list) else None),
    ):
        if values is not None and len(values) != own.num_experts:
            raise ValueError(f"distillation: {name} must be one for each of {own.num_experts} experts, got {values}.")


def trajectory_fingerprint(teacher: Any, rows: ImageRows, settings: DistillationSettings, seed: int) -> dict[str, str]:
    """What the stored numbers depend on, by name."""
    parts = pipeline_fingerprint(teacher)
    return {
        "format": f"trajectories {CACHE_FORMAT}",
        "teacher": parts["model"],
        "autoencoder": parts["autoencoder"],
        "processor": parts["processor"],
        "solver": settings.solver,
        "teacher_steps": json.dumps(settings.teacher_steps),
        "guidance_scale": json.dumps(settings.guidance_scale),
        "expert_boundaries": json.dumps(teacher.model.config.expert_boundaries),
        "steps_per_expert": json.dumps(settings.student_steps),
        "num_trajectories": str(settings.num_trajectories),
        "batch_size": str(settings.batch_size),
        "seed": str(seed),
        "size": str(rows.settings.size),
        "prompts": json.dumps([rows.fingerprint, rows.settings.caption, rows.settings.label, rows.settings.prompt]),
    }


def build_trajectories(
    folder: Path,
    teacher: Any,
    student: Any,
    rows: ImageRows,
    settings: DistillationSettings,
    seed: int,
    unreadable: UnreadableImages,
    with_contexts: bool = True,
) -> None:
    """Fill the folder, keeping finished shards, which are checked. All processes must call it.

    Args:
        folder (`Path`): the folder, on a disk that all processes share.
        teacher ([`LatteFlowPipeline`]): generates the trajectories.
        student ([`LatteFlowPipeline`]): encodes the prompts for the training.
        rows ([`ImageRows`]): the prompts.
        settings ([`DistillationSettings`]): the settings.
        seed (`int`): of the noise, and of the choice between several captions of an image.
        unreadable ([`UnreadableImages`]): collects the rows that have no caption.
        with_contexts (`bool`, defaults to `True`): whether to store the contexts of the prompts, too.

    Raises:
        `ValueError`: if the teacher does not fit the student, or the folder has other trajectories.
        `OSError`: with the file, if a shard is damaged or cannot be written.
    """
    check_teacher(teacher, student, settings)
    fingerprint = trajectory_fingerprint(teacher, rows, settings, seed)
    if with_contexts:
        fingerprint |= {"backbone": hash_module(student.model.vlm), "tokenizer": hash_processor(student.processor)}
    with PartialState().main_process_first():
        create_or_check(folder, fingerprint)
    shards = shard_starts(folder, settings.num_trajectories or len(rows.dataset), settings.batch_size)
    for path in missing_shards(list(shards), "generating trajectories"):
        indices = shards[path]
        prompts = [trajectory_prompt(rows, index, seed, unreadable) for index in indices]
        seeds = [trajectory_seed(seed, index) for index in indices]
        assert rows.settings.size is not None
        states = generate_trajectories(teacher, prompts, seeds, rows.settings.size, settings)
        if not torch.isfinite(states).all():
            raise ValueError("distillation: teacher generates values that are not finite; use dtype float32.")
        write_shard({"states": states}, {"prompts": prompts}, path)
    wait_for_shards(list(shards))
    if with_contexts:
        prompts = sorted({prompt for path in shards for prompt in read_metadata(path)["prompts"]})
        build_contexts(folder, prompts, ImagePromptEncoder(student, rows.settings.encode_batch_size))


def shard_starts(folder: Path, num_trajectories: int, batch_size: int) -> dict[Path, range]:
    """The files of a folder, and the numbers of the trajectories in each."""
    return {
        folder / f"trajectories-{start:09d}.safetensors": range(start, min(start + batch_size, num_trajectories))
        for start in range(0, num_trajectories, batch_size)
    }


def trajectory_prompt(rows: ImageRows, index: int, seed: int, unreadable: UnreadableImages) -> str:
    """The prompt of a trajectory. A row without a caption is replaced by the next one that has one.

    Raises:
        `ValueError`: if no row has a caption.
    """
    num_rows = len(rows.dataset)
    for offset in range(num_rows):
        row_index = (index + offset) % num_rows
        row = rows.dataset[row_index]
        try:
            return draw_prompt(rows.prompts(row), example_seed(seed, index // num_rows, index))
        except UnreadableImageError as error:
            unreadable.add(rows.name(row, row_index), str(error))
    raise ValueError(f"data: none of {num_rows} images has a caption, and trajectories need prompts.")


def trajectory_seed(seed: int, index: int) -> int:
    """The seed of the noise of a trajectory, unlike those of images, which count from a seed given by the user."""
    return example_seed(seed, -1, index)


@torch.no_grad()
def generate_trajectories(
    teacher: Any, prompts: list[str], seeds: list[int], size: int, settings: DistillationSettings
) -> torch.Tensor:
    """Sample the teacher, and keep the states at `trajectory_sigmas`.

    Args:
        teacher ([`LatteFlowPipeline`]): the teacher.
        prompts (`list[str]`): one for each trajectory.
        seeds (`list[int]`): of the noise; drawn on the CPU, so that it is the same for every device.
        size (`int`): height and width in pixels.
        settings ([`DistillationSettings`]): the settings.

    Returns:
        `torch.Tensor`: (B, S + 1, C, height, width), float32, on the CPU.
    """
    config = teacher.model.config
    side = size // teacher.vae_scale_factor
    noise = torch.stack(
        [torch.randn(config.latent_channels, side, side, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    sigmas = trajectory_sigmas(config.expert_boundaries, settings.student_steps)
    states: dict[int, torch.Tensor] = {0: noise}

    def keep(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        reached = float(pipe.scheduler.sigmas[step + 1])
        for index, sigma in enumerate(sigmas):
            if math.isclose(reached, sigma, abs_tol=1e-6):
                # Heun reaches a sigma twice: the corrected state replaces the predicted one.
                states[index] = tensors["latents"].float().cpu()
        return {}

    scheduler = teacher.scheduler
    teacher.scheduler = LatteFlowScheduler(expert_boundaries=config.expert_boundaries, solver=settings.solver)
    try:
        teacher(
            prompts,
            height=size,
            width=size,
            steps_per_expert=list(settings.teacher_steps),
            guidance_scale=settings.guidance_scale,
            latents=noise,
            output_type="latent",
            callback_on_step_end=keep,
        )
    finally:
        teacher.scheduler = scheduler
    return torch.stack([states[index] for index in range(len(sigmas))], dim=1)


class TrajectoryDataset(Dataset):
    """The trajectories in a folder, as `{"states", "prompt", "name", "seed"}` for [`TrajectoryCollator`].

    Args:
        folder (`Path`): the folder, filled by `build_trajectories`.
        num_trajectories (`int`): how many of them.
        batch_size (`int`): the number of trajectories in a shard.
        seed (`int`): of the order.
    """

    def __init__(self, folder: Path, num_trajectories: int, batch_size: int, seed: int):
        self.folder, self.batch_size, self.seed, self.epoch = folder, batch_size, seed, 0
        self.paths = list(shard_starts(folder, num_trajectories, batch_size))
        self.prompts = [prompt for path in self.paths for prompt in read_metadata(path)["prompts"]]
        self._shards = Shards()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            # Iteration over a class with `__getitem__` ends by this error.
            raise IndexError(index)
        states = self._shards[self.paths[index // self.batch_size]].get_slice("states")[index % self.batch_size]
        seed = example_seed(self.seed, self.epoch, index)
        return {"states": states, "prompt": self.prompts[index], "name": f"trajectory {index}", "seed": seed}


class TrajectoryCollator:
    """Collates trajectories into the arguments of `forward`.

    Args:
        contexts (`Callable`): maps a list of prompts to their contexts, such as [`CachedContexts`].
        sigmas (`list[float]`): those of the states, see `trajectory_sigmas`.
    """

    def __init__(self, contexts: Any, sigmas: list[float]):
        self.contexts, self.sigmas = contexts, tuple(sigmas)

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        return {
            "states": torch.stack([example["states"] for example in examples]),
            "sigmas": self.sigmas,
            "context": self.contexts([example["prompt"] for example in examples]),
            "names": [example["name"] for example in examples],
        }
