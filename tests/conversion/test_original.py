# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Flat training state dicts, both ways."""

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from latte_flow_hf import LatteFlowForConditionalGeneration, LatteFlowPipeline
from latte_flow_hf.conversion import KeyTable, from_original, to_original


@pytest.fixture
def flat(pipeline_folder, tmp_path) -> dict[str, torch.Tensor]:
    to_original(pipeline_folder).write(tmp_path / "flat.safetensors")
    return load_file(tmp_path / "flat.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_there_and_back(suffix, flat, pipeline_folder, files_of, tmp_path):
    assert "gen_layers.1.residual_gate.weight" in flat and "visual.merger.ln_q.weight" in flat
    if suffix != ".safetensors":
        # A training loop's own file holds the tied head as well, on the embedding's storage.
        torch.save({**flat, "lm_head.weight": flat["model.embed_tokens.weight"]}, tmp_path / f"flat{suffix}")
    from_original(tmp_path / f"flat{suffix}", pipeline_folder).write(tmp_path / "back")
    before, after = files_of(pipeline_folder), files_of(tmp_path / "back")
    assert after.pop("README.md")
    weights = "model/model.safetensors"
    old, new = load_file(pipeline_folder / weights), load_file(tmp_path / "back" / weights)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    configs = [
        json.loads((folder / "model/config.json").read_text()) for folder in (pipeline_folder, tmp_path / "back")
    ]
    assert configs[0] == configs[1]
    for path in (weights, "model/config.json", "vae/diffusion_pytorch_model.safetensors"):
        before.pop(path), after.pop(path)
    assert before == after


def test_the_tower_alone(pipeline_folder, model, tmp_path):
    to_original(pipeline_folder, tower_only=True).write(tmp_path / "tower.safetensors")
    flat = {name: tensor + 1 for name, tensor in load_file(tmp_path / "tower.safetensors").items()}
    assert len(flat) == len(model.tower.state_dict())
    save_file(flat, tmp_path / "other.safetensors")
    from_original(tmp_path / "other.safetensors", pipeline_folder, tower_only=True).write(tmp_path / "out")
    loaded = LatteFlowForConditionalGeneration.from_pretrained(tmp_path / "out" / "model").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor + 1 if name.startswith("tower.") else tensor), name
    with pytest.raises(ValueError, match=r"flat.safetensors|missing: vlm"):
        from_original(tmp_path / "other.safetensors", pipeline_folder)


def test_a_backbone_where_none_was_expected(flat, pipeline_folder, tmp_path):
    with pytest.raises(ValueError, match="also holds the backbone"):
        from_original(tmp_path / "flat.safetensors", pipeline_folder, tower_only=True)


def test_the_type_of_the_file_is_the_type_that_loads(flat, pipeline_folder, tmp_path):
    save_file({name: tensor.bfloat16() for name, tensor in flat.items()}, tmp_path / "half.safetensors")
    from_original(tmp_path / "half.safetensors", pipeline_folder).write(tmp_path / "out")
    assert LatteFlowPipeline.from_pretrained(tmp_path / "out").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda flat: flat.pop("gen_layers.0.mlp.up_proj.weight"), "1 missing: tower.layers.0.mlp.up_proj.weight"),
        (lambda flat: flat.update({"ema.decay": torch.ones(1)}), "does not list 1 keys: ema.decay"),
        (
            lambda flat: flat.update({"gen_layers.0.residual_gate.weight": torch.ones(4, 32)}),
            "1 unexpected: tower.layers.0.self_attn.residual_gate.weight",
        ),
        (
            lambda flat: flat.update({"final_layer.linear.bias": torch.ones(5)}),
            r"1 of another shape: tower.head.proj.bias \(5,\) instead of \(4,\)",
        ),
        (
            lambda flat: flat.update({"lm_head.weight": flat["model.embed_tokens.weight"] + 1}),
            "vlm.lm_head.weight and .* differ",
        ),
    ],
)
def test_keys_and_shapes_must_be_exactly_the_models(change, words, flat, pipeline_folder, tmp_path):
    change(flat)
    save_file(flat, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=words):
        from_original(tmp_path / "changed.safetensors", pipeline_folder)


def test_another_table(flat, pipeline_folder, tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps([["net.tower.{rest}", "tower.{rest}"], ["net.backbone.{rest}", "vlm.{rest}"]]))
    to_original(pipeline_folder, table).write(tmp_path / "net.safetensors")
    names = load_file(tmp_path / "net.safetensors")
    assert "net.tower.head.proj.weight" in names and all(name.startswith("net.") for name in names)
    from_original(tmp_path / "net.safetensors", pipeline_folder, table).write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"table\.json does not list"):
        from_original(tmp_path / "flat.safetensors", pipeline_folder, table)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a list of pairs"),
        ("a: b", "must be a list of pairs"),
        ("- [a, b, c]", "is not a pair"),
        ("- [a, 3]", "is not a pair"),
        ("- ['a.{layer}', 'b.{rest}']", "on both sides or on neither"),
        ("- ['a.{other}', 'b.{other}']", "on both sides or on neither"),
        ("- ['a.{rest}', b]", "on both sides or on neither"),
        ("- [[", "is not YAML"),
    ],
)
def test_what_is_not_a_table(text, words, tmp_path):
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        KeyTable.from_file(tmp_path / "table.yaml")
    with pytest.raises(OSError, match="nowhere"):
        KeyTable.from_file(tmp_path / "nowhere.yaml")


def test_a_table_that_does_not_lead_back():
    table = KeyTable([("a.{rest}", "x.{rest}"), ("b.{rest}", "x.{rest}")], "mine")
    assert table.from_original(["a.1.w"]) == {"a.1.w": "x.1.w"} and table.to_original(["x.1.w"]) == {"x.1.w": "a.1.w"}
    with pytest.raises(ValueError, match=re.escape("mine does not lead back from b.1.w -> x.1.w")):
        table.from_original(["b.1.w"])


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_tries_to_run_code(how, flat, pipeline_folder, tmp_path):
    how({**flat, "final_layer.linear.bias": RunsCode(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises((ValueError, OSError), match=r"bad\.pt"):
        from_original(tmp_path / "bad.pt", pipeline_folder)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_holds_something_else(flat, pipeline_folder, tmp_path):
    for content, words in (
        ({"model": flat}, "tensors by their names and nothing else, got model"),
        ([1.0], "a flat dict of tensors, got a list"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "got x"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=words):
            from_original(tmp_path / "other.pt", pipeline_folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_truncated_or_missing(suffix, flat, pipeline_folder, tmp_path):
    torch.save(flat, tmp_path / "flat.pt")
    path = tmp_path / f"flat{suffix}"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(OSError, match=path.name):
        from_original(path, pipeline_folder)
    with pytest.raises(OSError, match="nowhere"):
        from_original(tmp_path / f"nowhere{suffix}", pipeline_folder)


def test_the_type_that_loads_survives_there_and_back(pipeline_folder, tmp_path):
    """float16 on disk that is loaded as float32, as in the embedded checkpoint."""
    source = tmp_path / "half"
    LatteFlowPipeline.from_pretrained(pipeline_folder, dtype=torch.float16).save_pretrained(source)
    config = source / "model" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    to_original(source).write(tmp_path / "flat.safetensors")
    from_original(tmp_path / "flat.safetensors", source).write(tmp_path / "back")
    assert (tmp_path / "back" / "model" / "config.json").read_text() == config.read_text()
    assert LatteFlowPipeline.from_pretrained(tmp_path / "back").model.dtype == torch.float32
