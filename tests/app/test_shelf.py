# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Adapters that visitors choose and upload."""

import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from latte_flow_hf.app.limits import Limits
from latte_flow_hf.app.shelf import AdapterShelf
from latte_flow_hf.training import expert_lora_config


@pytest.fixture(scope="session")
def make_adapter(make_model, tmp_path_factory):
    """The folder of a random adapter of some experts."""

    def make(name: str, experts: list[int], seed: int = 0, **config):
        model = make_model()
        adapted = peft.get_peft_model(model, expert_lora_config(model, experts=experts, r=2, **config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.5)
        folder = tmp_path_factory.mktemp("adapters") / name
        adapted.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def style(make_adapter):
    return make_adapter("style", [1])


@pytest.fixture
def shelf(own_pipe):
    return AdapterShelf(own_pipe, Limits())


def image(pipe):
    return np.asarray(
        pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    )


def test_a_folder_of_adapters(shelf, style, make_adapter, tmp_path):
    shutil.copytree(style, tmp_path / "style")
    shutil.copytree(make_adapter("both", [0, 1]), tmp_path / "both")
    (tmp_path / "notes").mkdir()
    before = image(shelf.pipe)
    shelf.add_folder(tmp_path)
    assert {a.name: (a.experts, a.method, a.shares) for a in shelf.adapters()} == {
        "both": ((0, 1), "LORA", False),
        "style": ((1,), "LORA", False),
    }
    assert shelf.find("style").num_parameters * 2 == shelf.find("both").num_parameters
    # On the shelf they do nothing.
    assert np.array_equal(image(shelf.pipe), before)


def test_weights_are_those_of_the_request_alone(shelf, style):
    plain = image(shelf.pipe)
    shelf.add("style", style)
    shelf.activate((("style", (1.0, 1.0)),), "")
    full = image(shelf.pipe)
    shelf.activate((("style", (1.0, 0.5)),), "")
    half = image(shelf.pipe)
    shelf.activate((("style", (1.0, 0.0)),), "")
    assert np.array_equal(image(shelf.pipe), plain)
    shelf.activate((), "")
    assert np.array_equal(image(shelf.pipe), plain)
    assert not np.array_equal(full, plain) and not np.array_equal(half, full)

    shelf.pipe.set_adapters("-style", [1.0, 0.5])
    assert np.array_equal(image(shelf.pipe), half)


def test_uploads_belong_to_a_session(shelf, style):
    adapter = shelf.upload([str(style / "adapter_model.safetensors"), str(style / "adapter_config.json")], "me")
    assert adapter.owner == "me" and shelf.names("me") == ["adapter_model"] and shelf.names("you") == []
    with pytest.raises(ValueError, match="no adapter 'adapter_model'"):
        shelf.activate((("adapter_model", (1.0, 1.0)),), "you")
    shelf.activate((("adapter_model", (1.0, 1.0)),), "me")
    # Another visitor may upload a file of the same name.
    shelf.upload([str(style / "adapter_model.safetensors"), str(style / "adapter_config.json")], "you")
    shelf.forget("me")
    assert shelf.names("me") == [] and shelf.names("you") == ["adapter_model"]
    assert shelf.pipe._adapters() == ["you-adapter_model"]


@pytest.mark.filterwarnings("ignore:adapter .* came without a configuration")
def test_a_file_alone_is_read_as_lora(shelf, style):
    plain = image(shelf.pipe)
    adapter = shelf.upload([str(style / "adapter_model.safetensors")], "me")
    assert adapter.experts == (1,)
    shelf.activate(((adapter.name, (1.0, 1.0)),), "me")
    assert not np.array_equal(image(shelf.pipe), plain)


def test_bad_uploads_are_refused_and_leave_nothing(shelf, style, tmp_path):
    weights = style / "adapter_model.safetensors"
    plain = image(shelf.pipe)
    pickled = tmp_path / "adapter_model.bin"
    torch.save({}, pickled)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    other = tmp_path / "other.safetensors"
    save_file({"some.layer.weight": torch.zeros(2)}, other)
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "NOTHING"}')
    for paths, told in (
        ([pickled], "Upload one .safetensors"),
        ([weights, cut], "Upload one .safetensors"),
        ([config], "Upload one .safetensors"),
        ([cut], "cannot be used"),
        ([other], "cannot be used"),
        ([weights, config], "cannot be used"),
    ):
        with pytest.raises(ValueError, match=told):
            shelf.upload([str(path) for path in paths], "me")
    assert shelf.names("me") == [] and shelf.pipe._adapters() == []
    assert np.array_equal(image(shelf.pipe), plain)
    small = AdapterShelf(shelf.pipe, Limits(adapter_bytes=10))
    with pytest.raises(ValueError, match="at most 0 MB"):
        small.upload([str(weights)], "me")


@pytest.mark.filterwarnings("ignore:adapter .* came without a configuration")
def test_limits_of_a_visitor(shelf, style, tmp_path):
    shelf.max_uploads = 1
    shelf.add("style", style)
    mine = tmp_path / "mine.safetensors"
    shutil.copy(style / "adapter_model.safetensors", mine)
    shelf.upload([str(mine)], "me")
    with pytest.raises(ValueError, match="1 adapters already"):
        shelf.upload([str(mine)], "me")
    with pytest.raises(ValueError, match="belongs to the studio"):
        shelf.remove("style", "me")
    shelf.remove("mine", "me")
    shelf.upload([str(mine)], "me")


def test_a_folder_without_adapters(shelf, tmp_path):
    with pytest.raises(ValueError, match="has none"):
        shelf.add_folder(tmp_path)
