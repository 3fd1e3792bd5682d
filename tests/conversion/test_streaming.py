# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Tensors that stay on disk until they are needed."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from latte_flow_hf.conversion.folders import model_on_meta
from latte_flow_hf.conversion.streaming import (
    StoredTensor,
    check_tensors,
    format_names,
    module_tensors,
    read_pickle,
    read_safetensors,
    read_weights,
    stored_names,
    write_safetensors,
)


def stored(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def anonymous_memory() -> int:
    """Bytes that this process has allocated, without the pages of mapped files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tensors_of_a_file_take_no_memory_of_their_own(suffix, tmp_path):
    path, size = tmp_path / f"large{suffix}", 1 << 26
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.ones(size // 4), "b": torch.ones(2, 3)}, path)
    before = anonymous_memory()
    tensors = (read_safetensors if suffix == ".safetensors" else read_pickle)(path)
    value = tensors["a"].read()
    assert value.sum() == size // 4 and anonymous_memory() - before < size / 4
    write_safetensors(tmp_path / "copy.safetensors", tensors, {})
    assert anonymous_memory() - before < size / 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([float("nan"), -0.0]),
        torch.tensor([True, False]),
        torch.arange(3),
    ],
)
def test_there_and_back_bit_for_bit(tensor, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": stored(tensor)}, {"format": "pt"})
    (read,) = read_safetensors(path).values()
    assert read.equals(stored(tensor)) and read.nbytes == tensor.nbytes
    assert torch.equal(load_file(path)["a"].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_equality_is_of_bits_shape_and_type():
    zero = stored(torch.zeros(2))
    assert zero.equals(stored(torch.zeros(2)))
    for other in (torch.tensor([0.0, -0.0]), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32)):
        assert not zero.equals(stored(other))


def test_tensors_of_a_pickle_may_share_memory(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    torch.save({"a": weight, "b": weight, "row": weight[1]}, tmp_path / "a.pt")
    write_safetensors(tmp_path / "a.safetensors", read_pickle(tmp_path / "a.pt"), {})
    loaded = load_file(tmp_path / "a.safetensors")
    assert (
        torch.equal(loaded["a"], weight) and torch.equal(loaded["b"], weight) and torch.equal(loaded["row"], weight[1])
    )


def test_shards_and_their_index_must_agree(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}')
    assert set(read_weights(tmp_path, "model")) == {"a", "b"}
    for weight_map, words in (
        ('{"a": "model-1.safetensors"}', "disagree about b"),
        ('{"a": "model-0.safetensors", "b": "model-1.safetensors"}', "has no model-0.safetensors"),
        ('{"a": "../model-1.safetensors"}', "must name files in its own folder"),
    ):
        index.write_text(f'{{"weight_map": {weight_map}}}')
        with pytest.raises(OSError, match=words):
            read_weights(tmp_path, "model")
    index.unlink()
    with pytest.raises(OSError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_weights(tmp_path, "model")


def test_a_type_that_torch_does_not_have(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert b'"I8"' in data
    (tmp_path / "a.safetensors").write_bytes(data.replace(b'"I8"', b'"Q8"'))
    with pytest.raises((OSError, ValueError), match=r"a\.safetensors"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_latent_embedding_of_an_earlier_checkpoint(model):
    """It was a linear map of flattened patches; only its name and shape differ."""
    on_meta = model_on_meta(model.config)
    tensors = {name: stored(model.state_dict()[name]) for name in stored_names(model)}
    weight = tensors["tower.latent_embedding.proj.weight"]
    earlier = {name.replace("latent_embedding.proj", "latent_embedding"): tensor for name, tensor in tensors.items()}
    earlier["tower.latent_embedding.weight"] = stored(weight.read().flatten(1))
    converted = module_tensors(earlier, on_meta, "here")
    assert list(converted) == list(tensors) and all(converted[name].equals(tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match=r"here: tower\.latent_embedding\.proj\.weight is stored twice"):
        module_tensors({**earlier, "tower.latent_embedding.proj.weight": weight}, on_meta, "here")
    wrong = {**earlier, "tower.latent_embedding.weight": stored(torch.zeros(32, 5))}
    with pytest.raises(ValueError, match=r"proj\.weight \(32, 5\) instead of \(32, 4, 1, 1\)"):
        module_tensors(wrong, on_meta, "here")


def test_a_backbone_whose_weights_are_merged_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16, "num_experts": 2}
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    key = "model.layers.0.mlp.experts.0.gate_proj.weight"
    with pytest.raises(ValueError, match=rf"here: {re.escape(key)} of 'qwen2_moe' is merged.* use .*from_vlm"):
        module_tensors({key: stored(torch.zeros(8, 16))}, model, "here")


def test_check_tensors_names_every_problem():
    module = torch.nn.Linear(2, 3)
    tensors = {name: stored(tensor) for name, tensor in reversed(module.state_dict().items())}
    assert list(check_tensors(tensors, module, "here")) == ["weight", "bias"]
    problems = {"weight": stored(torch.zeros(2, 3)), "scale": stored(torch.zeros(1))}
    with pytest.raises(ValueError) as caught:
        check_tensors(problems, module, "here")
    assert str(caught.value) == (
        "here: the tensors do not fit the configuration; 1 missing: bias; 1 unexpected: scale; "
        "1 of another shape: weight (2, 3) instead of (3, 2)."
    )


def test_long_lists_are_shortened():
    assert format_names(["b", "a"]) == "a, b"
    assert format_names(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
