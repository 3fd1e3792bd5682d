# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The command `latte-flow`. Every verb calls functions that can be imported on their own.

This module is not part of the package, and its verbs import the package inside. Importing any module of the package
registers its classes with transformers and diffusers, which takes seconds; help and usage errors need none of that.
"""

import contextlib
import functools
import json
import re
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


# No rich: plain help and one-line errors, in half the time.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a pipeline; the embedded checkpoint if left out."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; the accelerator if there is one, if left out.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(
        help="Of all weights. bfloat16 takes half the memory and is faster on a GPU, but slower on most CPUs."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Number of sampling steps; those of the model, mostly 40, if left out.")
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Scale of classifier-free guidance, 1 is none; that of the model, mostly 4, if left out."),
]
Fast = Annotated[
    bool, typer.Option("--fast", help="With the embedded checkpoint: its adapter for 4 evaluations per image.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:WEIGHT]",
        help="Adapter: a PEFT folder, file or hub id, and the weight of its effect, 1 if left out; may be repeated.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="For programs: one JSON object per line on stdout, everything else on stderr.")
]


convert = typer.Typer(
    help="Convert checkpoints from and to other layouts.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(convert, name="convert")


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"latte_flow_hf {metadata.version('latte_flow_hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generate images and chat with LaTtE-Flow models."""


def _verb(function, group: typer.Typer = app, name: str | None = None):
    """Register a verb whose user errors end in one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            message = _user_message(error)
            if message is None:
                raise
            typer.secho(f"Error: {' '.join(message.split())}", fg="red", err=True)
            raise typer.Exit(1) from error

    return group.command(name)(wrapped)


def _user_message(error: Exception) -> str | None:
    """What to tell about an error that a user can do something about; `None` for a bug, which keeps its traceback."""
    from httpx2 import HTTPError
    from safetensors import SafetensorError

    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name)):
        return (
            f"{error.name} is not installed; from a clone, install the extra {extra!r}: "
            f"pip install -c constraints.txt -e '.[{extra}]'"
        )
    # torch raises a plain RuntimeError where the memory of a CPU is exhausted.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        detail = f" (t{size[0][1:]})" if size else ""
        return f"out of memory{detail}; use smaller images or batches, half precision, or a device with more memory."
    # Errors of the network are OSErrors of huggingface_hub only once the hub has answered.
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError, SafetensorError, HTTPError)):
        return str(error)
    return None


def _extra_of(module: str | None) -> str | None:
    """The extra of this package that installs a module."""
    from packaging.requirements import Requirement

    package = metadata.metadata("latte_flow_hf")
    for extra in package.get_all("Provides-Extra") or []:
        for requirement in map(Requirement, package.get_all("Requires-Dist") or []):
            marker = requirement.marker
            if (
                requirement.name.replace("-", "_") == module
                and marker is not None
                and marker.evaluate({"extra": extra})
            ):
                return extra
    return None


def _conversion(function):
    """Register `convert_x` as the command `convert x`, whose output is checked before the work."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        from latte_flow_hf.files import check_output

        if not kwargs["dry_run"]:
            check_output(kwargs["output"])
        for name in ("source", "template", "backbone", "autoencoder"):
            if name in kwargs:
                _check_source(name, kwargs[name])
        return function(*args, **kwargs)

    return _verb(checked, convert, function.__name__.removeprefix("convert_").replace("_", "-"))


