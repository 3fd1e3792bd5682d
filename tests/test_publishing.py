# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Code that is saved with a pipeline, and what is refused before an upload.

Uploads to a hub and loading without this package are tested in `integration/loading/test_hub.py`.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from latte_flow_hf import LatteFlowInpaintPipeline, LatteFlowPipeline
from latte_flow_hf.files import check_hash, store_hash
from latte_flow_hf.publishing import _with_hashes, code_files, join_modules, model_card, publish, save_with_code


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Write a package of modules by name and source, and make it importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**modules: str) -> None:
        (tmp_path / "small_package").mkdir()
        for name, source in {"__init__": "", **modules}.items():
            (tmp_path / "small_package" / f"{name}.py").write_text(source)

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "small_package"]:
        del sys.modules[name]


def test_joined_modules_are_one_module(make_package):
    make_package(
        a="import math\nfrom .b import double\nfrom .c import (\n    ONE,\n)\n\nTWO = double(ONE)\n",
        b="from .c import ONE\n\n\ndef double(value):\n    from .c import ONE\n\n    return value + value * ONE\n",
        c="import math\n\nONE = math.cos(0)\n",
    )
    joined = join_modules("small_package.a")
    assert joined.count("ONE = math.cos(0)") == 1 and "from ." not in joined
    namespace: dict = {}
    exec(compile(joined, "joined", "exec"), namespace)
    assert namespace["TWO"] == 2


def test_modules_that_define_a_name_differently_cannot_be_joined(make_package):
    make_package(a="from .b import one\n\nLIMIT = 1\n", b="LIMIT = 2\n\n\ndef one():\n    return LIMIT\n")
    with pytest.raises(AssertionError, match="LIMIT"):
        join_modules("small_package.a")


def test_code_files_of_a_pipeline(pipeline):
    files = code_files(Path(pipeline))
    assert {name for name in files if name.endswith(".py")} == {
        "pipeline.py",
        "modeling_latte_flow.py",
        "processing_latte_flow.py",
        "scheduling_latte_flow.py",
        "model/modeling_latte_flow.py",
        "processor/processing_latte_flow.py",
        "scheduler/scheduling_latte_flow.py",
    }
    for name, source in files.items():
        if name.endswith(".py"):
            compile(source, name, "exec")
    assert files["modeling_latte_flow.py"] == files["model/modeling_latte_flow.py"]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline", "LatteFlowPipeline"] and index["vae"] == ["diffusers", "AutoencoderDC"]
    auto_map = json.loads(files["model/config.json"])["auto_map"]
    assert auto_map["AutoConfig"] == "modeling_latte_flow.LatteFlowConfig"
    assert all(reference.startswith("modeling_latte_flow.LatteFlow") for reference in auto_map.values())


def test_no_code_for_a_component_of_another_library(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    files = code_files(folder)
    assert not any("scheduling" in name for name in files)
    assert json.loads(files["model_index.json"])["scheduler"] == index["scheduler"]


@pytest.mark.parametrize("with_files", [False, True])
def test_save_with_code_refuses_an_existing_folder(with_files, pipe, tmp_path):
    (tmp_path / "out").mkdir()
    if with_files:
        (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output .*out exists; choose another name"):
        save_with_code(pipe, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] + ["mine.txt"] * with_files


def test_save_with_code_saves_everything(pipe, pipeline, tmp_path):
    folder = save_with_code(pipe, tmp_path / "new" / "out", max_shard_size="100KB")
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(code_files(Path(pipeline))) <= saved and "model/model.safetensors.index.json" in saved
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("with_code", "words"),
    [
        (False, 'LatteFlowPipeline.from_pretrained("user/small")'),
        (True, 'DiffusionPipeline.from_pretrained("user/small", trust_remote_code=True)'),
    ],
)
def test_model_card(with_code, words, pipeline):
    card = model_card(Path(pipeline), "user/small", with_code)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "# small" in card.text and words in card.text and "expert 1    sigma 0.5 to 0" in card.text
    assert pipeline not in card.text


def test_image_to_image_pipelines_are_published_as_such(pipe, tmp_path):
    folder = save_with_code(LatteFlowInpaintPipeline.from_pipe(pipe), tmp_path / "out")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatteFlowInpaintPipeline"]
    assert "class LatteFlowInpaintPipeline(LatteFlowPipeline)" in (folder / "pipeline.py").read_text()
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 32, 64))
    images = []
    # The code in the folder runs; our own class runs instead.
    for load, module in ((DiffusionPipeline, "diffusers_modules."), (LatteFlowInpaintPipeline, "latte_flow_hf.")):
        loaded = load.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "LatteFlowInpaintPipeline" and type(loaded).__module__.startswith(module)
        call = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        images.append(loaded("a cross", Image.new("RGB", (64, 64)), mask, **call).images)
    assert torch.equal(*images)
    LatteFlowInpaintPipeline.from_pipe(pipe).save_pretrained(tmp_path / "plain")
    card = model_card(tmp_path / "plain", "user/small", with_code=False).text
    assert 'pipe = LatteFlowInpaintPipeline.from_pretrained("user/small")' in card
    assert 'pipe("a red circle", image="image.png", mask_image="mask.png")' in card


def other_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


def truncate(folder):
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_class, "holds a FluxPipeline, not one of \\['LatteFlowPipeline'"),
        (truncate, r"model\.safetensors is truncated or damaged"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae has no config.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index\.json is truncated"),
    ],
)
def test_a_damaged_pipeline_is_not_published(damage, words, pipeline, tmp_path):
    """The tests are offline: an upload would end in another error."""
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words):
        publish(folder, "user/name")


def test_a_pipeline_without_a_component_is_not_published(pipe, tmp_path):
    LatteFlowPipeline(pipe.model, pipe.processor, None, pipe.scheduler).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="has no vae; save a pipeline with all of its components"):
        publish(tmp_path / "out", "user/name")


def test_published_weights_have_hashes_and_the_folder_is_unchanged(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "folder")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    files = {"vae/w.safetensors": weights, "README.md": b"card", "model_index.json": folder / "model_index.json"}
    before = weights.read_bytes()
    copies = _with_hashes(files, tmp_path)
    assert list(copies) == ["vae/w.safetensors"] and check_hash(copies["vae/w.safetensors"])
    assert weights.read_bytes() == before and not check_hash(weights)
    store_hash(weights)
    assert _with_hashes(files, tmp_path) == {}
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(OSError, match="is damaged"):
        _with_hashes(files, tmp_path)
