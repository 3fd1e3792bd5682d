"""The fast walk finds the modules that `Module.modules()` finds."""

from torch import nn

from latte_flow_hf.modeling.module_walk import all_modules


def test_the_walk_finds_every_module_outer_ones_first(model):
    found = all_modules(model)
    assert set(found) == set(model.modules()) and found[0] is model
    places = {module: place for place, module in enumerate(found)}
    assert all(places[child] > places[module] for module in found for child in module.children())


def test_empty_places_are_skipped_and_shared_modules_repeated():
    shared = nn.Linear(1, 1)
    root = nn.Sequential(shared, nn.Sequential(shared))
    root.register_module("none", None)
    assert all_modules(root) == [root, shared, root[1], shared]
