# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""To a hub and back, and without the package: in other processes, since huggingface_hub reads its environment once.

The hub is `hub_server.py` on loopback; huggingface_hub's own client talks to it.
"""

import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import environment, running_hub
from typer.testing import CliRunner

import latte_flow_hf
from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.cli import app
from latte_flow_hf.publishing import join_modules, save_with_code


@pytest.fixture(scope="module")
def carried(pipe, tmp_path_factory) -> Path:
    return save_with_code(pipe, tmp_path_factory.mktemp("carried") / "pipeline")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.environment = environment(hub, tmp_path_factory.mktemp("home"))
        yield hub


# Code that goes along.


def test_modules_are_joined_from_the_package_s_own(carried):
    for name in ("modeling.modeling_latte_flow", "pipelines.pipeline_latte_flow", "modeling.flow_matching"):
        tree = ast.parse(join_modules(f"latte_flow_hf.{name}"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
        # transformers refuses code that imports what is not installed, be it inside a function, but not inside `try`.
        optional = [node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)]
        required = [node for node in imports if node not in optional]
        names = [getattr(node, "module", None) or node.names[0].name for node in required]
        needed = {"PIL", "diffusers", "jinja2", "numpy", "safetensors", "torch", "transformers", "yaml"}
        assert {name.partition(".")[0] for name in names} <= needed | sys.stdlib_module_names
    joined = (carried / "model" / "modeling_latte_flow.py").read_text()
    package = Path(latte_flow_hf.__file__).parent
    for module in ("flow_matching", "configuration_latte_flow", "modeling_latte_flow"):
        for node in ast.parse((package / "modeling" / f"{module}.py").read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.unparse(node) in ast.unparse(ast.parse(joined)), node.name


def test_folder_tells_where_its_code_is_and_not_where_it_was_made(carried):
    index = json.loads((carried / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatteFlowPipeline"]
    assert index["model"] == ["modeling_latte_flow", "LatteFlowForConditionalGeneration"]
    assert index["vae"] == ["diffusers", "AutoencoderDC"]
    config = json.loads((carried / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_latte_flow.LatteFlowForConditionalGeneration"
    assert not any(str(carried.parent) in path.read_text() for path in carried.rglob("*.json"))


def test_existing_folder_and_failed_saving_leave_everything_as_it_was(pipe, carried, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exists"):
        save_with_code(pipe, carried)
    monkeypatch.setattr("latte_flow_hf.publishing.code_files", lambda _: {"no/such/folder/file.py": ""})
    with pytest.raises(OSError):
        save_with_code(pipe, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_where_the_package_is_installed_carried_code_does_not_run(carried, tmp_path, generate, expected):
    folder = shutil.copytree(carried, tmp_path / "pipeline")
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('ran')\n")
    loaded = LatteFlowPipeline.from_pretrained(folder)
    assert type(loaded) is LatteFlowPipeline and np.array_equal(generate(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "LatteFlowPipeline" and index["model"][0] == "latte_flow_hf"


WITHOUT = """
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

def check(name, number):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    np.save(f"{out}/{number}.npy", generate(pipe))
    print(pipe.chat("what is it?", max_new_tokens=8))
    processor = AutoProcessor.from_pretrained(name, subfolder="processor", trust_remote_code=True)
    assert type(processor).__name__ == "LatteFlowProcessor"
    assert AutoConfig.from_pretrained(name, subfolder="model", trust_remote_code=True).model_type == "latte_flow"
    for load_with in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = load_with.from_pretrained(name, subfolder="model", trust_remote_code=True)
        assert type(model).__name__ == "LatteFlowForConditionalGeneration"
        assert type(model).__module__.startswith("transformers_modules.")
        pairs = zip(model.state_dict().items(), pipe.model.state_dict().items())
        assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)
    for load in (DiffusionPipeline.from_pretrained, lambda name: AutoModel.from_pretrained(name, subfolder="model")):
        try:
            load(name)
            raise SystemExit("ran code that nobody trusted")
        except ValueError as error:
            assert "trust_remote_code" in str(error), error