def _check_source(name: str, source: str) -> None:
    """Check that `source` is a folder, or a hub id that can be loaded.

    Without a connection huggingface_hub would try again for a minute; here it gets one attempt, and after that only
    the cache is read.

    Raises:
        `ValueError`: if it is neither a folder nor has the form of an id.
        `OSError`: if the hub cannot be reached and the id is not in the cache.
    """
    if Path(source).is_dir():
        return
    if Path(source).is_file():
        raise ValueError(f"{name} must be a folder or a hub id, and {source} is a file.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(f"{name} must be a folder or a hub id such as user/name, and there is no folder {source!r}.")
    from huggingface_hub import constants, try_to_load_from_cache

    if _is_hub_reachable():
        return
    if not any(isinstance(try_to_load_from_cache(source, file), str) for file in ("model_index.json", "config.json")):
        raise OSError(
            f"{name} {source!r} is neither a folder nor in the cache, and {constants.ENDPOINT} cannot be reached."
        )


def _is_hub_reachable() -> bool:
    """One request to the hub; after a failure this process is offline, as with `HF_HUB_OFFLINE=1`."""
    from httpx2 import TransportError
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except TransportError:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def _check_device(device: str | None) -> str:
    """The device to run on; defaults to the accelerator if there is one.

    Raises:
        `ValueError`: if there is no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = ["cpu"]
    if accelerator is not None:
        indices = range(torch.accelerator.device_count())
        available = [accelerator.type, *(f"{accelerator.type}:{index}" for index in indices), "cpu"]
    if device is not None and device not in available:
        raise ValueError(f"device must be one of {', '.join(available)}, got {device!r}.")
    return device or available[0]


def _load(
    model: str | None,
    device: str | None,
    dtype: str,
    lora: list[str] | None = None,
    fast: bool = False,
    adapter_names: dict[str, str] | None = None,
) -> Any:
    """The pipeline on its device, with its adapters active; what to call these is added to `adapter_names`."""
    if fast and model is not None:
        raise ValueError(f"--fast is for the embedded checkpoint, got --model {model}; give an adapter by --lora.")
    if model is not None:
        _check_source("model", model)
    import diffusers
    import torch
    import transformers

    from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
    from latte_flow_hf.checkpoints import few_step_checkpoint
    from latte_flow_hf.pipelines.lora import load_loras

    device = _check_device(device)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    loras = [few_step_checkpoint()] if fast else []
    loras += lora or []
    pipe = LatteFlowPipeline.from_pretrained(model or tiny_checkpoint(), dtype=getattr(torch, dtype))
    if loras:
        paths = load_loras(pipe, loras)
        if adapter_names is not None:
            adapter_names.update({name: Path(path).name for name, path in paths.items()})
    if fast and not lora:
        # As part of the weights it costs no time, while PEFT would compute it beside every linear layer.
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe.to(device)


def _tell(is_json: bool, text: str, event: dict[str, Any]) -> None:
    """Print for people, or for programs."""
    if is_json:
        typer.echo(json.dumps(event))
    elif text:
        typer.echo(text)


def _lines() -> Iterator[str]:
    """What the user types, or what a program sends, line by line to the end of the input. Ctrl-C ends it too."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits lines and remembers them.
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return


@_verb
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("outputs/demo"),
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Generate images of a few prompts with the embedded checkpoint, and ask it about them."""
    from latte_flow_hf.checkpoints import few_step_checkpoint, tiny_checkpoint, verify
    from latte_flow_hf.evaluation.demo import DEMO_PROMPTS, contact_sheet, generate_and_ask, peak_memory_gb
    from latte_flow_hf.files import check_output, save_image
    from latte_flow_hf.pipelines.image_metadata import record_call, record_pipeline, write_metadata

    check_output(output / "contact-sheet.png", replace=True)
    start = time.perf_counter()
    for folder in [tiny_checkpoint(), *([few_step_checkpoint()] if fast else [])]:
        verify(folder)
    names: dict[str, str] = {}
    pipe = _load(None, device, dtype, fast=fast, adapter_names=names)
    loaded = f"the embedded checkpoint{' and its adapter' if fast else ''}"
    typer.echo(f"verified and loaded {loaded} in {time.perf_counter() - start:.1f} s", err=is_json)
    record = record_pipeline(pipe, names)
    items = []
    for number, prompt in enumerate(DEMO_PROMPTS):
        start = time.perf_counter()
        item = generate_and_ask(pipe, prompt, seed + number)
        asking = time.perf_counter() - start - item.seconds
        items.append(item)
        path = output / f"{number}-{prompt.replace(' ', '-')}.png"
        write_metadata(item.image, record_call(pipe, record, prompt, seed + number), path)
        verdict = "correct" if item.is_correct else "NOT correct"
        lines = [f"{prompt}: {verdict} (generated in {item.seconds:.2f} s, asked in {asking:.2f} s)"]
        answers = [
            {"question": question.question, "answer": answer, "is_correct": answer == question.answer}
            for question, answer in zip(item.questions, item.answers)
        ]
        lines += [f"    {it['question']}  {it['answer']}  {'✓' if it['is_correct'] else '✗'}" for it in answers]
        event = {"path": str(path.absolute()), "prompt": prompt, "is_correct": item.is_correct, "answers": answers}
        _tell(is_json, "\n".join(lines), {**event, "seconds": round(item.seconds, 3)})
    save_image(contact_sheet(items), output / "contact-sheet.png")
    num_correct = sum(item.is_correct for item in items)
    right = [answer == question.answer for item in items for question, answer in zip(item.questions, item.answers)]
    slowest, memory = max(item.seconds for item in items), peak_memory_gb()
    _tell(
        is_json,
        f"{num_correct} of {len(items)} images and {sum(right)} of {len(right)} answers are correct; "
        f"slowest image {slowest:.2f} s, peak memory {memory:.2f} GB\n"
        f"images: {output.absolute()}, all of them in {(output / 'contact-sheet.png').absolute()}",
        {
            "num_images": len(items),
            "num_correct": num_correct,
            "num_answers": len(right),
            "num_correct_answers": sum(right),
            "slowest_seconds": round(slowest, 3),
            "peak_memory_gb": round(memory, 3),
            "contact_sheet": str((output / "contact-sheet.png").absolute()),
        },
    )


@_verb
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text file with one prompt per line, instead of the prompt."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="PNG file of this command: generates the same image again; options that are given win over its own.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Image file, out.png if left out; with --prompts a folder, out."),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of all weights, float32 if left out. bfloat16 takes half the memory and is faster on a GPU, but "
            "slower on most CPUs."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first image's noise, 0 if left out; image i has seed + i.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Image shown before the prompt; may be repeated."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Image to start from, instead of noise.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With --source: mask of its size; only white is generated."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="With --source: share of the steps to take, above 0, up to 1."),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, max=1000, help="Images per prompt; their files are numbered if several.")
    ] = 1,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; faster on a GPU if several.")] = 1,
    lora: Lora = None,
    fast: Fast = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --like: generate although the model or versions differ.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Generate images of a prompt, or of a file of prompts; of a file, existing images are not generated again.

    PNG files say how they were made, and --like makes the same image again.
    """
    if sum(given is not None for given in (prompt, prompts)) != 1 and (like is None or prompts is not None):
        raise typer.BadParameter("give either a prompt or --prompts.")
    if prompts is not None and image:
        raise typer.BadParameter("--image goes with one prompt, not with --prompts.")
    if prompts is not None and source is not None:
        raise typer.BadParameter("--source goes with one prompt, not with --prompts.")
    if prompts is not None and like is not None:
        raise typer.BadParameter("--like repeats one image; it does not go with --prompts.")
    if source is None and (mask is not None or strength is not None):
        raise typer.BadParameter("--mask and --strength go with --source.")
    if like is None and allow_changes:
        raise typer.BadParameter("--allow-changes goes with --like.")
    if prompts is not None:
        call = {
            "negative_prompt": negative_prompt,
            "height": size,
            "width": size,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }
        folder, first, weights = output or Path("out"), seed or 0, dtype or "float32"
        _generate_many(
            prompts, folder, model, device, weights, lora, fast, first, num_images, batch_size, call, is_json
        )
        return
    from latte_flow_hf.checkpoints import few_step_checkpoint
    from latte_flow_hf.cli.generation import Request, check_adapters_given, check_same, repeat, use_weights
    from latte_flow_hf.files import check_image_output
    from latte_flow_hf.pipelines.image_metadata import read_metadata, record_pipeline

    output = output or Path("out.png")
    paths = [output]
    if num_images > 1:
        paths = [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(num_images)]
    for path in paths:
        check_image_output(path)
        if like is not None and path.exists() and path.samefile(like):
            raise ValueError(f"output {path} is the image to repeat, and would be replaced; choose another by -o.")
    given: dict[str, Any] = {
        "prompt": prompt,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": size,
        "width": size,
        "images": tuple(map(str, image or ())),
        "source": None if source is None else str(source),
        "mask": None if mask is None else str(mask),
        "strength": strength,
    }
    original = None if like is None else read_metadata(like)
    if original is None:
        request = Request(**{**given, "seed": seed or 0})
    else:
        request = repeat(original, **given)
        fast = check_adapters_given(original, model, lora, fast)
        dtype = dtype or original.pipeline.dtype  # type: ignore[assignment]
    adapter_names: dict[str, str] = {}
    pipe = _load(model, device, dtype or "float32", lora, fast, adapter_names)
    if original is not None and lora:
        use_weights(pipe, original, [*([few_step_checkpoint()] if fast else []), *lora])
    record = record_pipeline(pipe, adapter_names)
    if original is not None:
        if not allow_changes:
            check_same(original, record, request)
        if original.batch_size > 1:
            typer.echo(f"{like} was generated in a batch of {original.batch_size}: the same up to rounding.", err=True)
    for start in range(0, num_images, batch_size):
        _generate_batch(pipe, request, record, start, paths[start : start + batch_size], is_json)


def _generate_batch(pipe: Any, request: Any, record: Any, first: int, paths: list[Path], is_json: bool) -> None:
    """Generate images `first`, `first` + 1, ... of a request, say how, and write them."""
    from latte_flow_hf.files import save_image
    from latte_flow_hf.pipelines.image_metadata import write_metadata

    start = time.perf_counter()
    made = [request.record(pipe, record, first + index, len(paths)) for index in range(len(paths))]
    seeds = f"seed {made[0].seed}" if len(made) == 1 else f"seeds {made[0].seed} to {made[-1].seed}"
    typer.echo(
        f"generating {request.prompt!r}: {made[0].describe_sampling()}, {seeds}; {record.model} on {record.device}",
        err=True,
    )
    images = request.run(pipe, first, len(paths))
    seconds = time.perf_counter() - start
    for path, generated, settings in zip(paths, images, made):
        size = f"({generated.width}x{generated.height})"
        if path.suffix.lower() == ".png":
            write_metadata(generated, settings, path)
        else:
            save_image(generated, path)
            typer.echo(f"{path} does not say how it was made: only .png files can.", err=True)
        event = {"path": str(path.absolute()), "seconds": round(seconds, 3), **settings.model_dump(mode="json")}
        _tell(is_json, f"wrote {path.absolute()} {size} in {seconds:.1f} s", event)


def _generate_many(
    prompts: Path,
    folder: Path,
    model: str | None,
    device: str | None,
    dtype: str,
    lora: list[str] | None,
    fast: bool,
    seed: int,
    num_images: int,
    batch_size: int,
    call: dict[str, Any],
    is_json: bool,
) -> None:
    from accelerate import PartialState

    from latte_flow_hf.pipelines.batch_generation import check_image_folder, generate_images, read_prompts

    check_image_folder(folder)
    texts = read_prompts(prompts)
    names: dict[str, str] = {}
    # Each process has its own accelerator, unless a device is given.
    pipe = _load(model, "cpu" if device is None else device, dtype, lora, fast, names)
    pipe.set_progress_bar_config(disable=True)
    num_new, num_existing = generate_images(pipe, texts, folder, seed, num_images, batch_size, device, names, **call)
    if PartialState().is_main_process:
        event = {"folder": str(folder.absolute()), "num_new": num_new, "num_existing": num_existing}
        _tell(is_json, f"wrote {folder}: {num_new} new images, {num_existing} existed", event)


@_verb
def chat(
    question: Annotated[str | None, typer.Argument(help="One question; starts a conversation if left out.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", exists=True, dir_okay=False, help="Image to show; may be repeated."),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    lora: Lora = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for images that are generated by `/paint`.")
    ] = Path("outputs/chat"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first of these images; each has the next.")] = 0,
    is_json: Json = False,
) -> None:
    """Ask about images; answers are streamed. In a conversation, `/paint PROMPT` generates an image; see `/help`."""
    names: dict[str, str] = {}
    pipe = _load(model, device, dtype, lora, adapter_names=names)
    from latte_flow_hf.cli.conversation import HELP, Conversation

    tell = functools.partial(_tell, is_json)
    conversation = Conversation(pipe, output, tell, not is_json, max_new_tokens, seed, names)
    conversation.shown = [str(path) for path in image or []]
    if question is not None:
        conversation.ask(question)
        return
    if not is_json:
        typer.echo(f"Type a question, or one of these:\n{HELP}")
    for line in _lines():
        try:
            if not conversation.say(line):
                return
        except KeyboardInterrupt:
            typer.echo("\nstopped; the line is forgotten.", err=True)
        except Exception as error:
            message = _user_message(error)
            if message is None:
                raise
            if is_json:
                _tell(True, "", {"error": message})
            else:
                typer.secho(f"Error: {' '.join(message.split())}", fg="red", err=True)


@_verb
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of a pipeline; the embedded checkpoint if left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The name by which requests ask for the model; that of its folder if left out.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    adapters: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of adapters that requests ask for by `model:adapter`."
        ),
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=1, help="Adapters that are loaded at a time.")] = 8,
    max_images: Annotated[int, typer.Option(min=1, help="Images that are generated at a time.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; others are told to retry.")] = 128,
    max_size: Annotated[
        int | None, typer.Option(min=1, help="Largest height and width in pixels; twice the default's if left out.")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Largest number of sampling steps.")] = 200,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LATTE_FLOW_API_KEY",
            metavar="KEY",
            help="Key that requests must have; may be repeated. In the environment, other users cannot see it.",
        ),
    ] = None,
    url_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Host from which images of requests may be fetched; may be repeated."),
    ] = None,
) -> None:
    """Serve images and chat to many users, with the interface of OpenAI."""
    from latte_flow_hf.serving.server import bind, create_app, run
    from latte_flow_hf.serving.settings import ServerSettings

    settings = ServerSettings(
        model_name=name or ("tinyworld" if model is None else Path(model).name),
        api_keys=tuple(api_key or ()),
        max_size=max_size,
        max_steps=max_steps,
        url_hosts=tuple(url_host or ()),
    )
    # Before the model is loaded, which may take minutes.
    listening = bind(host, port)
    from latte_flow_hf.serving.engine import Engine

    pipe = _load(model, device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, max_images, max_waiting, adapters=adapters, max_adapters=max_adapters)
    typer.echo(f"serving {settings.model_name} on http://{host}:{listening.getsockname()[1]}/v1")
    run(create_app(engine, settings), listening)


