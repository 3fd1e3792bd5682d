# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A pipeline to one file and back."""

import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latte_flow_hf.conversion import from_single_file, initialize, to_single_file


@pytest.fixture
def folder(backbone_folder, vae_folder, tmp_path):
    initialize(backbone_folder, vae_folder, 2).write(tmp_path / "pipeline", "60KB")
    return tmp_path / "pipeline"


def test_there_and_back_to_the_byte(folder, files_of, tmp_path):
    to_single_file(folder).write(tmp_path / "one.safetensors")
    from_single_file(tmp_path / "one.safetensors").write(tmp_path / "back", "60KB")
    assert files_of(tmp_path / "back") == files_of(folder)
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert "model/config.json" in file.metadata() and "processor/chat_template.jinja" in file.metadata()
    assert {name.split(".")[0] for name in load_file(tmp_path / "one.safetensors")} == {"model", "vae"}


def test_a_folder_without_a_card_gets_one(pipeline_folder, files_of, tmp_path):
    to_single_file(pipeline_folder).write(tmp_path / "one.safetensors")
    from_single_file(tmp_path / "one.safetensors").write(tmp_path / "back")
    before, after = files_of(pipeline_folder), files_of(tmp_path / "back")
    assert "# A LaTtE-Flow pipeline" in (tmp_path / "back" / "README.md").read_text()
    assert set(after) - set(before) == {"README.md"}
    weights = [path for path in before if path.endswith(".safetensors")]
    assert {path: after[path] for path in before if path not in weights} == {
        path: before[path] for path in before if path not in weights
    }


def test_dry_run_lists_what_goes_into_the_metadata(folder, tmp_path):
    plan = to_single_file(folder)
    lines = plan.describe()
    assert any(line.startswith("in the metadata: model/config.json: ") for line in lines)
    plan.write(tmp_path / "one.safetensors")
    size = (tmp_path / "one.safetensors").stat().st_size
    # The file has a header as well, and escapes its metadata.
    assert 0 < size - int(lines[-1].split()[0].replace(",", "")) < 0.2 * size


@pytest.mark.parametrize("path", ["../outside.txt", "/outside.txt", "model/../../outside.txt", "..\\outside.txt"])
def test_a_file_that_would_write_outside_its_folder(path, folder, tmp_path):
    to_single_file(folder).write(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(tmp_path / "one.safetensors"), tmp_path / "bad.safetensors", {**metadata, path: "x"})
    with pytest.raises(ValueError, match="names files outside the folder"):
        from_single_file(tmp_path / "bad.safetensors")


def test_a_file_that_is_not_a_pipeline_or_incomplete(folder, tmp_path):
    to_single_file(folder).write(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "one.safetensors")
    bad = tmp_path / "bad.safetensors"
    del tensors["model.tower.head.proj.bias"]
    save_file(tensors, bad, metadata)
    with pytest.raises(ValueError, match=r"1 missing: tower.head.proj.bias"):
        from_single_file(bad)
    save_file(tensors, bad)
    with pytest.raises(ValueError, match=r"is not a pipeline in one file \(missing .*: model/config.json"):
        from_single_file(bad)
    bad.write_bytes((tmp_path / "one.safetensors").read_bytes()[:-10])
    with pytest.raises(OSError, match=r"bad\.safetensors is truncated"):
        from_single_file(bad)
    with pytest.raises(OSError, match="nowhere"):
        from_single_file(tmp_path / "nowhere.safetensors")


def test_a_file_that_is_not_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture\.png .* is not text"):
        to_single_file(tmp_path / "copy")


def test_output_that_exists(folder, tmp_path):
    (tmp_path / "one.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        to_single_file(folder).write(tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_text() == "mine"
    with pytest.raises(ValueError, match=r"must name a \.safetensors file, got .*one\.bin"):
        to_single_file(folder).write(tmp_path / "one.bin")