out, names = sys.argv[2], sys.argv[3:]
for number, name in enumerate(names):
    check(name, number)
    print("checked", name)
snapshot_download("user/carried")
"""

WITHOUT_OFFLINE = """
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

folder = snapshot_download("user/carried")
np.save(f"{sys.argv[2]}/offline.npy", generate(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)))
"""

PUSH = """
import latte_flow_hf
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoProcessor
from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.cli import app

out, folder = sys.argv[2:]
pipe = LatteFlowPipeline.from_pretrained(folder)
pipe.push_to_hub("user/pipe", private=True)
pipe.model.push_to_hub("user/model", max_shard_size="40KB")
pipe.processor.push_to_hub("user/processor")
pipe.scheduler.push_to_hub("user/scheduler")
app(["publish", folder, "--repo-id", "user/published", "--private"], standalone_mode=False)
app(["publish", folder, "--repo-id", "user/carried", "--with-code"], standalone_mode=False)

parts = {
    "model": AutoModel.from_pretrained("user/model"),
    "processor": AutoProcessor.from_pretrained("user/processor"),
    "scheduler": LatteFlowScheduler.from_pretrained("user/scheduler"),
}
found = {
    "pipeline": LatteFlowPipeline.from_pretrained("user/pipe"),
    "diffusers": DiffusionPipeline.from_pretrained("user/pipe"),
    "parts": DiffusionPipeline.from_pretrained("user/pipe", **parts),
    "published": LatteFlowPipeline.from_pretrained("user/published"),
    "carried": LatteFlowPipeline.from_pretrained("user/carried"),
    "subfolder": LatteFlowPipeline(
        AutoModel.from_pretrained("user/pipe", subfolder="model"),
        AutoProcessor.from_pretrained("user/pipe", subfolder="processor"),
        pipe.vae,
        LatteFlowScheduler.from_pretrained("user/pipe", subfolder="scheduler"),
    ),
}
answer = pipe.chat("what is it?", max_new_tokens=8)
for name, loaded in found.items():
    assert type(loaded) is LatteFlowPipeline, name
    assert loaded.chat("what is it?", max_new_tokens=8) == answer, name
    assert loaded.model.generation_config.eos_token_id == pipe.model.generation_config.eos_token_id, name
    np.save(f"{out}/{name}.npy", generate(loaded))
# What diffusers leaves out is there as well.
assert found["published"].model.generation_config.to_dict() == pipe.model.generation_config.to_dict()
"""

OFFLINE = """
from latte_flow_cli import app
from latte_flow_hf import LatteFlowPipeline
from diffusers import DiffusionPipeline

out = sys.argv[2]
np.save(f"{out}/offline.npy", generate(LatteFlowPipeline.from_pretrained("user/pipe")))
np.save(f"{out}/offline-diffusers.npy", generate(DiffusionPipeline.from_pretrained("user/pipe")))
np.save(f"{out}/offline-carried.npy", generate(LatteFlowPipeline.from_pretrained("user/carried")))
app(["info", "--model", "user/pipe"], standalone_mode=False)
try:
    LatteFlowPipeline.from_pretrained("user/unknown")
    raise SystemExit("from where?")
except OSError as error:
    assert "user/unknown" in str(error)
