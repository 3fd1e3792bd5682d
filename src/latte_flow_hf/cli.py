# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The command `latte-flow`. Every verb calls functions that can be imported on their own.

The package is imported inside the verbs, so that `--help` is fast.
"""

import functools
import time
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    help="Generate images and chat with LaTtE-Flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a pipeline; the embedded checkpoint if left out."),
]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise.")]


convert = typer.Typer(help="Convert checkpoints from and to other layouts.", no_args_is_help=True)
app.add_typer(convert, name="convert")


def _verb(function, group: typer.Typer = app, name: str | None = None):
    """Register a verb whose user errors end in one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error

    return group.command(name)(wrapped)


def _conversion(function):
    """Register `convert_x` as the command `convert x`."""
    return _verb(function, convert, function.__name__.removeprefix("convert_").replace("_", "-"))


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
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("outputs/demo"),
    seed: Seed = 0,
) -> None:
    """Generate images of a few prompts with the embedded checkpoint, and ask it about them."""
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    from latte_flow_hf.checkpoints import tiny_checkpoint, verify

    verify(tiny_checkpoint())
    pipe = _load(None)
    from latte_flow_hf.evaluation.demo import DEMO_PROMPTS, contact_sheet, generate_and_ask, peak_memory_gb
    from latte_flow_hf.files import save_image

    typer.echo(f"verified and loaded the embedded checkpoint in {time.perf_counter() - start:.1f} s")
    items = []
    for number, prompt in enumerate(DEMO_PROMPTS):
        start = time.perf_counter()
        item = generate_and_ask(pipe, prompt, seed + number)
        asking = time.perf_counter() - start - item.seconds
        items.append(item)
        save_image(item.image, output / f"{number}-{prompt.replace(' ', '-')}.png")
        verdict = "correct" if item.is_correct else "NOT correct"
        typer.echo(f"{prompt}: {verdict} (generated in {item.seconds:.2f} s, asked in {asking:.2f} s)")
        for question, answer in zip(item.questions, item.answers):
            typer.echo(f"    {question.question}  {answer}  {'✓' if answer == question.answer else '✗'}")
    save_image(contact_sheet(items), output / "contact-sheet.png")
    num_correct = sum(item.is_correct for item in items)
    answers = [answer == question.answer for item in items for question, answer in zip(item.questions, item.answers)]
    typer.echo(
        f"{num_correct} of {len(items)} images and {sum(answers)} of {len(answers)} answers are correct; "
        f"slowest image {max(item.seconds for item in items):.2f} s, peak memory {peak_memory_gb():.2f} GB"
    )
    typer.echo(f"images: {output}, all of them in {output / 'contact-sheet.png'}")


@_verb
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, instead of the prompt.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Image file, out.png if left out; with --prompts a folder, out."),
    ] = None,
    model: Model = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 is none.")] = 4.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image shown before the prompt; may be repeated.")] = None,
    num_images: Annotated[int, typer.Option(help="Images per prompt; their files are numbered if several.")] = 1,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.")] = None,
    batch_size: Annotated[int, typer.Option(help="With --prompts: images per batch.")] = 1,
) -> None:
    """Generate images of a prompt, or of a file of prompts; of a file, existing images are not generated again."""
    if (prompt is None) == (prompts is None):
        raise ValueError("give either a prompt or --prompts.")
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    if prompts is not None:
        _generate_many(prompts, output or Path("out"), model, image, seed, num_images, batch_size, call)
        return
    from PIL import Image

    from latte_flow_hf.files import check_output, save_image

    output = output or Path("out.png")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"output must be an image file such as out.png, got {str(output)!r}.")
    check_output(output, replace=True)
    pipe = _load(model)
    import torch

    images = pipe(
        prompt,
        image=[str(path) for path in image] if image else None,
        num_images_per_prompt=num_images,
        generator=torch.Generator().manual_seed(seed),
        **call,
    ).images
    for number, generated in enumerate(images):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{number}")
        save_image(generated, path)
        typer.echo(f"wrote {path} ({generated.width}x{generated.height})")


def _generate_many(
    prompts: Path,
    folder: Path,
    model: str | None,
    image: list[Path] | None,
    seed: int,
    num_images: int,
    batch_size: int,
    call: dict[str, Any],
) -> None:
    from accelerate import PartialState

    from latte_flow_hf.pipelines.batch_generation import check_image_folder, generate_images, read_prompts

    if image:
        raise ValueError("--image goes with one prompt, not with --prompts.")
    check_image_folder(folder)
    texts = read_prompts(prompts)
    pipe = _load(model)
    pipe.set_progress_bar_config(disable=True)
    num_new, num_existing = generate_images(pipe, texts, folder, seed, num_images, batch_size, **call)
    if PartialState().is_main_process:
        typer.echo(f"wrote {folder}: {num_new} new images, {num_existing} existed")


