# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Whether a method of another library takes an argument.

Answers are kept, because reading a signature takes as long as a layer of a small model.
"""

import functools
import inspect
from collections.abc import Callable


@functools.cache
def takes_argument(method: Callable, name: str) -> bool:
    """Whether `method` has an argument `name`; pass the method of the class, such as `type(module).forward`."""
    return name in inspect.signature(method).parameters