"""


@pytest.fixture(scope="module")
def pushed(hub, saved, run_child, tmp_path_factory) -> Path:
    """Images by what went to the hub and came back: by `push_to_hub` of each object, and by the command."""
    out = tmp_path_factory.mktemp("pushed")
    assert run_child(PUSH, out, saved, **hub.environment).count("published http://127.0.0.1") == 2
    return out


def assert_images(folder: Path, count: int, expected: np.ndarray) -> None:
    assert len(list(folder.glob("*.npy"))) == count
    for path in folder.glob("*.npy"):
        assert np.array_equal(np.load(path), expected), path.stem


def test_to_the_hub_and_back(pushed, hub, saved, expected):
    assert_images(pushed, 6, expected)
    assert hub.private == {
        **dict.fromkeys(["user/pipe", "user/published"], True),
        **dict.fromkeys(["user/model", "user/processor", "user/scheduler", "user/carried"], False),
    }
    assert sum(name.endswith(".safetensors") for name in hub.files("user/model")) >= 3
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(hub.files("user/published")) == there | {"README.md"}
    card = hub.files("user/carried")["README.md"].read_text()
    assert 'from_pretrained("user/carried", trust_remote_code=True)' in card and str(saved) not in card
    assert "expert 1    sigma 0.5 to 0, layers 2 to 3" in card


def test_what_was_fetched_is_there_offline(pushed, hub, run_child, tmp_path, expected):
    before = len(hub.requests)
    said = run_child(OFFLINE, tmp_path, **{**hub.environment, "HF_HUB_OFFLINE": "1"})
    assert "checkpoint  user/pipe" in said
    assert_images(tmp_path, 3, expected)
    assert len(hub.requests) == before


def test_code_that_goes_along_needs_no_package(pushed, hub, carried, run_child, tmp_path, expected):
    said = run_child(WITHOUT, tmp_path, carried, "user/carried", package=False, **hub.environment)
    assert said.count("checked") == 2
    assert "Expected types" not in said  # diffusers' warning of a component of another class
    run_child(WITHOUT_OFFLINE, tmp_path, package=False, **{**hub.environment, "HF_HUB_OFFLINE": "1"})
    assert_images(tmp_path, 3, expected)


REPUBLISH = """
from latte_flow_hf.publishing import publish
from huggingface_hub import HfApi

plain, sharded, damaged, other, headless = sys.argv[2:]

def refused(*arguments, **kwargs):
    try:
        publish(*arguments, **kwargs)
    except (ValueError, OSError) as error:
        print("refused", error)
    else:
        raise SystemExit("published")

publish(plain, "user/again", with_code=True)
api = HfApi()
api.upload_file(path_or_fileobj=b"mine", path_in_repo="examples/one.txt", repo_id="user/again")
publish(sharded, "user/again")
refused(damaged, "user/never")
refused(other, "user/never")
refused(headless, "user/never")
refused(plain + "/model", "user/never")
refused(plain, "user/a name")
refused(plain, "user/again", private=True)
"""


def test_publishing_again_leaves_nothing_that_would_be_loaded_instead(hub, saved, pipe, run_child, tmp_path):
    sharded, damaged = tmp_path / "sharded", shutil.copytree(saved, tmp_path / "damaged")
    LatteFlowPipeline.from_pretrained(saved).save_pretrained(sharded, max_shard_size="40KB")
    assert str(saved) in (sharded / "vae" / "config.json").read_text()
    (sharded / ".env").write_text("SECRET=1")
    (sharded / "README.md").write_text("---\nlicense: mit\n---\nmy own card")
    weights = damaged / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    other = shutil.copytree(saved, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    LatteFlowPipeline(pipe.model, pipe.processor, None, pipe.scheduler).save_pretrained(tmp_path / "headless")
    said = run_child(REPUBLISH, saved, sharded, damaged, other, tmp_path / "headless", **hub.environment)
    assert (
        said.count("refused") == 6
        and "has no vae" in said
        and "model.safetensors is truncated" in said
        and "FluxPipeline" in said
    )
    assert "user/again is public" in said and "user/never" not in hub.heads
    there = {path.relative_to(sharded).as_posix() for path in sharded.rglob("*") if path.is_file()}
    assert set(hub.files("user/again")) == there - {".env"} | {"examples/one.txt"}
    assert not any(str(saved) in path.read_text() for path in hub.folder("user/again").rglob("*.json"))
    assert "model/model.safetensors" not in there and "my own card" in hub.files("user/again")["README.md"].read_text()


def test_command_refuses_before_anything_is_sent(saved, tmp_path):
    """The suite itself is offline: a request would be another error."""
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "model_index.json"), (saved / "model", "model_index.json")):
        result = CliRunner().invoke(app, ["publish", str(folder), "--repo-id", "user/name"])
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and words in result.stderr
