# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Sets of images to evaluate: folders, `.npz` files in the layout of ADM's evaluator, arrays.

What is unusual here: 50,000 images of 256x256 are 9.8 GB, so an `.npz` file is read and written in batches, as ADM's
evaluator reads it, while `np.load` would hold all of it in memory.
"""

import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic_write
from ..modeling.images import load_rgb_image


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read in batches.

    Args:
        name (`str`): what errors call it, such as its path.
        num_images, height, width (`int`): of the set, and of each image in pixels.
        read (`Callable`): from a batch size to an iterator over arrays (batch, height, width, 3) of uint8.
        paths (`tuple[Path, ...]`): the file of each image, if each has its own.
        source (`Path`, *optional*): the folder or file that they are from.
    """

    name: str
    num_images: int
    height: int
    width: int
    read: Callable[[int], Iterator[np.ndarray]]
    paths: tuple[Path, ...] = ()
    source: Path | None = None

    def files(self) -> set[Path]:
        """The files that the images are in, whatever the path by which they were opened; none for arrays."""
        return {path.resolve() for path in self.paths or ([self.source] if self.source else [])}


def open_images(source: Any, name: str | None = None) -> ImageSet:
    """Open a set of images without reading its pixels.

    Args:
        source:
            A folder, whose images are taken from its subfolders too, in the order of their paths, without what is
            hidden; an `.npz` file with `arr_0`, (n, height, width, 3) of uint8; such an array; or a list of PIL images
            of mode RGB.
        name (`str`, *optional*): what errors call it; defaults to the path.

    Raises:
        `ValueError`: if there are no images, their sizes differ, or an array is of another shape or type.
        `OSError`: if there is no such folder or file, or it is damaged.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _open_folder(path, name or str(path))
        if not path.is_file():
            raise FileNotFoundError(f"images {path} do not exist; give a folder of images, or an .npz file.")
        if path.suffix.lower() != ".npz":
            raise ValueError(f"images must be a folder or an .npz file with `arr_0`, got {str(path)!r}.")
        return _open_npz(path, name or str(path))
    name = name or "images"
    if isinstance(source, (list, tuple)):
        return _open_list(list(source), name)
    if not isinstance(source, np.ndarray):
        raise ValueError(
            f"{name} must be a folder, an .npz file, an array or PIL images, got {type(source).__name__}."
        )
    if source.dtype.kind == "f" and not np.isfinite(source).all():
        raise ValueError(f"{name} contain NaN or infinite values.")
    num_images, height, width = _check_array(name, source.shape, source.dtype)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, num_images, batch_size):
            yield source[start : start + batch_size]

    return ImageSet(name, num_images, height, width, read)


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """The number, height and width of the images in an array."""
    if dtype != np.uint8:
        raise ValueError(f"{name} must be of uint8, 0 to 255, got {dtype}; round and convert them.")
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"{name} must have the shape (n, height, width, 3), got {shape}.")
    return shape[0], shape[1], shape[2]


def _check_sizes(name: str, sizes: list[tuple[int, int]], labels: list[str]) -> tuple[int, int]:
    """The size that all images share, (width, height)."""
    for size, label in zip(sizes, labels):
        if size != sizes[0]:
            raise ValueError(
                f"{name} must be of one size: {labels[0]} has {sizes[0][0]}x{sizes[0][1]} pixels, {label} has "
                f"{size[0]}x{size[1]}; resize or crop them all in the same way."
            )
    return sizes[0]


def _open_list(images: list[Any], name: str) -> ImageSet:
    if not images:
        raise ValueError(f"{name} must contain at least one image, got none.")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            kind = f"mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
            raise ValueError(f"{name}: image {index} must be a PIL image of mode RGB, got {kind}.")
    labels = [f"image {index}" for index in range(len(images))]
    width, height = _check_sizes(name, [image.size for image in images], labels)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield np.stack([np.asarray(image) for image in images[start : start + batch_size]])

    return ImageSet(name, len(images), height, width, read)


def _open_folder(folder: Path, name: str) -> ImageSet:
    extensions = Image.registered_extensions()
    paths = tuple(
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in extensions
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(f"{name} contains no images.")
    sizes = []
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        # PIL's decoders raise errors of many kinds for damaged files, and one of its own for a decompression bomb.
        except Exception as error:
            raise ValueError(f"{name}: image {path} cannot be read: {error}") from error
    labels = [str(path.relative_to(folder)) for path in paths]
    width, height = _check_sizes(name, sizes, labels)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), batch_size):
            images = [load_rgb_image(path) for path in paths[start : start + batch_size]]
            # A photograph may be stored lying on its side.
            sizes = [(width, height), *(image.size for image in images)]
            _check_sizes(name, sizes, [labels[0], *labels[start : start + batch_size]])
            yield np.stack([np.asarray(image) for image in images])

    return ImageSet(name, len(paths), height, width, read, paths, folder)


def _open_npz(path: Path, name: str) -> ImageSet:
    with open_npz(path) as archive:
        shape, dtype = _read_header(archive, path, "arr_0")[1:]
    num_images, height, width = _check_array(f"{name}: arr_0", shape, dtype)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with open_npz(path) as archive:
            member = _read_header(archive, path, "arr_0")[0]
            with member:
                for start in range(0, num_images, batch_size):
                    count = min(batch_size, num_images - start)
                    size = count * height * width * 3
                    try:
                        content = member.read(size)
                    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                        raise OSError(
                            f"{path} is truncated or damaged ({error}); make or download it again."
                        ) from error
                    if len(content) != size:
                        raise OSError(f"{path} is truncated: arr_0 ends too early; make or download it again.")
                    yield np.frombuffer(content, np.uint8).reshape(count, height, width, 3)

    return ImageSet(name, num_images, height, width, read, source=path)


def open_npz(path: Path) -> zipfile.ZipFile:
    """
    Raises:
        `OSError`: if `path` is no `.npz` file.
    """
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path} is truncated, or no .npz file ({error}); make or download it again.") from error


def _read_header(archive: zipfile.ZipFile, path: Path, key: str) -> tuple[Any, tuple[int, ...], np.dtype]:
    """An array of an `.npz` file, opened at its values, with its shape and type."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if key not in names:
        raise ValueError(f"{path} must have the array `{key}`, got {', '.join(names) or 'nothing'}.")
    member = archive.open(f"{key}.npy")
    try:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(member)
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path} is truncated or damaged: `{key}` cannot be read ({error}).") from error
    if is_fortran:
        raise ValueError(f"{path}: `{key}` is in Fortran order; save it with `np.ascontiguousarray`.")
    return member, shape, dtype


