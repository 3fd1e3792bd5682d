"""Written whole or not at all."""

import errno
import resource
import shutil

import pytest

from latte_flow_hf.conversion import initialize, plan
from latte_flow_hf.conversion.streaming import write_safetensors


@pytest.fixture
def new(backbone_folder, vae_folder):
    return initialize(backbone_folder, vae_folder, 2, timestep_frequency_dim=16)


def test_a_dry_run_tells_every_file_key_and_size_and_writes_nothing(new, vae, tmp_path):
    lines = new.describe("50KB")
    assert list(tmp_path.iterdir()) == []
    new.write(tmp_path / "out", "50KB")
    written = {str(p.relative_to(tmp_path / "out")): p.stat().st_size for p in (tmp_path / "out").rglob("*.*")}
    assert len([name for name in written if name.startswith("model/model-")]) > 3
    told = {
        line.split(": ")[0]: int(line.split(": ")[1].split()[0].replace(",", "")) for line in lines if ": " in line
    }
    assert told == written
    keys = [line.split()[0] for line in lines if line.startswith("    ")]
    assert "tower.layers.3.self_attn.residual_gate.weight" in keys and set(vae.state_dict()) <= set(keys)
    assert len(keys) == sum(len(tensors) for tensors in new.weights.values())
    assert lines[-1] == f"{sum(written.values()):,} bytes in all"


def test_no_shard_is_larger_than_asked(new, tmp_path):
    new.write(tmp_path / "out", "70KB")
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "model").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 70_000 + 10_000


def test_a_model_card(new, tmp_path):
    from huggingface_hub import ModelCard

    new.write(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    for words in ("K =\n2 timestep experts", "LatteFlowPipeline.from_pretrained", "latte-flow generate", "Licence"):
        assert words in card.text
    assert str(tmp_path) not in card.text


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


def test_a_size_that_is_none(new, tmp_path):
    with pytest.raises(ValueError, match="many"):
        new.write(tmp_path / "out", "many")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room(new, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"takes [\d,]+ bytes, but its disk has 1,000 left"):
        new.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_in_the_middle(error, new, tmp_path, monkeypatch):
    calls = []

    def write(path, *arguments):
        calls.append(path)
        hashes = write_safetensors(path, *arguments)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise error
        return hashes

    monkeypatch.setattr(plan, "write_safetensors", write)
    with pytest.raises(type(error)):
        new.write(tmp_path / "out", "50KB")
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_a_write_that_the_system_refuses(new, tmp_path):
    """The kernel's own error, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            new.write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_what_reads_back_differently_is_refused(new, tmp_path, monkeypatch):
    def write(path, *arguments):
        hashes = write_safetensors(path, *arguments)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return hashes

    monkeypatch.setattr(plan, "write_safetensors", write)
    with pytest.raises(OSError, match="was written wrongly"):
        new.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(new, tmp_path):
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "model" / "rest").write_text("half")
    new.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out/model/rest").exists()
