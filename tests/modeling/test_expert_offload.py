# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The hooks over plain linear layers: which weights are on the device, and when."""

import copy

import pytest
import torch

from latte_flow_hf.modeling.expert_offload import ExpertOffload


EXPERTS = [range(0, 2), range(2, 4), range(4, 6)]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(6)).requires_grad_(False)


@pytest.fixture
def offload(layers):
    return ExpertOffload(layers, EXPERTS, torch.device("cpu"))


def run(layers, expert):
    hidden_states = torch.ones(1, 3)
    for index in EXPERTS[expert]:
        hidden_states = layers[index](hidden_states)
    return hidden_states


def test_a_layer_fetches_its_expert(layers, offload):
    expected = [run(copy.deepcopy(torch.nn.ModuleList(layers)), expert) for expert in range(3)]
    offload.release_all()
    for expert in (2, 0, 0, 1):
        assert torch.equal(run(layers, expert), expected[expert])
        assert offload.loaded_layers == set(EXPERTS[expert])
    assert offload.num_transfers == 3 * 2


def test_enter_brings_all_layers_of_an_expert(offload):
    offload.enter(1)
    assert offload.loaded_layers == {2, 3} and offload.num_transfers == 2
    offload.enter(1)
    assert offload.num_transfers == 2
    offload.enter(0)
    assert offload.loaded_layers == {0, 1} and offload.num_transfers == 4


def test_layers_are_exchanged_one_by_one_in_the_last_step(layers, offload):
    offload.enter(0)
    run(layers, 0)
    assert offload.loaded_layers == {0, 1}
    offload.next_expert = 2
    hidden_states = layers[0](torch.ones(1, 3))
    assert offload.loaded_layers == {1, 4}
    layers[1](hidden_states)
    assert offload.loaded_layers == {4, 5} and offload.num_transfers == 4
    # There is nothing left to transfer, and the exchange has ended.
    offload.enter(2)
    run(layers, 2)
    assert offload.loaded_layers == {4, 5} and offload.num_transfers == 4 and offload.next_expert is None


def test_weights_return_to_the_cpu(layers, offload):
    pointers = [p.data_ptr() for p in layers.parameters()]
    offload.enter(0)
    assert [p.data_ptr() for p in layers.parameters()] != pointers
    offload.release_all()
    assert [p.data_ptr() for p in layers.parameters()] == pointers and not offload.loaded_layers


def test_remove_leaves_plain_layers(layers, offload):
    run(layers, 0)
    offload.remove()
    assert not offload.loaded_layers
    run(layers, 1)
    assert not offload.loaded_layers and offload.num_transfers == 2


def test_a_copy_has_hooks_of_its_own(layers, offload):
    other = copy.deepcopy({"layers": layers, "offload": offload})
    run(other["layers"], 1)
    assert other["offload"].loaded_layers == {2, 3} and not offload.loaded_layers


@pytest.mark.parametrize("experts", [[range(0, 1), range(1, 4)], [range(0, 3), range(3, 4)]])
def test_experts_of_unequal_size_are_exchanged_whole(experts):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(4)).requires_grad_(False)
    offload = ExpertOffload(layers, experts, torch.device("cpu"))
    offload.enter(0)
    offload.next_expert = 1
    hidden_states = torch.ones(1, 3)
    for index in experts[0]:
        hidden_states = layers[index](hidden_states)
        assert len(offload.loaded_layers) <= max(map(len, experts))
    assert offload.loaded_layers == set(experts[1]) and offload.num_transfers == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(layers):
    expected = [run(layers, expert) for expert in range(3)]
    offload = ExpertOffload(layers, EXPERTS, torch.device("cuda"))
    for expert in (0, 1, 2):
        offload.enter(expert)
        offload.next_expert = expert + 1 if expert < 2 else None
        hidden_states = torch.ones(1, 3, device="cuda")
        for index in EXPERTS[expert]:
            hidden_states = layers[index](hidden_states)
        torch.testing.assert_close(hidden_states.cpu(), expected[expert])
    assert offload.num_transfers == 6
    offload.release_all()
    assert {p.device.type for p in layers.parameters()} == {"cpu"}
