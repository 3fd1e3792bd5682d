# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Runs the notebooks and stores what they print and show: `python notebooks/execute.py [NAME ...]`.

Progress bars and warnings, which depend on the machine, are left out.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from latte_flow_hf.files import atomic_write


FOLDER = Path(__file__).parent
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    metadata = copy.deepcopy(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": folder}})
        client.execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    with atomic_write(path) as partial:
        nbformat.write(notebook, partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Such as first_steps.ipynb; all if left out.")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if name not in NAMES:
            parser.error(f"NAME must be one of {NAMES}, got {name!r}.")
        execute(FOLDER / name)
        print(name)


if __name__ == "__main__":
    main()
