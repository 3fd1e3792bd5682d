# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images for benchmarks that others evaluate: from the prompt file that a benchmark's authors publish to the folder
that their evaluator reads. Nothing is downloaded, and nothing is judged here.

A folder has `run.json`, which says what its images depend on, and `images/`, which is what the evaluator is given:
some of them read every file of a folder.
"""

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ..files import atomic_write, check_output, is_whole_png, read_json, save_image, write_json
from ..folder_lock import LOCK_FILE, lock_folder
from ..modeling.context import unknown_words
from ..pipelines.batch_generation import generate_seeded, start_processes
from ..pipelines.image_metadata import record_call, record_pipeline, write_metadata


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a benchmark.

    Args:
        prompt (`str`): the text.
        files (`tuple[str, ...]`): of its images, relative to the folder that the evaluator reads.
        notes (`tuple[tuple[str, str], ...]`): other files that the evaluator reads beside them, and their content.
    """

    prompt: str
    files: tuple[str, ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PromptSuite:
    """A benchmark.

    Args:
        source (`str`): its prompt file, for messages.
        read (`Callable`): reads the prompts of one path, in a fixed order. It raises `ValueError` with the line and
            what is expected there.
        is_folder (`bool`): whether that path is a folder.
        has_several (`bool`): whether there may be several such paths.
        images_per_file (`int`): 4 if a file is a grid of 2x2 images.
    """

    source: str
    read: Callable[[Path], list[SuitePrompt]]
    is_folder: bool = False
    has_several: bool = False
    images_per_file: int = 1


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path} is not a text file in UTF-8: {error}") from error


def _parse_json(text: str, where: str) -> Any:
    """JSON in which no key of an object is there twice; `json` alone would keep the last one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{where} has the key {twice!r} twice in one object.")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply.") from error


def _read_json(path: Path) -> Any:
    try:
        return _parse_json(_read_text(path), f"prompts {path}")
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts {path}, line {error.lineno} is not JSON: {error.msg}.") from error


def _check_prompt(prompt: Any, where: str, key: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} must have a prompt as text under {key!r}, got {prompt!r}.")
    return prompt.strip()


def _check_name(name: Any, where: str, what: str) -> str:
    """A name that becomes that of a file or folder: it must not lead elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(
            f"{where} has the {what} {name!r}, which must be text of at most 200 letters, digits, '_', '-' and '.', "
            "and not begin with a dot."
        )
    return name


def _read_geneval(path: Path) -> list[SuitePrompt]:
    lines = _read_text(path).rstrip().split("\n")
    prompts = []
    for index, line in enumerate(lines):
        where = f"prompts {path}, line {index + 1}"
        try:
            item = _parse_json(line, where)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON ({error.msg}); GenEval's prompts are evaluation_metadata.jsonl, an object "
                "per line."
            ) from error
        if not isinstance(item, dict) or not isinstance(item.get("tag"), str):
            raise ValueError(f"{where} must be an object with `tag`, `include` and `prompt`, got {line[:80]!r}.")
        include = item.get("include")
        if not isinstance(include, list) or not all(
            isinstance(part, dict) and isinstance(part.get("class"), str) and isinstance(part.get("count"), int)
            for part in include
        ):
            raise ValueError(f"{where} must have `include`, a list of objects with `class` and `count`.")
        prompt = _check_prompt(item.get("prompt"), where, "prompt")
        files = tuple(f"{index:05d}/samples/{number:05d}.png" for number in range(4))
        prompts.append(SuitePrompt(prompt, files, ((f"{index:05d}/metadata.jsonl", line.strip() + "\n"),)))
    return prompts


def _read_dpg_bench(path: Path) -> list[SuitePrompt]:
    prompts = []
    for file in sorted(path.glob("*.txt")):
        # The evaluator takes the name of an image up to its first dot.
        name = _check_name(file.stem, f"prompts {file}", "name")
        if "." in name:
            raise ValueError(f"prompts {file} has a second dot in its name, after which the evaluator does not read.")
        text = _read_text(file)
        if not text.strip():
            raise ValueError(f"prompts {file} is empty; DPG-Bench has one prompt per file.")
        prompts.append(SuitePrompt(text.strip(), (f"{name}.png",)))
    if not prompts:
        raise ValueError(f"prompts {path} has no .txt files; DPG-Bench has one per prompt, in dpg_bench/prompts.")
    return prompts


