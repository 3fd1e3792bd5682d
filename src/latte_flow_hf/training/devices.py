# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Accelerators: memory, its bandwidth and peak speed, from the data sheets of their makers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Args:
        name (`str`): its name.
        memory (`float`): bytes of memory. Data sheets give GB, here 10^9 bytes; some devices have a little more.
        bandwidth (`float`, *optional*): bytes per second that its memory reads or writes.
        bfloat16, tf32, float32 (`float`): peak operations per second of dense matrix products, without sparsity.
        source (`str`): where the numbers are from.
    """

    name: str
    memory: float
    bandwidth: float | None
    bfloat16: float
    tf32: float
    float32: float
    source: str


def _device(
    name: str, memory: float, bandwidth: float, bfloat16: float, tf32: float, float32: float, source: str
) -> Device:
    return Device(name, memory * 1e9, bandwidth * 1e12, bfloat16 * 1e12, tf32 * 1e12, float32 * 1e12, source)


# GB, TB/s and TFLOP/s. Where a data sheet gives the speed with sparsity alone, half of it.
DEVICES = {
    device.name: device
    for device in (
        _device("a100-40gb", 40, 1.555, 312, 156, 19.5, "data sheet of NVIDIA A100 SXM"),
        _device("a100-80gb", 80, 2.039, 312, 156, 19.5, "data sheet of NVIDIA A100 SXM"),
        _device("b200", 180, 7.7, 2250, 1100, 75, "data sheet of NVIDIA HGX B200, one of 8"),
        _device("h100", 80, 3.35, 989, 494, 67, "data sheet of NVIDIA H100 SXM"),
        _device("h200", 141, 4.8, 989, 494, 67, "data sheet of NVIDIA H200 SXM"),
        _device("l40s", 48, 0.864, 362, 183, 91.6, "data sheet of NVIDIA L40S"),
        _device("rtx4090", 24, 1.008, 165.2, 82.6, 82.6, "NVIDIA Ada architecture paper, GeForce RTX 4090"),
    )
}


def find_device(name: str, memory_gb: float | None = None, tflops: float | None = None) -> Device:
    """A device by its name, or one with the numbers that are given.

    Args:
        name (`str`): one of `DEVICES`, or any name if both numbers are given.
        memory_gb (`float`, *optional*): memory in GB, in place of that of the data sheet.
        tflops (`float`, *optional*): peak TFLOP/s of all matrix products, in place of those of the data sheet.

    Raises:
        `ValueError`: if the name is unknown and a number is missing, or a number is not positive and finite.
    """
    for option, value in (("--memory-gb", memory_gb), ("--tflops", tflops)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option} must be positive and finite, got {value}.")
    known = DEVICES.get(name)
    if known is None and (memory_gb is None or tflops is None):
        raise ValueError(
            f"device must be one of {sorted(DEVICES)}, got {name!r}; of another one, give --memory-gb and --tflops."
        )
    given = [] if known is None else [known.source]
    if memory_gb is not None or tflops is not None:
        given.append("numbers given by you")
    memory = known.memory if memory_gb is None and known is not None else 1e9 * float(memory_gb or 0)
    if tflops is not None:
        bandwidth, peak = None if known is None else known.bandwidth, tflops * 1e12
        return Device(name, memory, bandwidth, peak, peak, peak, ", ".join(given))
    assert known is not None
    return Device(name, memory, known.bandwidth, known.bfloat16, known.tf32, known.float32, ", ".join(given))
