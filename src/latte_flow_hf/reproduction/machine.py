# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Where the numbers come from: the machine and the versions of packages."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


PACKAGES = ("latte_flow_hf", "torch", "transformers", "diffusers", "numpy")


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def device_name(device: str) -> str:
    """The processor, or the accelerator, such as `Intel(R) Xeon(R) Processor, 2 cores`."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return device
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