@_verb
def studio(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters that visitors can choose, each a PEFT folder.")
    ] = None,
    compare_with: Annotated[
        list[str] | None, typer.Option(help="Another model for the tab Compare; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD",
            help="Ask for them. Better set LATTE_FLOW_STUDIO_AUTH: other users of this machine see arguments.",
        ),
    ] = None,
) -> None:
    """Open the studio: a page in the browser for images, conversation, and what the experts do."""
    from latte_flow_hf.app.app import check_port, launch, make_studio, read_auth

    login = read_auth(auth)
    check_port(host, port)
    if adapters is not None and not adapters.is_dir():
        raise ValueError(f"adapters must be a folder, and there is none at {adapters}.")
    import gradio  # noqa: F401

    from latte_flow_hf.checkpoints import few_step_checkpoint

    others = {other: _load(other, device, dtype) for other in compare_with or []}
    made = make_studio(_load(model, device, dtype), model or "tiny world", adapters, others)
    if model is None:
        made.shelf.add("few steps", Path(few_step_checkpoint()))
    launch(made, host, port, login)


@_verb
def info(
    model: Model = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Also check the weights against the hashes stored in them.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Show the experts of a checkpoint: their intervals, layers and sizes."""
    if model is not None:
        _check_source("model", model)
    from latte_flow_hf import tiny_checkpoint
    from latte_flow_hf.checkpoints import describe, inspect_checkpoint, verify

    checkpoint = model or tiny_checkpoint()
    found = inspect_checkpoint(checkpoint)
    verified = verify(checkpoint) if check else []
    event = {**found, "verified": [line.removeprefix("verified").strip() for line in verified]} if check else found
    _tell(is_json, "\n".join([*describe(found), *verified]), event)


TrainedFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the finished pipeline or adapter; must not exist.")
]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Resume although the recipe or the starting model has changed.")
]


@_verb
def train(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file, such as those in recipes/.")
    ],
    output: TrainedFolder,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and logs; defaults to runs/ and the name of the recipe."),
    ] = None,
    allow_changes: AllowChanges = False,
) -> None:
    """Train a model. Started again, the command resumes from the last checkpoint."""
    from latte_flow_hf.training.recipe import Recipe

    _train(recipe, Recipe.from_yaml(recipe), output, work_dir, allow_changes)


@_verb
def distill(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file with a section `distillation`.")
    ],
    output: TrainedFolder,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for trajectories, checkpoints and logs; defaults to runs/ and the recipe's name."),
    ] = None,
    allow_changes: AllowChanges = False,
) -> None:
    """Train a model to generate in few steps what a teacher generates in many. Resumes as `train` does."""
    from latte_flow_hf.training.recipe import Recipe

    settings = Recipe.from_yaml(recipe)
    if settings.distillation is None:
        raise ValueError(f"recipe {recipe} has no section `distillation`; use `latte-flow train` for it.")
    _train(recipe, settings, output, work_dir, allow_changes)


def _train(recipe: Path, settings: Any, output: Path, work_dir: Path | None, allow_changes: bool) -> None:
    from accelerate import PartialState

    from latte_flow_hf.files import check_output
    from latte_flow_hf.training import train

    check_output(output)
    sources = {f"model: {name}": getattr(settings.model, name) for name in ("pipeline", "backbone", "autoencoder")}
    if settings.distillation is not None:
        sources["distillation: teacher"] = settings.distillation.teacher
        sources["distillation: student"] = settings.distillation.student
    for name, source in sources.items():
        if source not in (None, "tinyworld"):
            _check_source(f"recipe {recipe}: {name}", source)
    result = train.train(settings, work_dir or Path("runs", recipe.stem), output, allow_changes)
    if PartialState().is_main_process:
        typer.echo(f"wrote {result}")


@_verb
def evaluate(
    model: Model = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts, the images and the noise.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all results.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    lora: Lora = None,
    fast: Fast = False,
    is_json: Json = False,
) -> None:
    """Evaluate a checkpoint on the tiny world: accuracy of generated images and of answers."""
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"output must be a .json file, got {str(output)!r}.")
    from latte_flow_hf.evaluation import tinyworld
    from latte_flow_hf.files import check_output, write_json

    if output is not None:
        check_output(output, replace=True)
    pipe = _load(model, device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    generation = tinyworld.evaluate_generation(pipe, tinyworld.generation_prompts(seed), seed, **call)
    variety = tinyworld.evaluate_variety(pipe, "a red circle left of a blue square", **call)
    understanding = tinyworld.evaluate_understanding(pipe, tinyworld.understanding_questions(seed))
    results = {"seed": seed, **call, "generation": generation, "variety": variety, "understanding": understanding}
    lines = [
        f"{name:14}{kind:17}{result['accuracy']:7.1%} of {result['count']}"
        for name, kinds in (("generation", generation), ("understanding", understanding))
        for kind, result in kinds.items()
    ]
    lines.append(
        f"{'variety':14}{variety['num_distinct']} of {variety['num_images']} images of one prompt are distinct, with "
        f"a mean distance of {variety['mean_distance']:.2f} of 255"
    )
    _tell(is_json, "\n".join(lines), results)
    if output is not None:
        write_json(results, output)


def _check_safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise typer.BadParameter(f"must be a .safetensors file, got {str(path)!r}.")
    return path


Pipeline = Annotated[str, typer.Argument(help="Folder or hub id of a pipeline.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must not exist.")]
OutputFile = Annotated[
    Path,
    typer.Option("--output", "-o", callback=_check_safetensors, help="The .safetensors file to make; must not exist."),
]
Experts = Annotated[
    int,
    typer.Option(min=1, help="K, the number of experts; must divide the tower's layers, or give --layers-per-expert."),
]


def _parse_numbers(text: str) -> Any:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"must be whole numbers with commas between them, such as 8,7,7,6, got {text!r}.")
    return [int(number) for number in text.split(",")]


LayersPerExpert = Annotated[
    Any,
    typer.Option(parser=_parse_numbers, metavar="N,N,...", help="Number of layers of each expert; equal if left out."),
]
TowerLayers = Annotated[
    Any,
    typer.Option(
        parser=_parse_numbers,
        metavar="I,I,...",
        help="Layers of the backbone that the tower has, by index from 0; all if left out.",
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML file of key pairs; the package's own table if left out."),
]
TowerOnly = Annotated[bool, typer.Option("--tower-only", help="The state dict holds only the tower.")]
ShardSize = Annotated[str, typer.Option(help="Largest weights file, such as 500MB.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")]


def _execute(plan: Any, output: Path, dry_run: bool, max_shard_size: str = "5GB") -> None:
    if dry_run:
        for line in [f"{output} would hold:", *plan.describe(max_shard_size)]:
            typer.echo(line)
    else:
        result = plan.write(output, max_shard_size)
        typer.echo(f"wrote {output}: {result}")


@_conversion
def convert_init(
    backbone: Annotated[str, typer.Argument(help="Folder or hub id of the vision-language model.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder or hub id of the autoencoder.")],
    output: OutputFolder,
    experts: Experts = 4,
    layers_per_expert: LayersPerExpert = None,
    tower_layers: TowerLayers = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights that are new and random.")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A new pipeline from a backbone and an autoencoder."""
    from latte_flow_hf.conversion import initialize

    layers = {"layers_per_expert": layers_per_expert, "tower_layers": tower_layers}
    _execute(initialize(backbone, autoencoder, experts, seed, **layers), output, dry_run, max_shard_size)


@_conversion
def convert_from_original(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A flat state dict: .safetensors, .pt, .pth or .bin."),
    ],
    template: Annotated[str, typer.Argument(help="Folder or hub id of a pipeline for all but the weights.")],
    output: OutputFolder,
    table: Table = None,
    tower_only: TowerOnly = False,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A pipeline from a flat training state dict."""
    from latte_flow_hf.conversion import from_original

    _execute(from_original(checkpoint, template, table, tower_only), output, dry_run, max_shard_size)


@_conversion
def convert_to_original(
    source: Pipeline, output: OutputFile, table: Table = None, tower_only: TowerOnly = False, dry_run: DryRun = False
) -> None:
    """A flat training state dict from a pipeline."""
    from latte_flow_hf.conversion import to_original

    _execute(to_original(source, table, tower_only), output, dry_run)


@_conversion
def convert_regroup(
    source: Pipeline,
    output: OutputFolder,
    experts: Experts,
    layers_per_expert: LayersPerExpert = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """The same pipeline with another number of experts."""
    from latte_flow_hf.conversion import regroup

    _execute(regroup(source, experts, layers_per_expert=layers_per_expert), output, dry_run, max_shard_size)


@_conversion
def convert_extract_backbone(
    source: Pipeline, output: OutputFolder, max_shard_size: ShardSize = "5GB", dry_run: DryRun = False
) -> None:
    """The unchanged backbone as a stock transformers folder."""
    from latte_flow_hf.conversion import extract_backbone

    _execute(extract_backbone(source), output, dry_run, max_shard_size)


@_conversion
def convert_to_single_file(source: Pipeline, output: OutputFile, dry_run: DryRun = False) -> None:
    """A whole pipeline in one file."""
    from latte_flow_hf.conversion import to_single_file

    _execute(to_single_file(source), output, dry_run)


@_conversion
def convert_from_single_file(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file made by `to-single-file`.")],
    output: OutputFolder,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A pipeline from one file."""
    from latte_flow_hf.conversion import from_single_file

    _execute(from_single_file(file), output, dry_run, max_shard_size)


@_verb
def publish(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A saved pipeline.")],
    repo_id: Annotated[str, typer.Option(help="Repository user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Add the code, to load it with trust_remote_code=True."),
    ] = False,
) -> None:
    """Upload a pipeline to the hub, with a model card if it has none. Log in with `hf auth login`, or set HF_TOKEN."""
    from latte_flow_hf.pipelines.loading import check_pipeline_files
    from latte_flow_hf.publishing import publish

    check_pipeline_files(folder)
    if not _is_hub_reachable():
        raise OSError("the hub cannot be reached; nothing was published.")
    typer.echo(f"published {publish(folder, repo_id, private=private or None, with_code=with_code)}")


if __name__ == "__main__":
    app()
