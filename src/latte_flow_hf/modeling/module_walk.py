# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A walk over the modules of a network, fast enough for every call to look for hooks and adapters in it."""

from torch import nn


def all_modules(root: nn.Module) -> list[nn.Module]:
    """Same modules as `root.modules()`, outer ones first; a module that occurs twice is repeated.

    `Module.modules()` composes the name of every module and passes each through all generators around it, which takes
    several times as long.
    """
    found = [root]
    for module in found:  # The list grows while it is read.
        for child in module._modules.values():
            if child is not None:
                found.append(child)
    return found
