# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Atomic writes, locked folders, reading of JSON and YAML, hashes, and the check of a checkpoint folder."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latte_flow_hf.files import (
    EMPTY_HASH,
    atomic_write,
    check_files,
    check_hash,
    check_image_output,
    check_output,
    read_json,
    read_weight_map,
    read_yaml,
    save_image,
    store_hash,
    store_hashes,
    write_json,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_of_a_file_in_a_new_folder(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "new.txt") as partial:
        assert partial.name == "new.txt" and not partial.exists()
        partial.write_text("new")
        assert not (tmp_path / "a" / "b" / "new.txt").exists()
    assert (tmp_path / "a" / "b" / "new.txt").read_text() == "new"
    assert names(tmp_path / "a" / "b") == ["new.txt"]


def test_atomic_write_replaces_a_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(str(path)) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["file.txt"]


def test_atomic_write_of_a_folder(tmp_path):
    with atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "file.txt").write_text("new")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["file.txt"]


@pytest.mark.parametrize("content", [[], ["mine.txt"]])
def test_atomic_write_refuses_an_existing_folder(content, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("mine")
    with pytest.raises(OSError, match=r"folder .*folder exists"), atomic_write(folder):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["folder"] and names(folder) == content


def test_atomic_write_does_not_replace_a_folder_that_appeared_meanwhile(tmp_path):
    with pytest.raises(OSError), atomic_write(tmp_path / "folder") as partial:
        partial.mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["mine.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_atomic_write_leaves_nothing_behind_on_an_error(error, tmp_path):
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "file.txt") as partial:
        partial.write_text("half")
        partial.with_name("beside.txt").write_text("half")
        raise error
    with pytest.raises(type(error)), atomic_write(tmp_path / "folder") as partial:
        (partial / "deep").mkdir(parents=True)
        raise error
    assert names(tmp_path) == ["file.txt"] and (tmp_path / "file.txt").read_text() == "old"


def test_atomic_write_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_two_writers_have_names_of_their_own_and_the_last_one_stays(tmp_path):
    (tmp_path / "file.txt.partial").write_text("mine")
    with atomic_write(tmp_path / "file.txt") as first, atomic_write(tmp_path / "file.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file.txt").read_text() == "first"
    assert names(tmp_path) == ["file.txt", "file.txt.partial"]
    assert (tmp_path / "file.txt.partial").read_text() == "mine"


def test_images_keep_their_format(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        save_image(image, tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            assert opened.format == kind and opened.size == (4, 4)
    with pytest.raises(ValueError):
        save_image(image, tmp_path / "a.nothing")
    assert names(tmp_path) == ["a.jpg", "a.png"]


def test_json_there_and_back(tmp_path):
    write_json({"name": "größer", "values": [1, 2.5, None]}, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"name": "größer", "values": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json({"name": object()}, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json")["values"] == [1, 2.5, None] and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is truncated or damaged"),
        (b'{"a": ', "is truncated or damaged"),
        (b'{"a": "\xff"}', "is truncated or damaged"),
        (b"[1]", "must hold a JSON object, got a list"),
    ],
)
def test_json_that_is_not_an_object(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(OSError, match=rf"a\.json {words}"):
        read_json(tmp_path / "a.json")


def test_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, two]")
    assert read_yaml(path) == {"a": [1, "two"]}
    for content in (b"a: [", b"a: \xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"recipe .*a\.yaml is not YAML"):
            read_yaml(path, "recipe")


@pytest.mark.parametrize("read", [read_json, read_yaml, read_weight_map])
def test_a_file_that_does_not_exist(read, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        read(tmp_path / "nowhere")


INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "small"}')
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in weight_map.items():
        save_file({name: torch.zeros(64)}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_complete_folder(folder):
    check_files(folder, "config.json", "model.safetensors|model.safetensors.index*.json", "*.safetensors")
    assert set(read_weight_map(folder / INDEX)) == {"a", "b"}


@pytest.mark.parametrize("name", ["config.json", "*onfig.json", "a.json|config.json"])
def test_a_missing_file(name, folder):
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"checkpoint folder .* has no .*onfig\.json; save or download it again"):
        check_files(folder, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map"', "is truncated or damaged"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "must name files in its own folder, got 3"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"must name files in its own folder, got '\.\./b\.safetensors'"),
        ('{"weight_map": {"a": "/b.safetensors"}}', r"must name files in its own folder, got '/b\.safetensors'"),
    ],
)
def test_an_index_that_is_damaged_or_leads_outside_its_folder(content, words, folder):
    (folder.parent / "b.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    (folder / INDEX).write_text(content)
    for check in (lambda: check_files(folder, "config.json"), lambda: read_weight_map(folder / INDEX)):
        with pytest.raises(OSError, match=rf"model\.safetensors\.index\.json {words}"):
            check()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", "3"])
def test_a_required_json_file_is_empty_or_damaged(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(OSError, match=r"config\.json .*save or download it again"):
        check_files(folder, "config.json")
    check_files(folder)


@pytest.mark.parametrize("name", [INDEX, "model.safetensors.index.fp16.json"])
def test_a_shard_that_an_index_names_is_missing(name, folder):
    (folder / INDEX).rename(folder / name)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match=rf"has no model-00002-of-00002\.safetensors, which {name} names"):
        check_files(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_weights_that_are_truncated(size, folder):
    weights = folder / "model-00002-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors is truncated or damaged"):
        check_files(folder)


def full_disk(*arguments, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_an_error_with_the_path(error, tmp_path):
    (tmp_path / "file.txt").write_text("old")
    with (
        pytest.raises(OSError, match=r"file\.txt cannot be written .*No space left"),
        atomic_write(tmp_path / "file.txt"),
    ):
        raise error
    assert names(tmp_path) == ["file.txt"] and (tmp_path / "file.txt").read_text() == "old"


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("file.txt")
    with atomic_write(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "file.txt").read_text() == "new" and (tmp_path / "link.txt").is_symlink()


def test_an_output_is_checked_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "nowhere").symlink_to("none")
    check_output(tmp_path / "a" / "b")
    check_output(tmp_path / "file.txt", replace=True)
    for path, words in (
        ("file.txt", "exists; choose another name"),
        ("nowhere", "link to nowhere"),
        ("", "exists; choose another name"),
    ):
        with pytest.raises(ValueError, match=words):
            check_output(tmp_path / path)
    with pytest.raises(ValueError, match="exists"):
        check_output(tmp_path, replace=True)
    for path in ("file.txt/a", "nowhere/a", "file.txt/a/b"):
        with pytest.raises(OSError, match="is not a folder"):
            check_output(tmp_path / path)
    with pytest.raises(OSError, match=r"a takes .* bytes, but its disk has"):
        check_output(tmp_path / "a", num_bytes=10**18)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full_disk)
    with pytest.raises(OSError, match=r"output .*a cannot be written: No space left"):
        check_output(tmp_path / "a")
    assert names(tmp_path) == ["file.txt", "nowhere"]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(64.0), "b": torch.zeros(3, dtype=torch.int8)}, path, {"format": "pt"})
    return path


