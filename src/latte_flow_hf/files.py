# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all, small files of known formats, and the check of a checkpoint folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder that takes the place of `path` when the block ends.

    The temporary path has the name of `path`, inside a hidden folder beside it whose name is unique, so that two
    writers never share it. If the block raises, what was written is removed and `path` is left as it was.

    Args:
        path (`str` or `Path`):
            The final path; its parent folder is made if it does not exist. An existing file is replaced.

    Raises:
        `OSError`: if `path` is an existing folder (nothing is written then), or if writing fails.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f"folder {path} exists; choose another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        partial = scratch / path.name
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        image.save(partial)


def write_json(content: Any, path: str | Path) -> None:
    """Write indented JSON; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, such as a configuration.

    Raises:
        `OSError`: with the path, if the file is missing, truncated, or holds something other than an object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is truncated or damaged ({error}); save or download it again.") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} must hold a JSON object, got a {type(content).__name__}; save or download it again.")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which file holds each tensor of a sharded checkpoint.

    Args:
        index (`Path`): a `*.safetensors.index.json`.

    Returns:
        `dict[str, str]`: file names in the index's own folder, by tensor name.

    Raises:
        `OSError`: with the path, if the index is missing, damaged or without `weight_map`, or names a file outside its
            own folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OSError(f"{index} has no weight_map; save or download it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise OSError(f"{index} must name files in its own folder, got {name!r}; save or download it again.")
    return weight_map


def read_yaml(path: str | Path, what: str = "file") -> Any:
    """Read a YAML file.

    Args:
        path (`str` or `Path`): the file.
        what (`str`): what the file is, for the error, e.g. `"recipe"`.

    Raises:
        `OSError`: if the file does not exist.
        `ValueError`: if it is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} is not YAML: {error}") from error


def check_files(folder: str | Path, *names: str) -> None:
    """Refuse an incomplete local checkpoint before anything is loaded from it.

    transformers would build its default configuration (a 72B backbone) where `config.json` is missing, and the error
    for a truncated weights file does not name the file.

    Args:
        folder (`str` or `Path`): the folder of a component.
        names (`str`): the files it must hold; alternatives are separated by `|`, and `*` matches anything.

    Raises:
        `OSError`: with the path of the file that is missing, truncated or damaged.
    """
    folder = Path(folder)
    for name in names:
        if not any(any(folder.glob(alternative)) for alternative in name.split("|")):
            raise OSError(f"checkpoint folder {folder} has no {name.replace('|', ' or ')}; save or download it again.")
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        for shard in sorted(set(read_weight_map(index).values())):
            if not (folder / shard).is_file():
                raise OSError(
                    f"checkpoint folder {folder} has no {shard}, which {index.name} names; download it again."
                )
    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{weights} is truncated or damaged ({error}); save or download it again.") from error


def component_subfolder(checkpoint: str | Path, component: str, **kwargs: Any) -> str:
    """The subfolder of a component: its name in a saved pipeline, or "" in a checkpoint of the component alone.

    Args:
        checkpoint (`str` or `Path`): folder or hub id.
        component (`str`): such as `"model"`.
        kwargs: arguments of `from_pretrained`; those for the hub are used.
    """
    if Path(checkpoint).is_dir():
        is_pipeline = Path(checkpoint, "model_index.json").is_file()
    else:
        from transformers.utils import cached_file

        names = ("cache_dir", "force_download", "token", "revision", "local_files_only", "repo_type")
        is_pipeline = bool(
            cached_file(
                str(checkpoint),
                "model_index.json",
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **{name: kwargs[name] for name in names if name in kwargs},
            )
        )
    return component if is_pipeline else ""
