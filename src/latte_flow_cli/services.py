# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The verbs `serve` and `studio`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Fast, Lora, Model
from .verbs import load_pipeline, verb


@verb
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

    pipe = load_pipeline(model, device, dtype, lora, fast)
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, max_images, max_waiting, adapters=adapters, max_adapters=max_adapters)
    typer.echo(f"serving {settings.model_name} on http://{host}:{listening.getsockname()[1]}/v1")
    run(create_app(engine, settings), listening)


@verb
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

    others = {other: load_pipeline(other, device, dtype) for other in compare_with or []}
    made = make_studio(load_pipeline(model, device, dtype), model or "tiny world", adapters, others)
    if model is None:
        made.shelf.add("few steps", Path(few_step_checkpoint()))
    launch(made, host, port, login)
