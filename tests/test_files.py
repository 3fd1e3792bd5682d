# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Atomic writes, reading of JSON and YAML, and the check of a checkpoint folder."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latte_flow_hf.files import (
    atomic_write,
    check_files,
    read_json,
    read_weight_map,
    read_yaml,
    save_image,
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
    (folder / "config.json").write_text("{}")
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
