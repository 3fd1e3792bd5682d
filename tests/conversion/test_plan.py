# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a plan describes is what it writes, whole or not at all."""

import errno
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latte_flow_hf.conversion import from_single_file, initialize, plan, regroup, streaming, to_single_file
from latte_flow_hf.conversion.streaming import write_safetensors
from latte_flow_hf.files import check_hash


@pytest.fixture
def new(backbone_folder, vae_folder):
    return initialize(backbone_folder, vae_folder, 2, timestep_frequency_dim=16)


def test_dry_run_lists_every_file_key_and_size_and_writes_nothing(new, vae, tmp_path):
    lines = new.describe("50KB")
    assert list(tmp_path.iterdir()) == []
    new.write(tmp_path / "out", "50KB")
    written = {str(p.relative_to(tmp_path / "out")): p.stat().st_size for p in (tmp_path / "out").rglob("*.*")}
    assert len([name for name in written if name.startswith("model/model-")]) > 3
    described = {
        line.split(": ")[0]: int(line.split(": ")[1].split()[0].replace(",", "")) for line in lines if ": " in line
    }
    assert described.keys() == written.keys()
    for name, size in written.items():
        header = size - described[name]
        assert 0 < header < 20_000 if name.endswith(".safetensors") else header == 0, name
    keys = [line.split()[0] for line in lines if line.startswith("    ")]
    assert "tower.layers.3.self_attn.residual_gate.weight" in keys and set(vae.state_dict()) <= set(keys)
    assert len(keys) == sum(len(tensors) for tensors in new.weights.values())
    total = int(lines[-1].removesuffix(" bytes in all").replace(",", ""))
    assert 0.8 * sum(written.values()) < total < sum(written.values())


def test_no_shard_is_larger_than_max_shard_size(new, tmp_path):
    new.write(tmp_path / "out", "70KB")
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "model").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 70_000 + 10_000


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists(kind, new, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"output .*out exists"):
        new.write(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_invalid_size(new, tmp_path):
    with pytest.raises(ValueError, match="many"):
        new.write(tmp_path / "out", "many")
    assert list(tmp_path.iterdir()) == []


def test_disk_with_too_little_space(new, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"takes [\d,]+ bytes, but its disk has 1,000 left"):
        new.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_in_the_middle(error, new, tmp_path, monkeypatch):
    calls = []

    def write(path, *arguments):
        calls.append(path)
        write_safetensors(path, *arguments)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise error

    monkeypatch.setattr(plan, "write_safetensors", write)
    with pytest.raises(type(error)):
        new.write(tmp_path / "out", "50KB")
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_a_write_that_the_system_refuses(new, tmp_path):
    """An error of the kernel, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*\.safetensors: .*File too large"):
            new.write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["one bit", "another name"])
def test_what_reads_back_differently_is_refused(change, new, tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        name = next(iter(tensors))
        tensor = tensors[name].clone()
        if change == "one bit":
            tensor.view(torch.uint8).view(-1)[-1] ^= 1
            save_file({**tensors, name: tensor}, path, metadata)
        else:
            save_file({**tensors, "another": tensor}, path, metadata)

    monkeypatch.setattr(streaming, "save_file", save)
    with pytest.raises(OSError, match=r"safetensors does not read back as it was written: \w+"):
        new.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_give_no_finite_velocity_are_refused(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "source")
    path = tmp_path / "source" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["tower.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="velocity is not finite"):
        regroup(tmp_path / "source", 1).write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_beside_the_output_stay(new, tmp_path):
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "model" / "mine").write_text("mine")
    new.write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    assert (tmp_path / "out.partial" / "model" / "mine").read_text() == "mine"


def test_written_weights_have_hashes_and_damaged_sources_are_refused(new, tmp_path):
    new.write(tmp_path / "out", "50KB")
    to_single_file(tmp_path / "out").write(tmp_path / "out.safetensors")
    from_single_file(tmp_path / "out.safetensors").write(tmp_path / "again")
    written = [*sorted(tmp_path.rglob("*.safetensors"))]
    assert len(written) > 5 and all(check_hash(path) for path in written)
    for source, make in (
        (tmp_path / "again" / "model" / "model.safetensors", lambda: regroup(tmp_path / "again", 4)),
        (tmp_path / "out.safetensors", lambda: from_single_file(tmp_path / "out.safetensors")),
    ):
        content = source.read_bytes()
        source.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(OSError, match=f"{source.name} is damaged"):
            make().write(tmp_path / "damaged")
        assert not (tmp_path / "damaged").exists()
