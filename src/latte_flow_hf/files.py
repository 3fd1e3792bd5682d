# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all, small files of known formats, and checks of checkpoint folders."""

import hashlib
import io
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
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The entry for the hash in the metadata of a safetensors file, and its value before the hash is known.
HASH_KEY = "sha256"
EMPTY_HASH = "0" * 64


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder that takes the place of `path` when the block ends.

    The temporary path has the name of `path`, inside a hidden folder beside it whose name is unique, so that two
    writers never share it. If the block raises, what was written is removed and `path` is left as it was.

    Args:
        path (`str` or `Path`):
            The final path; its parent folder is made if it does not exist. An existing file is replaced.

    Raises:
        `OSError`: with `path`, if it is an existing folder (nothing is written then), or if writing fails, by whatever
            library: safetensors' own error is no `OSError`.
    """
    # A link is written through, not replaced.
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if path.is_dir():
        raise FileExistsError(f"folder {path} exists; choose another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        partial = scratch / path.name
        yield partial
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); check the space on its disk.") from error
    except OSError as error:
        # A failed write, unlike a failed open, does not know its file.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output(path: str | Path, num_bytes: int = 0, replace: bool = False) -> None:
    """Check that a file or folder can be written, before the work whose result it will hold.

    Args:
        path (`str` or `Path`): the output. Its folder is not made, but its nearest existing parent must be a writable
            folder.
        num_bytes (`int`, defaults to 0): the size of the result, if it is known.
        replace (`bool`, defaults to `False`): whether `path` may be an existing file.

    Raises:
        `ValueError`: if `path` exists, or is a link to nowhere.
        `OSError`: if it is read-only or cannot be written, or its disk has less than `num_bytes` left.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"output {path} exists: it is a link to nowhere; choose another name, or remove it.")
    if path.is_dir() or (path.exists() and not replace):
        raise ValueError(f"output {path} exists; choose another name, or remove it.")
    # The permission bits, because an administrator may write to read-only files too.
    if path.exists() and not path.stat().st_mode & 0o222:
        raise PermissionError(f"output {path} is read-only; choose another name.")
    parent = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    if not parent.is_dir():
        raise NotADirectoryError(f"output {path} cannot be written: {parent} is not a folder.")
    try:
        # Permissions alone do not tell: the disk may be read-only or full, the name too long.
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.") as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"output {path} cannot be written: {error.strerror or error}.") from error
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise OSError(f"output {path} takes {num_bytes:,} bytes, but its disk has {free:,} left.")


def check_image_output(path: str | Path) -> None:
    """Same as [`check_output`] for an image, which may replace an existing file.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        `ValueError`: if its extension is not that of an image format that can be written.
        `ValueError` or `OSError`: for the reasons of [`check_output`].
    """
    path = Path(path)
    try:
        # Some formats are registered without a working encoder.
        Image.new("RGB", (8, 8)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"output must be an image file such as out.png, got {str(path)!r}.") from error
    check_output(path, replace=True)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image; the file appears whole or not at all."""
    with atomic_write(path) as partial:
        image.save(partial)


def is_whole_png(path: Path) -> bool:
    """Whether a PNG file exists and has its end. One that was cut, by a copy or a full disk, has not: a warning says
    that it is made again."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        # The last chunk, which is empty, and its checksum.
        file.seek(max(0, path.stat().st_size - 8))
        if file.read() == b"IEND\xaeB`\x82":
            return True
    logger.warning(f"image {path} is damaged, and is made again.")
    return False


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
    required: set[Path] = set()
    for name in names:
        paths = {path for alternative in name.split("|") for path in folder.glob(alternative)}
        if not paths:
            raise OSError(f"checkpoint folder {folder} has no {name.replace('|', ' or ')}; save or download it again.")
        required |= paths
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        for shard in sorted(set(read_weight_map(index).values())):
            if not (folder / shard).is_file():
                raise OSError(
                    f"checkpoint folder {folder} has no {shard}, which {index.name} names; download it again."
                )
    for path in sorted(required):
        if path.suffix == ".json" and not read_json(path):
            raise OSError(f"{path} is empty; save or download it again.")
    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{weights} is truncated or damaged ({error}); save or download it again.") from error


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_hash(path: Path) -> None:
    """Store the SHA-256 of a safetensors file in its metadata, as `sha256`, for [`check_hash`].

    The entry travels with the file: it stays right when the file is copied, moved, renamed or published. It is written
    in place if the metadata has room for it (`EMPTY_HASH`, or an earlier hash); otherwise the file is rewritten. The
    entries are sorted: safetensors writes them in random order, and the same content would have other bytes each time.

    Args:
        path (`Path`): the file.
    """
    with open(path, "r+b") as file:
        old, metadata = _read_header(file)
        metadata = dict(sorted({**metadata, HASH_KEY: _hash_weights(file)}.items()))
        header = json.dumps({**json.loads(old), "__metadata__": metadata}, separators=(",", ":"), ensure_ascii=False)
        new = header.encode()
        if len(new) <= len(old):
            file.seek(8)
            file.write(new.ljust(len(old)))
            return
        new = new.ljust(-(-len(new) // 8) * 8)  # The tensors stay aligned.
        _read_header(file)
        with atomic_write(path) as partial, open(partial, "wb") as copy:
            copy.write(len(new).to_bytes(8, "little") + new)
            shutil.copyfileobj(file, copy, 1 << 24)


def store_hashes(folder: Path) -> None:
    """Store the hashes of all safetensors files in a folder and its subfolders, see [`store_hash`]."""
    for path in sorted(folder.rglob("*.safetensors")):
        store_hash(path)


def check_hash(path: Path) -> bool:
    """Check a safetensors file against the hash that [`store_hash`] stored.

    Returns:
        `bool`: whether there is a stored hash.

    Raises:
        `OSError`: if the file is truncated, or a bit of its tensors, their names, types or shapes has changed.
    """
    with open(path, "rb") as file:
        _, metadata = _read_header(file)
        if HASH_KEY in metadata and _hash_weights(file) != metadata[HASH_KEY]:
            raise OSError(
                f"{path} is damaged, or was changed by a tool that kept its metadata: its tensors do not have the "
                "stored hash; download or save it again."
            )
        return HASH_KEY in metadata


def _read_header(file: Any) -> tuple[bytes, dict[str, str]]:
    """The JSON header of an open safetensors file and the metadata in it; the file is then at the tensors."""
    file.seek(0)
    # The format limits a header to 100 MB: a damaged size must not take all memory.
    header = file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))
    try:
        return header, json.loads(header).get("__metadata__") or {}
    except (ValueError, AttributeError) as error:
        raise OSError(f"{file.name} is truncated or damaged ({error}); save or download it again.") from error


def _hash_weights(file: Any) -> str:
    """SHA-256 of the header without the hash itself, and of the tensors."""
    header, metadata = _read_header(file)
    content = {**json.loads(header), "__metadata__": {**metadata, HASH_KEY: ""}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    while chunk := file.read(1 << 24):
        digest.update(chunk)
    return digest.hexdigest()


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