def _read_wise(path: Path) -> list[SuitePrompt]:
    items = _read_json(path)
    if not isinstance(items, list):
        raise ValueError(f"prompts {path} must be a list of objects, as WISE's data, got a {type(items).__name__}.")
    prompts = []
    for index, item in enumerate(items, 1):
        where = f"prompts {path}, object {index}"
        number = item.get("prompt_id") if isinstance(item, dict) else None
        # As long as a number of COCO may be: it becomes the name of a file.
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 10**18:
            raise ValueError(f"{where} must have `Prompt` and `prompt_id`, a whole number, got {str(item)[:80]}.")
        prompts.append(SuitePrompt(_check_prompt(item.get("Prompt"), where, "Prompt"), (f"{number}.png",)))
    return prompts


def _read_coco(path: Path) -> list[SuitePrompt]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    if any((reader.fieldnames or []).count(name) != 1 for name in ("image_id", "text")):
        raise ValueError(
            f"prompts {path}, line 1 must name the columns image_id and text, got {reader.fieldnames}. COCO's own "
            "annotations have five captions per image: select 30,000 first, and write them as such a table."
        )
    prompts = []
    try:
        for row in reader:
            where = f"prompts {path}, line {reader.line_num}"
            # `DictReader` has the values of further columns under `None`.
            if None in row:
                raise ValueError(
                    f"{where} has more values than line 1 has columns; put a text with a comma in quotes."
                )
            number = str(row["image_id"] or "").strip()
            # As a whole number: 000000000042 and 42 are the same image.
            if not re.fullmatch(r"\d{1,18}", number):
                raise ValueError(f"{where} must have a whole number as image_id, got {row['image_id']!r}.")
            prompts.append(SuitePrompt(_check_prompt(row["text"], where, "text"), (f"{int(number)}.png",)))
    except csv.Error as error:
        raise ValueError(f"prompts {path}, line {reader.reader.line_num} is not CSV: {error}.") from error
    return prompts


def _read_mjhq(path: Path) -> list[SuitePrompt]:
    items = _read_json(path)
    if not isinstance(items, dict):
        raise ValueError(f"prompts {path} must be an object by image id, as MJHQ-30K's meta_data.json.")
    prompts = []
    for name, item in items.items():
        where = f"prompts {path}, id {name!r}"
        _check_name(name, where, "id")
        if not isinstance(item, dict):
            raise ValueError(f"{where} must be an object with `category` and `prompt`, got {str(item)[:80]!r}.")
        category = _check_name(item.get("category"), where, "category")
        prompts.append(SuitePrompt(_check_prompt(item.get("prompt"), where, "prompt"), (f"{category}/{name}.png",)))
    return prompts


SUITES = {
    "geneval": PromptSuite("evaluation_metadata.jsonl", _read_geneval),
    "dpg-bench": PromptSuite("the folder dpg_bench/prompts", _read_dpg_bench, is_folder=True, images_per_file=4),
    "wise": PromptSuite("its .json files", _read_wise, has_several=True),
    "coco": PromptSuite("a .csv file with image_id and text", _read_coco),
    "mjhq": PromptSuite("meta_data.json", _read_mjhq),
}


