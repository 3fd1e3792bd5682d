# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the tabs do, as generators of what they tell; apart from how the page shows it."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..modeling.context import unknown_words
from ..pipelines.image_metadata import AdapterRecord, PipelineRecord, record_pipeline
from . import conversation
from .limits import (
    ImageSettings,
    Limits,
    read_guidance,
    read_numbers,
    read_prompt,
    read_size,
    read_steps,
    read_upload,
    read_whole,
)
from .model_queue import Job, ModelQueue, Waiting
from .runs import Generated, Progress, generate
from .shelf import AdapterShelf
from .trace import ExpertReport, Trace, expert_reports, root_mean_square


MAX_SEED = 2**32 - 1

# What all tabs send.
Chosen = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Inside:
    """An image, and what each expert did for it.

    Args:
        generated ([`Generated`]): the image.
        reports (`list[ExpertReport]`): of the experts that ran.
        noise (`PIL.Image.Image`): the initial noise, decoded.
        estimates (`list[PIL.Image.Image]`): the first estimate of the first expert, then one for each report.
        changes (`list[float]`): root mean square of the change from each evaluation's estimate to the next one's.
        encode_seconds, decode_seconds (`float`): for the prompt and for the autoencoder.
    """

    generated: Generated
    reports: list[ExpertReport]
    noise: Image.Image
    estimates: list[Image.Image]
    changes: list[float]
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model and how it is used."""

    model: str
    steps: Any = ""
    guidance: Any = ""
    adapters: tuple[str, ...] = ()


class Studio:
    """The model with its queue and adapters.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline of all tabs.
        name (`str`): what it is called.
        others (`dict[str, LatteFlowPipeline]`, *optional*): more pipelines for the tab Compare.
        limits ([`Limits`], *optional*): what visitors may ask for.
    """

    def __init__(
        self, pipe: Any, name: str, others: dict[str, Any] | None = None, limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.pipe, self.name = pipe, name
        self.pipes: dict[str, Any] = {name: pipe, **(others or {})}
        for loaded in self.pipes.values():
            loaded.set_progress_bar_config(disable=True)
        # Before adapters are loaded: it hashes the weights, which takes seconds for a large model.
        self._record = record_pipeline(pipe)
        self.shelf = AdapterShelf(pipe, self.limits)
        self.queue = ModelQueue(self.limits.waiting)
        self._jobs: dict[str, set[Job]] = {}
        self._guard = threading.Lock()

    @property
    def num_experts(self) -> int:
        return self.pipe.model.config.num_experts

    @property
    def boundaries(self) -> list[float]:
        return list(self.pipe.model.config.expert_boundaries)

    def follow(self, session: str, work: Callable[[Job], None]) -> Iterator[Any]:
        """Run `work` in its turn, and yield what it sends. `stop(session)` ends it, and so does closing the iterator.

        Raises:
            `ValueError`: if too many wait, or the memory is exhausted. And the error of the work.
        """
        job = self.queue.submit(work)
        with self._guard:
            self._jobs.setdefault(session, set()).add(job)
        try:
            yield from self.queue.follow(job)
        except (MemoryError, RuntimeError) as error:
            # torch raises a plain RuntimeError where the memory of a CPU is exhausted.
            if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
                raise ValueError("There is not enough memory for this. Use a smaller size or fewer steps.") from error
            raise
        finally:
            with self._guard:
                self._jobs[session].discard(job)
                if not self._jobs[session]:
                    del self._jobs[session]

    def stop(self, session: str) -> int:
        """Stop what a session is waiting for. Returns how much that was."""
        with self._guard:
            jobs = list(self._jobs.get(session, ()))
        for job in jobs:
            job.stop()
        return len(jobs)

    def leave(self, session: str) -> None:
        """A visitor has gone: stop what they wait for, and forget what they uploaded."""
        self.stop(session)
        if any(adapter.owner for adapter in self.shelf.adapters(session)):
            self.queue.submit(lambda job: self.shelf.forget(session))

    def settings(
        self,
        prompt: Any,
        seed: Any = 0,
        steps: Any = "",
        guidance: Any = "",
        width: Any = None,
        height: Any = None,
        adapters: Chosen | None = None,
        pipe: Any = None,
    ) -> ImageSettings:
        """The settings that a visitor typed, checked. An empty seed is drawn.

        Raises:
            `ValueError`: for the first that is not accepted.
        """
        pipe = self.pipe if pipe is None else pipe
        num_experts, multiple = pipe.model.config.num_experts, pipe._size_multiple
        is_drawn = seed is None or str(seed).strip() == ""
        return ImageSettings(
            prompt=read_prompt(prompt, self.limits),
            seed=int(torch.randint(MAX_SEED, ())) if is_drawn else read_whole(seed, "Seed", 0, MAX_SEED),
            steps=read_steps(steps, num_experts, self.limits),
            guidance=read_guidance(guidance, num_experts, self.limits),
            width=read_size(width, "Width", multiple, self.limits),
            height=read_size(height, "Height", multiple, self.limits),
            adapters=tuple((adapters or {}).items()),
        )

    def unknown_words(self, text: str) -> str:
        """A remark on words that the model never learned; empty if there are none."""
        config = self.pipe.model.config
        unknown = unknown_words([text], config.trained_words)
        if not unknown:
            return ""
        return (
            f"This model knows only the words of a small world, and not: {', '.join(unknown[:8])}. "
            "Try: a red circle left of a blue square, or: a handwritten seven."
        )

    def record(self, session: str, settings: ImageSettings) -> PipelineRecord:
        """What the images of these settings depend on."""
        adapters = tuple(
            AdapterRecord(name=name, weights=weights, sha256=self.shelf.find(name, session).sha256)
            for name, weights in settings.adapters
        )
        return self._record.model_copy(update={"adapters": adapters})

    def create(self, session: str, settings: Sequence[ImageSettings]) -> Iterator[Waiting | Progress | Generated]:
        """One image for each of `settings`."""

        def work(job: Job) -> None:
            for number, one in enumerate(settings):
                job.check()
                self.shelf.activate(one.adapters, session)
                job.send(generate(self.pipe, one, self.name, job, number, record=self.record(session, one)))

        yield from self.follow(session, work)

    def series(self, settings: ImageSettings, count: Any) -> list[ImageSettings]:
        """The settings of `count` images: the same with the seeds that follow."""
        number = read_whole(count, "The number of images", 1, self.limits.images)
        return [replace(settings, seed=(settings.seed + index) % (MAX_SEED + 1)) for index in range(number)]

    def variations(self, settings: ImageSettings, count: Any, amount: Any) -> list[ImageSettings]:
        """The settings of `count` images that are like the one of `settings`.

        Args:
            settings ([`ImageSettings`]): of the image.
            count (`int`): the number of images.
            amount (`float`): from 0 (the same) to 1 (another seed).
        """
        number = read_whole(count, "The number of images", 1, self.limits.images)
        (share,) = read_numbers(amount, "Difference", 1, 0.0, 1.0) or (0.5,)
        seeds = torch.randint(MAX_SEED, (number,)).tolist()
        return [replace(settings, variation=share, variation_seed=seed) for seed in seeds]

    def inside(self, session: str, settings: ImageSettings) -> Iterator[Waiting | Progress | Inside]:
        """Generate an image and report what each expert did. Nothing is decoded meanwhile, so that times are right."""

        def work(job: Job) -> None:
            self.shelf.activate(settings.adapters, session)
            trace = Trace()
            generated = generate(self.pipe, settings, self.name, job, shows_previews=False, trace=trace)
            reports = expert_reports(self.pipe.model, trace)
            first = trace.evaluations[0]
            with torch.no_grad():
                shown = [
                    self.pipe.decode_latents(latents)[0]
                    for latents in (first.latents, first.clean, *(report.estimate for report in reports))
                ]
            changes = [root_mean_square(after.clean - before.clean) for before, after in pairwise(trace.evaluations)]
            job.send(
                Inside(generated, reports, shown[0], shown[1:], changes, trace.encode_seconds, trace.decode_seconds)
            )

        yield from self.follow(session, work)

    def compare(
        self, session: str, prompt: Any, seed: Any, sides: Sequence[Side], adapters: Chosen
    ) -> Iterator[Waiting | Progress | Generated]:
        """The same prompt and noise with other settings or models, one after the other.

        Raises:
            `ValueError`: if a setting is not accepted, or the models draw noise of different shapes.
        """
        plan = []
        for side in sides:
            pipe = self.pipes.get(side.model)
            if pipe is None:
                raise ValueError(f"There is no model {side.model!r} here; there are: {', '.join(self.pipes)}.")
            if side.adapters and pipe is not self.pipe:
                raise ValueError(f"Adapters are those of {self.name}; choose none for {side.model}.")
            chosen = {
                name: adapters.get(name, (1.0,) * self.num_experts)
                for name in side.adapters
                if self.shelf.find(name, session)
            }
            settings = self.settings(prompt, seed, side.steps, side.guidance, adapters=chosen, pipe=pipe)
            seed = settings.seed  # Drawn once if it was empty.
            plan.append((pipe, side.model, settings))
        shapes = {(pipe.model.config.latent_channels, pipe.model.config.sample_size) for pipe, _, _ in plan}
        if len(shapes) > 1:
            raise ValueError(
                "These models have latents of different shapes, so they cannot start from the same noise."
            )

        def work(job: Job) -> None:
            for number, (pipe, model, settings) in enumerate(plan):
                job.check()
                if pipe is self.pipe:
                    self.shelf.activate(settings.adapters, session)
                job.send(generate(pipe, settings, model, job, number, shows_previews=False))

        yield from self.follow(session, work)

    def ask(self, session: str, messages: list[dict], adapters: Chosen) -> Iterator[Waiting | str]:
        """The answer to the last question, longer and longer."""

        def work(job: Job) -> None:
            self.shelf.activate(tuple(adapters.items()), session)
            job.send(conversation.answer(self.pipe, messages, self.limits, job))

        yield from self.follow(session, work)

    def add_adapter(self, session: str, paths: list[str]) -> str:
        """Put an uploaded adapter on the shelf. Returns its name.

        Raises:
            `ValueError`: if it cannot be used.
        """
        names: list[str] = []
        for name in self.follow(session, lambda job: job.send(self.shelf.upload(paths, session).name)):
            if not isinstance(name, Waiting):
                names.append(name)
        if not names:
            raise ValueError("The upload was stopped.")
        return names[0]

    def remove_adapter(self, session: str, name: str) -> None:
        """
        Raises:
            `ValueError`: if this session did not upload it.
        """
        for _ in self.follow(session, lambda job: self.shelf.remove(name, session)):
            pass

    def choose_adapter(self, session: str, chosen: Chosen, name: str, weights: Any) -> Chosen:
        """The chosen adapters, with another weight for one of them; a weight of 0 everywhere takes it out.

        Raises:
            `ValueError`: if there is no such adapter, or the weight is not accepted.
        """
        self.shelf.find(name, session)
        values = read_numbers(weights, "Weight", self.num_experts, -4.0, 4.0)
        if values is None:
            raise ValueError("The weight is empty. Use 1 for the adapter as it was trained, 0 to leave it out.")
        per_expert = values * self.num_experts if len(values) == 1 else values
        others = {other: weight for other, weight in chosen.items() if other != name}
        return {**others, name: per_expert} if any(per_expert) else others

    def read_images(self, paths: Sequence[str | Path]) -> list[Image.Image]:
        """Uploaded images.

        Raises:
            `ValueError`: for the first that is not accepted.
        """
        if len(paths) > 4:
            raise ValueError(f"At most 4 images can be shown at a time, got {len(paths)}.")
        return [read_upload(path, self.limits) for path in paths]