def test_a_stored_hash_leaves_the_tensors_and_the_metadata(weights):
    before = load_file(weights)
    assert not check_hash(weights)
    for _ in range(2):
        store_hash(weights)
        assert check_hash(weights)
        after = load_file(weights)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(weights, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and len(file.metadata()["sha256"]) == 64
    content = weights.read_bytes()
    # In place, when there is room for it.
    save_file(before, weights, {"format": "pt", "sha256": EMPTY_HASH})
    store_hashes(weights.parent)
    assert load_file(weights).keys() == before.keys() and names(weights.parent) == [weights.name]
    assert check_hash(weights)
    assert content.count(b"sha256") == 1


def test_a_flipped_bit_is_found_in_every_byte(weights):
    store_hash(weights)
    content = weights.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            weights.write_bytes(changed)
            try:
                # Only a bit in the name of the entry makes it a file without a stored hash.
                assert (not check_hash(weights) and b'"sha256"' not in changed) or b"__metadata__" not in changed
            except OSError as error:
                assert "a.safetensors is " in str(error) and "damaged" in str(error)
    weights.write_bytes(content[:-1])
    with pytest.raises(OSError, match=r"a\.safetensors is damaged"):
        check_hash(weights)


@pytest.mark.parametrize("check", [check_output, check_image_output])
@pytest.mark.parametrize("name", ["new.png", "new/deep/new.png", "to-a-folder/new.png", "new.JPEG"])
def test_an_output_that_can_be_written(check, name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-a-folder").symlink_to("folder")
    check(tmp_path / name)
    assert names(tmp_path) == ["folder", "to-a-folder"] and names(tmp_path / "folder") == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder.png", "exists; choose another name"),
        ("read-only.png", "is read-only"),
        ("n" * 245 + ".png", "cannot be written: File name too long"),
        *((name, "must be an image file") for name in ("new", "new.txt", "new.psd", "new.h5", "folder")),
    ],
)
def test_an_image_that_cannot_be_written(name, words, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "read-only.png").write_text("mine")
    (tmp_path / "read-only.png").chmod(0o444)
    with pytest.raises((ValueError, OSError), match=rf"^output .*{words}"):
        check_image_output(tmp_path / name)
    assert names(tmp_path) == ["folder.png", "read-only.png"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder to which nobody can write")
def test_an_output_in_a_folder_that_cannot_be_written_to():
    with pytest.raises(OSError, match=r"output /proc/new\.png cannot be written"):
        check_output("/proc/new.png")
