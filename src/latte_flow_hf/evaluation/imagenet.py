# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Class-balanced samples for FID-50K, by all processes, resumed by running it again, in the layout of ADM's evaluator.

What is unusual here: image j is of class j % classes. ADM's evaluator takes the Inception Score of each 5,000 images
in the order of the file, so every part of the file must be balanced. And a batch always has the same images, whoever
makes it: their bytes depend on neither the number of processes nor the size of the shards.
"""

import json
import logging
import shutil
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files import atomic_write, check_output, read_json, write_json
from ..folder_lock import lock_folder
from ..modeling.context import unknown_words
from ..pipelines.batch_generation import generate_seeded, start_processes
from ..pipelines.fingerprint import pipeline_fingerprint
from .comparison import Reference, check_comparison, choose_metrics, compare_images
from .features import FeatureExtractor
from .image_sets import open_images, write_npz


logger = logging.getLogger(__name__)

# What a folder of samples remembers, and its parts.
SETTINGS_FILE = "settings.json"
SHARDS_FOLDER = "shards"

# What ADM's evaluator computes, without sFID.
ADM_METRICS = ("frechet_distance", "inception_score", "precision_recall")
ADM_NEAREST_K = 3


def read_class_names(path: str | Path) -> list[str]:
    """Read the names of classes, one per line in the order of their labels.

    Raises:
        `ValueError`: if the file is not UTF-8, has no line, or has an empty one: it would shift the labels.
        `OSError`: if there is no such file.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"classes {path} is no text file in UTF-8: {error}") from error
    if lines == [""]:
        raise ValueError(f"classes {path} is empty; write the name of one class per line.")
    if "" in lines:
        raise ValueError(f"classes {path}: line {lines.index('') + 1} is empty; line n has the name of label n - 1.")
    return lines


