# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One expert on the accelerator, the others on the CPU.

An expert works for a whole interval, and the order of experts is known: at the last step of an interval each layer
that has done its work makes room for the one that takes its place, which is fetched while the layers after it still
run. So a picture costs K transfers of one expert, and never more than one expert's weights are on the accelerator.
"""

import torch
from torch import nn


class ExpertOffload:
    """Where the weights of the tower's layers are.

    Args:
        layers (`nn.ModuleList`): the tower's, on the CPU; with a GPU their memory is pinned, so that nothing waits for
            a transfer but the layer that it brings.
        device (`torch.device`): where they work. The CPU itself will do for tests: working weights are copies.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device):
        self.layers, self.device = layers, device
        self.transfers = 0
        self._home: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            for parameter in layers.parameters():
                parameter.data = parameter.data.pin_memory()

    @property
    def live(self) -> set[int]:
        """The layers whose weights are on the device."""
        return set(self._home)

    def prepare(self, expert_layers: range) -> None:
        """These layers are next: fetch what is not there yet, after all others went."""
        for index in self.live - set(expert_layers):
            self.release(index)
        for index in expert_layers:
            if index not in self._home:
                self.fetch(index)

    def fetch(self, index: int) -> None:
        """Begin to copy a layer's weights to the device."""
        with torch.cuda.stream(self._stream):  # does nothing without one
            home = [(parameter, parameter.data) for parameter in self.layers[index].parameters()]
            for parameter, data in home:
                parameter.data = data.to(self.device, non_blocking=True, copy=True)
            if self._stream is not None:
                self._arrived[index] = self._stream.record_event()
        self._home[index] = home
        self.transfers += 1

    def wait(self, index: int) -> None:
        """What is queued from here on finds the layer's weights."""
        if index in self._arrived:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(self._arrived.pop(index))
            for parameter, _ in self._home[index]:
                parameter.data.record_stream(here)

    def release(self, index: int) -> None:
        """Give a layer its weights on the CPU back; they never changed."""
        self.wait(index)
        for parameter, data in self._home.pop(index):
            parameter.data = data

    def release_all(self) -> None:
        """All weights at home, as between two calls: whoever changes them then, changes them for good."""
        for index in self.live:
            self.release(index)
