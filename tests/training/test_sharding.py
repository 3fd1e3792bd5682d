"""Settings of accelerate that are refused, and saving file by file; two real processes are in tests/integration."""

import json

import pytest
import torch

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training.sharding import check_sharding, save_sharded_pipeline


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("FSDP_VERSION", "1", "fsdp_version must be 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "must be false")],
)
def test_sharding_that_would_go_wrong_is_refused(variable, value, words, monkeypatch):
    right = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, setting in {**right, variable: value}.items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(ValueError, match=words):
        check_sharding()


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_a_pipeline_saved_file_by_file_loads_as_one_saved_at_once(pipe, tmp_path, max_shard_size):
    (tmp_path / "files").mkdir()
    save_sharded_pipeline(pipe, tmp_path / "files", max_shard_size)
    pipe.save_pretrained(tmp_path / "whole")
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in tmp_path.iterdir()]
    weights = sorted((tmp_path / "files" / "model").glob("*.safetensors"))
    if max_shard_size == "5GB":
        assert names[0] == names[1]
    else:
        index = json.loads((tmp_path / "files" / "model" / "model.safetensors.index.json").read_text())
        assert len(weights) > 1 and set(index["weight_map"].values()) == {path.name for path in weights}
        assert all(path.stat().st_size < 130_000 for path in weights)
    loaded = [LatteFlowPipeline.from_pretrained(tmp_path / name).model for name in ("files", "whole")]
    expected = pipe.model.state_dict()
    for model in loaded:
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    configs = [(tmp_path / name / "model" / "config.json").read_text() for name in ("files", "whole")]
    assert configs[0] == configs[1]
