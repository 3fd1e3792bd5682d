# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The command `latte-flow`. Thin: every verb calls functions that are importable by themselves.

The package is imported inside the verbs, so that `--help` answers at once.
"""

import functools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    help="Paint and chat with LaTtE-Flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a pipeline; the embedded checkpoint if left out."),
]
Seed = Annotated[int, typer.Option(help="Seed of the starting noise.")]


def _verb(function):
    """Register a verb whose user errors end in one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error

    return app.command()(wrapped)


def _load(model: str | None) -> Any:
    import diffusers
    import transformers

    from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    return LatteFlowPipeline.from_pretrained(model or tiny_checkpoint())


def _read_line() -> str:
    """The user's next line; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


@_verb
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("outputs/demo"),
    seed: Seed = 0,
) -> None:
    """Paint a handful of prompts with the embedded checkpoint and ask it about its own pictures."""
    start = time.perf_counter()
    pipe = _load(None)
    from latte_flow_hf.tinyworld.demo import DEMO_PROMPTS, contact_sheet, paint_and_ask, peak_memory_gb, save_whole

    typer.echo(f"loaded the embedded checkpoint in {time.perf_counter() - start:.1f} s")
    output.mkdir(parents=True, exist_ok=True)
    items = []
    for number, prompt in enumerate(DEMO_PROMPTS):
        start = time.perf_counter()
        item = paint_and_ask(pipe, prompt, seed + number)
        asking = time.perf_counter() - start - item.seconds
        items.append(item)
        save_whole(item.image, output / f"{number}-{prompt.replace(' ', '-')}.png")
        verdict = "as asked" if item.painted_right else "NOT as asked"
        typer.echo(f"{prompt}: {verdict} (painted in {item.seconds:.2f} s, asked in {asking:.2f} s)")
        for question, answer in zip(item.asked, item.answers):
            typer.echo(f"    {question.question}  {answer}  {'✓' if answer == question.answer else '✗'}")
    save_whole(contact_sheet(items), output / "contact-sheet.png")
    painted = sum(item.painted_right for item in items)
    answered = [a == q.answer for item in items for q, a in zip(item.asked, item.answers)]
    typer.echo(
        f"{painted} of {len(items)} pictures as asked, {sum(answered)} of {len(answered)} answers right; "
        f"slowest picture {max(item.seconds for item in items):.2f} s, peak memory {peak_memory_gb():.2f} GB"
    )
    typer.echo(f"pictures: {output}, all of them on {output / 'contact-sheet.png'}")


@_verb
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture's file.")] = Path("out.png"),
    model: Model = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 is none.")] = 4.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture that goes before the prompt; may repeat.")] = None,
    num_images: Annotated[int, typer.Option(help="How many pictures; numbered if several.")] = 1,
    size: Annotated[int | None, typer.Option(help="Side of the picture in pixels.")] = None,
) -> None:
    """Paint a prompt."""
    if not output.suffix:
        raise ValueError(f"output must name a picture file such as out.png, got {str(output)!r}.")
    pipe = _load(model)
    import torch

    from latte_flow_hf.tinyworld.demo import save_whole

    images = pipe(
        prompt,
        image=[str(path) for path in image] if image else None,
        negative_prompt=negative_prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=num_images,
        generator=torch.Generator().manual_seed(seed),
    ).images
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(images):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{number}")
        save_whole(picture, path)
        typer.echo(f"wrote {path} ({picture.width}x{picture.height})")


@_verb
def chat(
    question: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Picture to show; may repeat.")] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask about pictures; the answer streams. In a conversation, `/image PATH` shows another one."""
    pipe = _load(model)
    from transformers import TextStreamer

    streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    shown = [str(path) for path in image or []]
    messages: list[dict] = []

    def ask(words: str) -> None:
        (turn,) = pipe.processor.conversation(words, shown)
        answer = pipe.chat([*messages, turn], streamer=streamer, max_new_tokens=max_new_tokens)
        messages.extend([turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
        shown.clear()

    if question is not None:
        ask(question)
        return
    typer.echo("Ask away. `/image PATH` shows a picture, an empty line ends.")
    while words := _read_line():
        if words.startswith("/image "):
            path = words.removeprefix("/image ").strip()
            try:
                pipe.processor.conversation("", path)
                shown.append(path)
            except ValueError as error:
                typer.secho(f"Error: {error}", fg="red", err=True)
        else:
            ask(words)


@_verb
def info(model: Model = None) -> None:
    """Show a checkpoint's experts, their intervals, layers and sizes."""
    from latte_flow_hf import tiny_checkpoint
    from latte_flow_hf.checkpoints import describe

    for line in describe(model or tiny_checkpoint()):
        typer.echo(line)


@_verb
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the finished pipeline or adapter; must not exist.")
    ],
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for what a resumed run goes on from; runs/ and the recipe's name if left out."),
    ] = None,
) -> None:
    """Train by a recipe; started again, it goes on where it was stopped."""
    from latte_flow_hf.training.train import Recipe, is_recipe, read_sections
    from latte_flow_hf.training.train import train as train_by

    sections = read_sections(recipe)
    if is_recipe(sections):
        made = train_by(Recipe.from_dict(sections, f"recipe {recipe}"), work_dir or Path("runs", recipe.stem), output)
    else:
        from latte_flow_hf.tinyworld import build

        made = build.build_checkpoint(build.Recipe.from_yaml(recipe), work_dir or Path("runs/tinyworld"), output)
    typer.echo(f"wrote {made}")


@_verb
def evaluate(
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, the pictures and the noise.")] = 1,
    steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 4.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure a checkpoint on the tiny world: prompts painted, questions answered."""
    pipe = _load(model)
    from latte_flow_hf.evaluation import tinyworld

    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    painting = tinyworld.evaluate_painting(pipe, tinyworld.painting_prompts(seed), seed, **call)
    variety = tinyworld.evaluate_variety(pipe, "a red circle left of a blue square", **call)
    understanding = tinyworld.evaluate_understanding(pipe, tinyworld.understanding_questions(seed))
    for name, results in (("painting", painting), ("understanding", understanding)):
        for kind, result in results.items():
            typer.echo(f"{name:14}{kind:17}{result['right']:7.1%} of {result['count']}")
    typer.echo(f"{'variety':14}{variety['different']} of {variety['pictures']} pictures of one prompt differ")
    if output is not None:
        measured = {"seed": seed, **call, "painting": painting, "variety": variety, "understanding": understanding}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(measured, indent=1))


# `accelerate launch -m latte_flow_hf.cli train ...`
if __name__ == "__main__":
    app()