def class_prompts(
    names: Sequence[str] | None,
    trained_words: Sequence[str] | None = None,
    trained_names: Sequence[str] | None = None,
    prompt: str = "{}",
) -> list[str]:
    """The prompt of each class, of names that the model was trained on, as far as that is known.

    Two classes with the same name, such as the two cranes of ImageNet, are logged: their images cannot be told apart.

    Args:
        names (`Sequence[str]`, *optional*): the names of the classes; defaults to `trained_names`.
        trained_words (`Sequence[str]`, *optional*): of the model's configuration, the words of a small world.
        trained_names (`Sequence[str]`, *optional*): the names that the model was trained on, if they are known.
        prompt (`str`, defaults to `"{}"`): a format string, `{}` is the name.

    Raises:
        `ValueError`: if there are no names, they are others than those of the training, the model never learned one of
            their words, or `prompt` has no place for a name.
    """
    names = names if names is not None else trained_names
    if not names:
        raise ValueError("classes must have at least one name, got none.")
    if trained_names is not None and list(names) != list(trained_names):
        if len(names) != len(trained_names):
            raise ValueError(f"classes must be the {len(trained_names)} of the training, got {len(names)}.")
        label = next(i for i, (name, trained) in enumerate(zip(names, trained_names)) if name != trained)
        raise ValueError(
            f"classes must be those of the training: label {label} is {trained_names[label]!r} there, and "
            f"{names[label]!r} here."
        )
    # What `str.format` replaces: `{{` and `}}` stand for themselves.
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    except ValueError:
        fields = []
    if fields != [""]:
        raise ValueError(f"prompt must have one {{}} for the name of the class, got {prompt!r}.")
    prompts = [prompt.format(name) for name in names]
    unknown = unknown_words(prompts, trained_words)
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise ValueError(
            f"classes have {len(unknown)} words that the model never learned ({shown}); give the names of the classes "
            "that it was trained on."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        logger.warning(f"Several classes have the same name, and so the same kind of images: {', '.join(twice)}.")
    return prompts


def generate_class_samples(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | Path,
    num_samples: int = 50_000,
    seed: int = 0,
    batch_size: int = 50,
    shard_size: int = 500,
    device: str | None = None,
    **call: Any,
) -> Path | None:
    """Generate equally many images of each class. With `accelerate launch`, each process generates its share.

    Image j is of class j % classes and starts from the noise of seed + j. Finished shards are kept: a run that was
    stopped goes on where it was when the same call is made again.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline; it is moved to the device.
        prompts (`Sequence[str]`): the prompt of each class, in the order of the labels.
        folder (`str` or `Path`): made if it does not exist; it must be shared by all processes. It has the settings,
            the shards, and at last `samples_{n}x{height}x{width}x3.npz` with the images `arr_0`, (n, height, width, 3)
            of uint8, and their labels `arr_1`, (n,) of int64.
        num_samples (`int`, defaults to 50,000): a multiple of the number of classes.
        seed (`int`, defaults to 0): of the first image.
        batch_size (`int`, defaults to 50): the number of images in a batch. Another one gives equal images only up to
            rounding.
        shard_size (`int`, defaults to 500): the number of images of a file that appears whole or not at all; a
            multiple of `batch_size`.
        device (`str`, *optional*): where a single process runs; several processes run on the accelerator of each, or
            all of them on the CPU. Defaults to the accelerator if there is one.
        call: further arguments of the pipeline, numbers and strings only, e.g. `num_inference_steps=20`.

    Returns:
        `Path`: the `.npz` file, in the main process; `None` in all others, which may end.

    Raises:
        `ValueError`: if an argument is invalid, or `folder` has samples of another pipeline or with other settings.
        `OSError`: if `folder` cannot be written to, its disk is too small, or another run uses it.
    """
    folder, prompts = Path(folder), list(prompts)
    call = {name: value for name, value in call.items() if value is not None}
    _check_arguments(prompts, num_samples, batch_size, shard_size)
    height, width = call.get("height") or pipe.default_size, call.get("width") or pipe.default_size
    state = start_processes(pipe, device)
    settings = {
        "format": 1,
        "pipeline": pipeline_fingerprint(pipe),
        "prompts": prompts,
        "num_samples": num_samples,
        "seed": seed,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "call": call,
    }
    check_output(folder / SETTINGS_FILE, replace=True)
    # One run at a time: a second one would make the same images, and remove what the first is writing.
    with lock_folder(folder) if state.is_main_process else nullcontext():
        _check_settings(folder, settings)
        samples = folder / f"samples_{num_samples}x{height}x{width}x3.npz"
        if samples.exists():
            state.wait_for_everyone()
            return _check_samples(samples, num_samples) if state.is_main_process else None
        shards = [
            (
                folder / SHARDS_FOLDER / f"{start // shard_size:05d}.npy",
                range(start, min(start + shard_size, num_samples)),
            )
            for start in range(0, num_samples, shard_size)
        ]
        missing = [(path, images) for path, images in shards if not _is_finished(path, len(images), height, width)]
        num_missing = sum(len(images) for _, images in missing)
        check_output(samples, (num_missing + num_samples) * height * width * 3)
        # No process may write before all of them have listed what is missing, or their lists would differ.
        state.wait_for_everyone()
        if state.is_main_process:
            write_json(settings, folder / SETTINGS_FILE)
        with state.split_between_processes(missing) as share:
            progress = tqdm(
                total=sum(len(images) for _, images in share), desc="sampling", disable=not state.is_local_main_process
            )
            for path, images in share:
                batches = []
                for start in range(images.start, images.stop, batch_size):
                    batch = range(start, min(start + batch_size, images.stop))
                    batches.append(_generate(pipe, [prompts[j % len(prompts)] for j in batch], batch, seed, call))
                    progress.update(len(batch))
                with atomic_write(path) as partial:
                    np.save(partial, np.concatenate(batches))
            progress.close()
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        labels = np.arange(num_samples) % len(prompts)
        write_npz(samples, _read_shards([path for path, _ in shards]), num_samples, arr_1=labels)
        # What killed runs left of unfinished files, see `atomic_write`.
        for scratch in [*folder.glob(".samples_*.npz.*"), *(folder / SHARDS_FOLDER).glob(".*.npy.*")]:
            shutil.rmtree(scratch, ignore_errors=True)
        return samples


def _check_arguments(prompts: list[str], num_samples: int, batch_size: int, shard_size: int) -> None:
    if not prompts:
        raise ValueError("prompts must have one for each class, got none.")
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size), ("shard_size", shard_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if num_samples % len(prompts):
        lower = num_samples // len(prompts) * len(prompts)
        raise ValueError(
            f"num_samples must be a multiple of the {len(prompts)} classes, such as {lower or len(prompts)} or "
            f"{lower + len(prompts)}, got {num_samples}."
        )
    if shard_size % batch_size:
        raise ValueError(f"shard_size must be a multiple of batch_size, {batch_size}, got {shard_size}.")


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        `ValueError`: if `folder` has samples of another pipeline or with other settings.
    """
    path = folder / SETTINGS_FILE
    num_shards = len(list((folder / SHARDS_FOLDER).glob("*.npy")))
    if not num_shards and not list(folder.glob("samples_*.npz")):
        # At most the settings of a run that the pipeline refused.
        return
    if not path.exists():
        raise ValueError(f"output {folder} has samples, but not their {SETTINGS_FILE}; use another folder.")
    before, now = read_json(path), json.loads(json.dumps(settings))
    changes = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            parts = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            changes += [f"the {name} of the pipeline" if key == "pipeline" else name for name in parts]
        else:
            changes.append("the classes" if key == "prompts" else f"{key} {old} -> {new}")
    if changes:
        raise ValueError(
            f"output {folder} has samples of other settings ({', '.join(changes)}); use another folder, or the same "
            f"settings. Its {num_shards} finished shards are kept."
        )


def _check_samples(samples: Path, num_samples: int) -> Path:
    """The finished file.

    Raises:
        `OSError` or `ValueError`: if it is damaged.
    """
    images = open_images(samples)
    if images.num_images != num_samples:
        raise ValueError(f"{samples} has {images.num_images} images, not {num_samples}; remove it to make it again.")
    return samples


def _is_finished(path: Path, num_images: int, height: int, width: int) -> bool:
    """Whether a shard is whole. One that was cut, by a copy or a full disk, is made again."""
    if not path.exists():
        return False
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        logger.warning(f"shard {path} is damaged, and is made again: {error}")
        return False
    if not isinstance(images, np.ndarray):
        logger.warning(f"shard {path} is an .npz file, and is made again.")
        return False
    if images.dtype != np.uint8 or images.shape != (num_images, height, width, 3):
        logger.warning(f"shard {path} is damaged, and is made again: it has {images.shape} of {images.dtype}")
        return False
    return True


def _generate(pipe: Any, prompts: list[str], images: range, seed: int, call: dict[str, Any]) -> np.ndarray:
    """A batch of images, (batch, height, width, 3) of uint8."""
    generated = generate_seeded(pipe, prompts, [seed + j for j in images], **call)
    return np.stack([np.asarray(image.convert("RGB")) for image in generated])


def _read_shards(paths: list[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        yield np.load(path)


def check_evaluation(
    num_samples: int,
    height: int,
    width: int,
    reference: Reference,
    extractor: FeatureExtractor,
    prompts: Sequence[str] | None = None,
) -> list[str]:
    """Check what [`evaluate_samples`] needs, before the samples are generated.

    Returns:
        `list[str]`: the metrics that it will compute: those of ADM's evaluator without sFID, which needs features of a
        middle layer. The Inception Score needs an extractor with classes, precision and recall the reference's images.

    Raises:
        `ValueError`: for the reasons of [`check_comparison`].
    """
    metrics = [metric for metric in choose_metrics(reference, extractor) if metric in ADM_METRICS]
    check_comparison(
        num_samples,
        height,
        width,
        reference,
        extractor,
        metrics,
        nearest_k=ADM_NEAREST_K,
        name="the samples",
        prompts=prompts,
    )
    return metrics


def evaluate_samples(
    samples: str | Path, reference: Reference, extractor: FeatureExtractor, batch_size: int = 64
) -> dict[str, Any]:
    """FID, Inception Score, precision and recall, as ADM's evaluator has them, also written to `metrics.json` beside
    the samples.

    Args:
        samples (`str` or `Path`): the file of [`generate_class_samples`].
        reference ([`Reference`]): ADM's reference batch, or other real images or statistics, see [`open_reference`].
        extractor ([`FeatureExtractor`]): Inception for FID, see [`load_extractor`].
        batch_size (`int`, defaults to 64): for the extractor.

    Returns:
        `dict`: see [`compare_images`].

    Raises:
        `ValueError`: for the reasons of [`check_comparison`], or if an image or a feature cannot be used.
    """
    images = open_images(samples)
    metrics = check_evaluation(images.num_images, images.height, images.width, reference, extractor)
    results = compare_images(images, reference, extractor, metrics, nearest_k=ADM_NEAREST_K, batch_size=batch_size)
    results = {"reference": Path(reference.name).name, **results}
    write_json(results, Path(samples).parent / "metrics.json")
    return results
