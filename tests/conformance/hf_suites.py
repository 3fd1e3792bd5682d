# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Makes the test folders of transformers, diffusers and peft importable as `hf_tests.transformers` and so on.

They are not in the wheels. `HF_TESTS` names a folder with a checkout of each of them, at the installed versions:

    HF_TESTS=checkouts pytest tests/conformance
"""

import contextlib
import os
import sys
import types

import pytest


if "HF_TESTS" not in os.environ:
    pytest.skip("needs HF_TESTS, a folder with checkouts of transformers, diffusers, peft", allow_module_level=True)

sys.modules["hf_tests"] = types.ModuleType("hf_tests")
sys.modules["hf_tests"].__path__ = []
for library in ("transformers", "diffusers", "peft"):
    package = types.ModuleType(f"hf_tests.{library}")
    package.__path__ = [os.path.join(os.environ["HF_TESTS"], library, "tests")]
    sys.modules[package.__name__] = package
# Some files of transformers import each other, and scripts of the checkout, by these names.
sys.modules["tests"] = sys.modules["hf_tests.transformers"]
sys.path.append(os.path.join(os.environ["HF_TESTS"], "transformers"))


class WholeTests:
    """A failing subtest fails its test: pytest does not see one that is expected."""

    @contextlib.contextmanager
    def subTest(self, *args, **kwargs):  # noqa: N802
        yield
