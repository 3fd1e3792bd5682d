# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
from fnmatch import fnmatch

import pytest


# Of the suites.
MARKERS = (
    "accelerate_tests attention autoround bfl big_accelerator bitsandbytes cache compile context_parallel cpu_offload "
    "executorch_export_test flash_attn_test flash_attn_3_test flash_attn_4_test generate gguf group_offload "
    "ip_adapter is_pipeline_test is_training_test lora memory modelopt onnx_export_test quantization quanto sdnq "
    "single_file tensor_parallel timeout torch_compile_test torch_export_test torchao training"
)


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items):
    """Tests that are named in `by_design` of their class must fail; `only` names those of the class that are run."""
    items[:] = [item for item in items if any(fnmatch(item.name, name) for name in getattr(item.cls, "only", ["*"]))]
    for item in items:
        for name, reason in getattr(item.cls, "by_design", {}).items():
            if fnmatch(item.name, name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
