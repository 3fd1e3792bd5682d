# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The page that says what works with what: each test that it names exists, each guider of diffusers has its place."""

import re
from pathlib import Path

import diffusers.guiders
import pytest


ROOT = Path(__file__).parents[2]
DOORS = (ROOT / "docs" / "doors.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`|`(tests/[\w/]+\.py)`", DOORS)


def named_tests() -> list[tuple[str, str]]:
    """(file, test), where a name without a file is in the file named before it."""
    tests, file = [], ""
    for path, name, alone in NAMED:
        file = path or alone or file
        if name:
            tests.append((file, name))
    return tests


@pytest.mark.parametrize(("file", "name"), named_tests())
def test_a_named_test_exists(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


def test_each_door_has_a_test():
    rows = [
        line for line in DOORS.splitlines() if line.startswith("|") and not re.match(r"\|(---|\s*(Door|Left))", line)
    ]
    without = [row for row in rows if "::" not in row]
    assert len(rows) > 40
    assert [row.split("|")[1].strip() for row in without] == [
        "ControlNet, IP-Adapter, T2I-Adapter",
        "context parallelism of diffusers",
    ]


def test_each_guider_is_mentioned():
    guide = (ROOT / "docs" / "guides" / "modular.md").read_text()
    guiders = {name for name in vars(diffusers.guiders) if name.endswith("Guidance")} - {"BaseGuidance"}
    assert len(guiders) > 10
    assert {name for name in guiders if f"`{name}`" not in guide} == set()