@_verb
def chat(
    question: Annotated[str | None, typer.Argument(help="One question; starts a conversation if left out.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Image to show; may be repeated.")] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")] = 256,
) -> None:
    """Ask about images; answers are streamed. In a conversation, `/image PATH` shows another image."""
    pipe = _load(model)
    from transformers import TextStreamer

    streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    shown = [str(path) for path in image or []]
    messages: list[dict] = []

    def ask(text: str) -> None:
        (turn,) = pipe.processor.conversation(text, shown)
        answer = pipe.chat([*messages, turn], streamer=streamer, max_new_tokens=max_new_tokens)
        messages.extend([turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
        shown.clear()

    if question is not None:
        ask(question)
        return
    typer.echo("Type a question. `/image PATH` shows an image, an empty line ends the conversation.")
    while text := _read_line():
        if text.startswith("/image "):
            path = text.removeprefix("/image ").strip()
            try:
                pipe.processor.conversation("", path)
                shown.append(path)
            except ValueError as error:
                typer.secho(f"Error: {error}", fg="red", err=True)
        else:
            ask(text)


@_verb
def info(
    model: Model = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Also check the weights against the hashes stored in them.")
    ] = False,
) -> None:
    """Show the experts of a checkpoint: their intervals, layers and sizes."""
    from latte_flow_hf import tiny_checkpoint
    from latte_flow_hf.checkpoints import describe, verify

    checkpoint = model or tiny_checkpoint()
    for line in describe(checkpoint):
        typer.echo(line)
    for line in verify(checkpoint) if check else []:
        typer.echo(line)


@_verb
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the finished pipeline or adapter; must not exist.")
    ],
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and logs; defaults to runs/ and the name of the recipe."),
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume although the recipe or the starting model has changed."),
    ] = False,
) -> None:
    """Train a model. Started again, the command resumes from the last checkpoint."""
    from accelerate import PartialState

    from latte_flow_hf.training import train
    from latte_flow_hf.training.recipe import Recipe

    result = train.train(Recipe.from_yaml(recipe), work_dir or Path("runs", recipe.stem), output, allow_changes)
    if PartialState().is_main_process:
        typer.echo(f"wrote {result}")


@_verb
def evaluate(
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, the images and the noise.")] = 1,
    steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = 40,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 4.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all results.")] = None,
) -> None:
    """Evaluate a checkpoint on the tiny world: accuracy of generated images and of answers."""
    from latte_flow_hf.files import check_output, write_json

    if output is not None:
        check_output(output, replace=True)
    pipe = _load(model)
    from latte_flow_hf.evaluation import tinyworld

    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    generation = tinyworld.evaluate_generation(pipe, tinyworld.generation_prompts(seed), seed, **call)
    variety = tinyworld.evaluate_variety(pipe, "a red circle left of a blue square", **call)
    understanding = tinyworld.evaluate_understanding(pipe, tinyworld.understanding_questions(seed))
    for name, results in (("generation", generation), ("understanding", understanding)):
        for kind, result in results.items():
            typer.echo(f"{name:14}{kind:17}{result['accuracy']:7.1%} of {result['count']}")
    typer.echo(f"{'variety':14}{variety['num_distinct']} of {variety['num_images']} images of one prompt are distinct")
    if output is not None:
        results = {"seed": seed, **call, "generation": generation, "variety": variety, "understanding": understanding}
        write_json(results, output)


Pipeline = Annotated[str, typer.Argument(help="Folder or hub id of a pipeline.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must not exist.")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to make; must not exist.")]
Experts = Annotated[int, typer.Option(help="K, the number of experts; must divide the backbone's layers.")]
Table = Annotated[Path | None, typer.Option(help="YAML file of key pairs; the package's own table if left out.")]
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
    seed: Annotated[int, typer.Option(help="Seed of the weights that are new and random.")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A new pipeline from a backbone and an autoencoder."""
    from latte_flow_hf.conversion import initialize

    _execute(initialize(backbone, autoencoder, experts, seed), output, dry_run, max_shard_size)


@_conversion
def convert_from_original(
    checkpoint: Annotated[Path, typer.Argument(help="A flat state dict: .safetensors, .pt, .pth or .bin.")],
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
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """The same pipeline with another number of experts."""
    from latte_flow_hf.conversion import regroup

    _execute(regroup(source, experts), output, dry_run, max_shard_size)


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
    file: Annotated[Path, typer.Argument(help="A file made by `to-single-file`.")],
    output: OutputFolder,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """A pipeline from one file."""
    from latte_flow_hf.conversion import from_single_file

    _execute(from_single_file(file), output, dry_run, max_shard_size)


@_verb
def publish(
    folder: Annotated[Path, typer.Argument(help="A saved pipeline.")],
    repo_id: Annotated[str, typer.Option(help="Repository user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Add the code, to load it with trust_remote_code=True."),
    ] = False,
) -> None:
    """Upload a pipeline to the hub, with a model card if it has none. Log in with `hf auth login`, or set HF_TOKEN."""
    from latte_flow_hf.publishing import publish

    typer.echo(f"published {publish(folder, repo_id, private=private or None, with_code=with_code)}")


# `accelerate launch -m latte_flow_hf.cli train ...`
if __name__ == "__main__":
    app()
