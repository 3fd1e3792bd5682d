# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Trajectories of a teacher from noise to data, stored on disk: what a student with few steps learns from.

A folder is filled and resumed as in `cache.py`: shards that are written atomically and contain their hash, and a
`fingerprint.json` with what the numbers depend on. Only the states where a step of the student starts and ends are
stored. They are states of the teacher's own sampling: at the start of an expert's interval the student then sees what
the expert before it was trained to reach, and not an interpolation of data and noise.

The teacher adds no noise within a step of the student, so that the end follows from the start. Between two steps it
replaces the share of the noise that the student will replace, with the same formula.

With an earlier student, each step starts where the steps of that student lead, and the teacher goes on from there:
the new student then learns from the errors that the steps before it make.
"""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from ..modeling.flow_matching import mean_velocity, sigmas_per_expert
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


# Changes with what is stored.
TRAJECTORY_FORMAT = 2


def trajectory_sigmas(boundaries: list[float], steps_per_expert: list[int]) -> list[float]:
    """The S + 1 sigmas between which the student takes its S steps: where each starts, and 0."""
    return [*sigmas_per_expert(boundaries, steps_per_expert).tolist(), 0.0]


def student_new_noise(settings: DistillationSettings, student: Any) -> list[float]:
    """The share of the noise that the student replaces after a step of each expert."""
    shares = settings.new_noise
    if shares is None:
        shares = getattr(student.scheduler, "noise_shares", 0.0)
    return list(shares) if isinstance(shares, list) else [shares] * student.model.config.num_experts


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
    scale, new_noise = settings.guidance_scale, settings.new_noise
    for name, values in (
        ("teacher_steps", settings.teacher_steps),
        ("steps_per_expert", settings.student_steps),
        ("guidance_scale", scale if isinstance(scale, list) else None),
        ("new_noise", new_noise if isinstance(new_noise, list) else None),
    ):
        if values is not None and len(values) != own.num_experts:
            raise ValueError(f"distillation: {name} must be one for each of {own.num_experts} experts, got {values}.")


def check_earlier_student(earlier: Any, student: Any, settings: DistillationSettings) -> None:
    """
    Raises:
        `ValueError`: if the model whose steps lead to the starts was not distilled to the steps of the student.
    """
    config, own, sampling = earlier.model.config, student.model.config, earlier.model.sampling
    for name, value, expected in (
        ("expert_boundaries", config.expert_boundaries, own.expert_boundaries),
        ("latent_channels", config.latent_channels, own.latent_channels),
        ("steps_per_expert", sampling.get("steps_per_expert"), settings.student_steps),
        ("distilled_experts", sampling.get("distilled_experts"), list(range(own.num_experts))),
    ):
        if value != expected:
            raise ValueError(f"distillation: the earlier student has {name} {value}, but expected is {expected}.")
    if hash_module(earlier.vae) != hash_module(student.vae):
        raise ValueError("distillation: the earlier student has another autoencoder: its latents differ.")


def trajectory_fingerprint(
    teacher: Any, student: Any, rows: ImageRows, settings: DistillationSettings, seed: int, earlier: Any = None
) -> dict[str, str]:
    """What the stored numbers depend on, by name."""
    parts = pipeline_fingerprint(teacher)
    return {
        "format": f"trajectories {TRAJECTORY_FORMAT}, cache {CACHE_FORMAT}",
        "teacher": parts["model"],
        "autoencoder": parts["autoencoder"],
        "processor": parts["processor"],
        "solver": settings.solver,
        "teacher_steps": json.dumps(settings.teacher_steps),
        "guidance_scale": json.dumps(settings.guidance_scale),
        "new_noise": json.dumps(student_new_noise(settings, student)),
        "earlier student": "none" if earlier is None else hash_module(earlier.model),
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
    earlier: Any = None,
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
        earlier ([`LatteFlowPipeline`], *optional*): an earlier student, whose steps lead to the starts.

    Raises:
        `ValueError`: if the teacher or the earlier student does not fit the student, or the folder has other
            trajectories.
        `OSError`: with the file, if a shard is damaged or cannot be written.
    """
    check_teacher(teacher, student, settings)
    if earlier is not None:
        check_earlier_student(earlier, student, settings)
    fingerprint = trajectory_fingerprint(teacher, student, rows, settings, seed, earlier)
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
        new_noise = student_new_noise(settings, student)
        states = generate_trajectories(teacher, prompts, seeds, rows.settings.size, settings, new_noise, earlier)
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
    teacher: Any,
    prompts: list[str],
    seeds: list[int],
    size: int,
    settings: DistillationSettings,
    new_noise: list[float],
    earlier: Any = None,
) -> torch.Tensor:
    """Sample the teacher, and keep the states where a step of the student starts and ends.

    Args:
        teacher ([`LatteFlowPipeline`]): the teacher.
        prompts (`list[str]`): one for each trajectory.
        seeds (`list[int]`): of the noise; drawn on the CPU, so that it is the same for every device.
        size (`int`): height and width in pixels.
        settings ([`DistillationSettings`]): the settings.
        new_noise (`list[float]`): see `student_new_noise`.
        earlier ([`LatteFlowPipeline`], *optional*): an earlier student, whose steps lead to the starts.

    Returns:
        `torch.Tensor`: (B, S, 2, C, height, width), float32, on the CPU: the start and the end of each step.
    """
    config = teacher.model.config
    side = size // teacher.vae_scale_factor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(config.latent_channels, side, side, generator=g) for g in generators])
    steps = LatteFlowScheduler(expert_boundaries=config.expert_boundaries, new_noise=new_noise)
    steps.set_timesteps(steps_per_expert=settings.student_steps)
    evaluations = _evaluations_at_ends(settings)
    context = None if earlier is None else earlier.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    starts: list[torch.Tensor] = [noise]
    ends: list[torch.Tensor] = []

    def keep(pipe: Any, evaluation: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if evaluation not in evaluations:
            return {}
        step, latents = len(ends), tensors["latents"]
        ends.append(latents.float().cpu())
        if step + 1 == len(evaluations):
            return {}
        # The step of the student that leads there, or that of the earlier student, with the student's own scheduler.
        if earlier is None:
            velocity = mean_velocity(starts[step], ends[step], steps.sigmas[step], steps.sigmas[step + 1])
        else:
            start = starts[step].to(latents.device)
            velocity = earlier.model.predict_velocity(
                start, 1000.0 * float(steps.sigmas[step]), context, expert=steps.experts[step]
            )
            velocity = velocity.float().cpu()
        starts.append(steps.step(velocity, steps.timesteps[step], starts[step], generators).prev_sample)
        return {"latents": starts[-1].to(latents)}

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
    return torch.stack([torch.stack(starts, dim=1), torch.stack(ends, dim=1)], dim=2)


def _evaluations_at_ends(settings: DistillationSettings) -> list[int]:
    """The evaluations of the teacher, numbered from 0, after which it is where a step of the student ends."""
    teacher_steps = [
        many // few for many, few in zip(settings.teacher_steps, settings.student_steps) for _ in range(few)
    ]
    ends = list(accumulate(teacher_steps))
    if settings.solver == "euler":
        return [end - 1 for end in ends]
    # Heun evaluates twice in each step but the last one of all.
    return [*(2 * end - 1 for end in ends[:-1]), 2 * ends[-1] - 2]


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
        sigmas (`list[float]`): see `trajectory_sigmas`.
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
