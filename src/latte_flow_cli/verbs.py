# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a verb needs: registration, one-line errors, the pipeline on its device, output for people and programs."""

import functools
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer


# No rich: plain help and one-line errors, in half the time.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


def one_line_errors(function):
    """A function whose user errors end in one line instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            typer.secho(f"Error: {' '.join(message.split())}", fg="red", err=True)
            raise typer.Exit(1) from error

    return wrapped


def verb(function, group: typer.Typer = app, name: str | None = None):
    """Register a verb."""
    return group.command(name)(one_line_errors(function))


def user_message(error: Exception) -> str | None:
    """What to tell about an error that a user can do something about; `None` for a bug, which keeps its traceback."""
    from httpx2 import HTTPError
    from safetensors import SafetensorError

    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name)):
        if extra == "lmms-eval":
            return (
                f"{error.name} is not installed; install the extra {extra!r} in an environment of its own, as "
                "docs/guides/understanding.md says: it needs other versions than constraints.txt."
            )
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


def check_source(name: str, source: str) -> None:
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

    if is_hub_reachable():
        return
    if not any(isinstance(try_to_load_from_cache(source, file), str) for file in ("model_index.json", "config.json")):
        raise OSError(
            f"{name} {source!r} is neither a folder nor in the cache, and {constants.ENDPOINT} cannot be reached."
        )


def is_hub_reachable() -> bool:
    """One request to the hub; after a failure this process is offline, as with `HF_HUB_OFFLINE=1`."""
    from httpx2 import TransportError
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except TransportError:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def check_device(device: str | None) -> str:
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


def load_pipeline(
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
        check_source("model", model)
    import diffusers
    import torch
    import transformers

    from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
    from latte_flow_hf.checkpoints import few_step_checkpoint
    from latte_flow_hf.pipelines.lora import load_loras

    device = check_device(device)
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


def tell(is_json: bool, text: str, event: dict[str, Any]) -> None:
    """Print for people, or for programs."""
    if is_json:
        typer.echo(json.dumps(event))
    elif text:
        typer.echo(text)
