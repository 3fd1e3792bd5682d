# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `demo`, `generate` and `chat`."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Device, Dtype, Fast, Guidance, Json, Lora, Model, Seed, Steps
from .verbs import load_pipeline, tell, user_message, verb


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


@verb
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
    pipe = load_pipeline(None, device, dtype, fast=fast, adapter_names=names)
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
        tell(is_json, "\n".join(lines), {**event, "seconds": round(item.seconds, 3)})
    save_image(contact_sheet(items), output / "contact-sheet.png")
    num_correct = sum(item.is_correct for item in items)
    right = [answer == question.answer for item in items for question, answer in zip(item.questions, item.answers)]
    slowest, memory = max(item.seconds for item in items), peak_memory_gb()
    tell(
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


@verb
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
    pipe = load_pipeline(model, device, dtype or "float32", lora, fast, adapter_names)
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
        tell(is_json, f"wrote {path.absolute()} {size} in {seconds:.1f} s", event)


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
    pipe = load_pipeline(model, "cpu" if device is None else device, dtype, lora, fast, names)
    pipe.set_progress_bar_config(disable=True)
    num_new, num_existing = generate_images(pipe, texts, folder, seed, num_images, batch_size, device, names, **call)
    if PartialState().is_main_process:
        event = {"folder": str(folder.absolute()), "num_new": num_new, "num_existing": num_existing}
        tell(is_json, f"wrote {folder}: {num_new} new images, {num_existing} existed", event)


@verb
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
    pipe = load_pipeline(model, device, dtype, lora, adapter_names=names)
    from latte_flow_hf.cli.conversation import HELP, Conversation

    conversation = Conversation(
        pipe, output, functools.partial(tell, is_json), not is_json, max_new_tokens, seed, names
    )
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
            message = user_message(error)
            if message is None:
                raise
            if is_json:
                tell(True, "", {"error": message})
            else:
                typer.secho(f"Error: {' '.join(message.split())}", fg="red", err=True)
