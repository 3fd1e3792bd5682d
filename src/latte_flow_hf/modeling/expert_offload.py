# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Hooks that keep one expert of the tower on the accelerator and the others on the CPU.

Experts run one after the other, each for a whole interval of timesteps. During the last step of an expert, each of its
layers leaves the accelerator after its `forward`, and the layer of the next expert in the same place is copied there
while the following layers run; if the next expert has more layers, its last ones follow together. An image takes one
transfer of each expert, and at most one expert is on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class ExpertOffload:
    """Moves the weights of the tower's layers, by forward hooks on the layers.

    A layer whose expert is not on the device fetches its expert when it is called. A caller that knows the order of
    the experts calls `enter` before an expert's first step and sets `next_expert` before its last one.

    Args:
        layers (`nn.ModuleList`):
            The tower's layers, on the CPU. Their memory is pinned if the device is a GPU, so that copies run beside
            the computation.
        experts (sequence of `range`): the indices of each expert's layers.
        device (`torch.device`): where the layers run. With the CPU, weights in use are copies.
    """

    def __init__(self, layers: nn.ModuleList, experts: Sequence[range], device: torch.device):
        self.layers, self.experts, self.device = layers, list(experts), device
        self.next_expert: int | None = None
        self.num_transfers = 0
        self._cpu_weights: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            for parameter in layers.parameters():
                parameter.data = parameter.data.pin_memory()
        self._handles = []
        for expert, indices in enumerate(self.experts):
            for index in indices:
                self._handles += [
                    layers[index].register_forward_pre_hook(partial(self._pre_forward, expert, index)),
                    layers[index].register_forward_hook(partial(self._post_forward, expert, index)),
                ]

    @property
    def loaded_layers(self) -> set[int]:
        """The indices of the layers whose weights are on the device."""
        return set(self._cpu_weights)

    def enter(self, expert: int) -> None:
        """Put all layers of an expert on the device, and no others."""
        self.next_expert = None
        for index in self.loaded_layers - set(self.experts[expert]):
            self._release(index)
        for index in self.experts[expert]:
            if index not in self._cpu_weights:
                self._fetch(index)
        for index in self.experts[expert]:
            self._wait(index)

    def release_all(self) -> None:
        """Put all weights back on the CPU, so that changes to them between two calls persist."""
        self.next_expert = None
        for index in self.loaded_layers:
            self._release(index)

    def remove(self) -> None:
        """Put all weights back on the CPU and remove the hooks."""
        self.release_all()
        for handle in self._handles:
            handle.remove()

    def _pre_forward(self, expert: int, index: int, *_: Any) -> None:
        if index not in self._cpu_weights:
            self.enter(expert)
        self._wait(index)

    def _post_forward(self, expert: int, index: int, *_: Any) -> None:
        if self.next_expert is not None:
            self._release(index)
            place, following = self.experts[expert].index(index), self.experts[self.next_expert]
            is_last = index == self.experts[expert][-1]
            for next_index in following[place:] if is_last else following[place : place + 1]:
                self._fetch(next_index)

    def _fetch(self, index: int) -> None:
        """Start to copy a layer's weights to the device."""
        with torch.cuda.stream(self._stream):  # does nothing if the stream is None
            cpu_weights = [(parameter, parameter.data) for parameter in self.layers[index].parameters()]
            for parameter, data in cpu_weights:
                parameter.data = data.to(self.device, non_blocking=True, copy=True)
            if self._stream is not None:
                self._copied[index] = self._stream.record_event()
        self._cpu_weights[index] = cpu_weights
        self.num_transfers += 1

    def _wait(self, index: int) -> None:
        """Make the current stream wait for the copy of a layer."""
        if index in self._copied:
            current_stream = torch.cuda.current_stream(self.device)
            current_stream.wait_event(self._copied.pop(index))
            for parameter, _ in self._cpu_weights[index]:
                parameter.data.record_stream(current_stream)

    def _release(self, index: int) -> None:
        """Give a layer its weights on the CPU again; inference does not change them, so nothing is copied back."""
        self._wait(index)
        for parameter, data in self._cpu_weights.pop(index):
            parameter.data = data
