# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from top to bottom, and what is stored in them is what they show, and small."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SECONDS = 300


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert (FOLDER / name).stat().st_size < 300_000
    outputs = outputs_of(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    # Nothing of the machine that it was run on.
    assert not re.search(r"/(home|work|tmp|root|Users)/", (FOLDER / name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name, tmp_path):
    """Their own assertions hold, and each cell shows as many images as are stored."""
    stored = nbformat.read(FOLDER / name, as_version=4)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def num_images(notebook):
        return [
            "".join(output.output_type for output in cell.get("outputs", []) if "image/png" in output.get("data", {}))
            for cell in notebook.cells
        ]

    assert num_images(notebook) == num_images(stored)
    printed = "".join(output.get("text", "") for output in outputs_of(notebook))
    if name == "teach_one_expert.ipynb":
        shares = dict(re.findall(r"^(no adapter|expert \d) +(\d+)% in the corner", printed, re.MULTILINE))
        assert int(shares["expert 0"]) >= int(shares["no adapter"]) + 30 >= int(shares["expert 3"]) + 15
    else:
        assert "a blue square\n" in printed and "seven\n" in printed