def write_npz(path: str | Path, images: Iterable[np.ndarray], num_images: int, **arrays: np.ndarray) -> None:
    """Write an `.npz` file of images in the layout that ADM's evaluator reads; it appears whole or not at all.

    The images are `arr_0`, (n, height, width, 3) of uint8, not compressed, and are never held in memory together.

    Args:
        path (`str` or `Path`): the file.
        images (`Iterable[np.ndarray]`): batches (batch, height, width, 3) of uint8.
        num_images (`int`): how many images all batches have.
        arrays (`np.ndarray`): further arrays by name, such as `arr_1`, the labels.

    Raises:
        `ValueError`: if the batches have another number of images, or images of other sizes or types.
    """
    batches = iter(images)
    first = next(batches)
    _, height, width = _check_array("images", first.shape, first.dtype)
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, height, width, 3)}
    written = 0
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        # Beyond 2 GiB an entry needs the larger form from its start.
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in itertools.chain([first], batches):
                if batch.dtype != np.uint8 or batch.shape[1:] != (height, width, 3):
                    raise ValueError(
                        f"images must be of one size and of uint8: {(height, width, 3)} first, then {batch.shape[1:]} "
                        f"of {batch.dtype}."
                    )
                member.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != num_images:
            raise ValueError(f"num_images is {num_images}, but there are {written} images.")
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
