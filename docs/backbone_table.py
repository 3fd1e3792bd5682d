# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Makes the table of backbones from the results of their tests: `python docs/backbone_table.py`.

A row is a backbone of tests/processors.py, a column a test of tests/integration/test_backbones.py, also of those that
need --run-slow.
"""

import sys
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "integration" / "test_backbones.py"
PAGE = ROOT / "docs" / "guides" / "backbone_table.md"

# The heading of each test's column.
COLUMNS = {
    "test_text": "Text",
    "test_prompt_with_image": "Images in prompts",
    "test_padded": "Padding",
    "test_training_step": "Training",
    "test_recipe": "Recipe",
    "test_lora": "LoRA",
    "test_save_and_load": "Save, load",
    "test_convert": "Convert",
    "test_bfloat16": "bfloat16",
    "test_compile": "Compile",
    "test_offload": "Off-load",
}
CELLS = {"passed": "yes", "failed": "**no**", "skipped": "not tested"}


class Results:
    """Collects the outcome of each test, and the first sentence that describes it, by name and backbone."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self.descriptions: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name, _, family = item.name.rstrip("]").partition("[")
            if family:
                self.outcomes[name, family] = "skipped"
                self.descriptions[name] = " ".join(str(item.function.__doc__).split())  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, _, family = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        if family and (report.when == "call" or report.failed):
            self.outcomes[name, family] = report.outcome


def page(results: Results, processors: dict[str, str]) -> str:
    """The page, from the results and the class of each backbone's processor."""
    lines = [
        "# Tested backbones",
        "",
        "<!-- Made by docs/backbone_table.py. -->",
        f"Made by `python docs/backbone_table.py` with transformers {transformers.__version__}. Each cell is a test "
        "of a random model of four layers with its stock processor and a tokenizer of bytes. No released"
        " weights were loaded.",
        "",
        " | ".join(["| Backbone", "Processor", *COLUMNS.values()]) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for family, processor in processors.items():
        cells = [CELLS[results.outcomes[test, family]] for test in COLUMNS]
        lines.append(" | ".join([f"| {family}", f"`{processor}`", *cells]) + " |")
    lines += ["", "| Column | Test |", "|---|---|"]
    lines += [f"| {heading} | {results.descriptions[test]} |" for test, heading in COLUMNS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    results = Results()
    status = pytest.main(["-q", "--run-slow", "-p", "no:cacheprovider", str(TESTS)], plugins=[results])
    from processors import PROCESSORS

    PAGE.write_text(page(results, {name: entry["class"] for name, entry in PROCESSORS.items()}), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
