# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A studio around the random pipeline of the session."""

import pytest

from latte_flow_hf.app.studio import Studio


@pytest.fixture
def studio(own_pipe) -> Studio:
    return Studio(own_pipe, "random")


@pytest.fixture
def outcome():
    """The updates of a generator, and the last one."""

    def outcome(updates):
        updates = list(updates)
        return updates, updates[-1]

    return outcome