def read_suite(suite: str, paths: list[Path]) -> list[SuitePrompt]:
    """Read the prompts of a benchmark.

    Args:
        suite (`str`): a key of `SUITES`.
        paths (`list[Path]`): the prompt file as its authors publish it. WISE has several, in any order.

    Raises:
        `ValueError`: if `suite` is unknown, or a file is not as its authors publish it, with the line; if a prompt is
            empty, or two prompts would have the same images.
        `OSError`: if a file cannot be read.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}.")
    expected = SUITES[suite]
    if not paths or (len(paths) > 1 and not expected.has_several):
        raise ValueError(f"prompts of {suite} must be {expected.source}, got {len(paths)} paths.")
    prompts: list[SuitePrompt] = []
    for path in paths:
        if path.is_dir() != expected.is_folder and path.exists():
            kind = "folder" if path.is_dir() else "file"
            raise ValueError(f"prompts of {suite} must be {expected.source}, got the {kind} {path}.")
        prompts += expected.read(path)
    if not prompts:
        raise ValueError(f"prompts {', '.join(map(str, paths))} has no prompt.")
    seen: dict[str, SuitePrompt] = {}
    for item in prompts:
        # Some file systems do not distinguish capital letters.
        other = seen.setdefault(item.files[0].lower(), item)
        if other is not item:
            raise ValueError(
                f"prompts {', '.join(map(str, paths))}: {other.prompt[:60]!r} and {item.prompt[:60]!r} have the same "
                f"id, and both would be {item.files[0]}."
            )
    if expected.has_several:
        prompts.sort(key=lambda item: int(Path(item.files[0]).stem))
    return prompts


def check_suite_folder(folder: Path) -> None:
    """
    Raises:
        `ValueError`: if `folder` has other files in it than those of this module.
        `OSError`: if it is a file, or cannot be written to.
    """
    check_output(folder / "run.json", replace=True)
    if (
        folder.is_dir()
        and not (folder / "run.json").exists()
        and any(path.name != LOCK_FILE and not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise ValueError(f"output {folder} has files, but no run.json that says of which run; choose another folder.")


def generate_suite(
    pipe: Any,
    suite: str,
    prompts: list[SuitePrompt],
    folder: Path,
    seed: int = 0,
    num_prompts: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    adapter_names: dict[str, str] | None = None,
    **call: Any,
) -> tuple[int, int]:
    """Generate the images of a benchmark that do not exist yet. With `accelerate launch`, each process generates its
    share.

    Image i of prompt n, of k images each, starts from the noise of seed + n * k + i, on any device and in any number
    of processes. `folder/run.json` says what the images depend on. A file is there whole or not at all.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline; it is moved to the device.
        suite (`str`): a key of `SUITES`.
        prompts (`list[SuitePrompt]`): all prompts of the benchmark, see [`read_suite`].
        folder (`Path`): made if it does not exist; it must be shared by all processes. `folder/images` is what the
            evaluator reads.
        seed (`int`, defaults to 0): the seed of the first image.
        num_prompts (`int`, *optional*): of the first prompts only, for a trial; a later run generates the others.
        batch_size (`int`, defaults to 1): the number of images in a batch, see [`batch_generation.generate_images`].
        device (`str`, *optional*): where a single process runs, see [`batch_generation.generate_images`].
        adapter_names (`dict[str, str]`, *optional*): what to call loaded adapters in `run.json` and in the files.
        call: further arguments of the pipeline, numbers and strings only, e.g. `num_inference_steps=20`.

    Returns:
        `tuple[int, int]`: the number of files that all processes wrote, and of those that existed.

    Raises:
        `ValueError`: if an argument is invalid, a model of a small world never learned a word of the prompts, or the
            folder is of another model, suite, seed, of other prompts or settings; before anything is written.
        `OSError`: if `folder` is a file, or cannot be written to, or another run uses it.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}.")
    if not prompts:
        raise ValueError("prompts must be those of a benchmark, as `read_suite` returns them, got none.")
    for name, number in (("num_prompts", num_prompts), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    check_suite_folder(folder)
    per_file = SUITES[suite].images_per_file
    height, width = (call.get(name) or pipe.default_size for name in ("height", "width"))
    if per_file > 1 and height != width:
        raise ValueError(f"the evaluator of {suite} reads square images only, got height {height} and width {width}.")
    unknown = unknown_words([item.prompt for item in prompts], pipe.model.trained_words)
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise ValueError(
            f"prompts of {suite} have {len(unknown)} words that the model never learned ({shown}): it is of another "
            "world. Use a model of this one."
        )
    state = start_processes(pipe, device)
    record = record_pipeline(pipe, adapter_names)
    settings = record_call(pipe, record, prompts[0].prompt, seed, **call).model_dump(mode="json")
    content = [[item.prompt, item.files, item.notes] for item in prompts]
    run = {
        "suite": suite,
        "prompts": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "seed": seed,
        "settings": {name: value for name, value in settings.items() if name not in ("prompt", "seed", "batch_size")},
    }
    # One run at a time: a second one would make the same images, and remove what the first is writing.
    with lock_folder(folder) if state.is_main_process else nullcontext():
        if (folder / "run.json").exists():
            _check_run(read_json(folder / "run.json"), run, folder)
        # A file, its prompt, the seed of its first image, and what is written beside it.
        units = []
        for index, item in enumerate(prompts[:num_prompts]):
            for number, file in enumerate(item.files):
                first = seed + (index * len(item.files) + number) * per_file
                units.append((folder / "images" / file, item.prompt, first, item.notes))
        missing = [unit for unit in units if not is_whole_png(unit[0])]
        if state.is_main_process:
            # What killed runs left half written: some evaluators look into hidden folders, too.
            for scratch in [path for path in (folder / "images").rglob(".*.*") if path.is_dir()]:
                shutil.rmtree(scratch)
        # No process may write before all of them have listed what is missing, or their lists would differ.
        state.wait_for_everyone()
        with state.split_between_processes(missing) as share:
            step = max(1, batch_size // per_file)
            for start in tqdm(range(0, len(share), step), desc=suite, disable=not state.is_local_main_process):
                group = share[start : start + step]
                texts = [prompt for _, prompt, _, _ in group for _ in range(per_file)]
                seeds = [first + i for _, _, first, _ in group for i in range(per_file)]
                images: list[Image.Image] = []
                for first in range(0, len(texts), batch_size):
                    part = slice(first, first + batch_size)
                    images += generate_seeded(pipe, texts[part], seeds[part], **call)
                # Only now, because the pipeline may have refused the settings. All processes would write the same.
                if not (folder / "run.json").exists():
                    write_json(run, folder / "run.json")
                for position, (path, prompt, first, notes) in enumerate(group):
                    for name, content in notes:
                        if not (folder / "images" / name).exists():
                            with atomic_write(folder / "images" / name) as partial:
                                partial.write_text(content, encoding="utf-8")
                    own = images[position * per_file : (position + 1) * per_file]
                    if per_file == 1:
                        size = min(batch_size, len(texts))
                        write_metadata(own[0], record_call(pipe, record, prompt, first, batch_size=size, **call), path)
                    else:
                        save_image(_grid(own), path)
        state.wait_for_everyone()
    return len(missing), len(units) - len(missing)


def _check_run(before: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """Compare what decides the images. The name of the model, the device and the versions of packages do not."""

    def decisive(content: dict[str, Any]) -> dict[str, Any]:
        try:
            settings = dict(content["settings"])
            pipeline = settings.pop("pipeline")
            adapters = sorted((it["sha256"], it["weights"]) for it in pipeline["adapters"])
            return {
                "suite": content["suite"],
                "prompts": content["prompts"],
                "seed": content["seed"],
                "model": [pipeline["hashes"], pipeline["dtype"], pipeline["solver"]],
                "adapters": adapters,
                **settings,
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'run.json'} is not of this command: it has no {error}.") from error

    old, new = decisive(before), decisive(json.loads(json.dumps(run)))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        plain = [name for name in different if name not in ("model", "adapters", "prompts")]
        details = "".join(f"; {name} was {old.get(name)!r} and is {new.get(name)!r}" for name in plain)
        raise ValueError(
            f"output {folder} has images of another run: {', '.join(different)} differ{details}. Choose another "
            "folder, or give the same arguments to go on."
        )


def _grid(images: list[Image.Image]) -> Image.Image:
    """Four images of one size: the first two in the upper row."""
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % 2 * width, index // 2 * height))
    return grid
