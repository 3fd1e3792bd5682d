"""A folder that one process holds."""

import subprocess
import sys

import pytest

from latte_flow_hf.folder_lock import lock_folder


HOLD = """
import sys
from pathlib import Path
from latte_flow_hf.folder_lock import lock_folder

with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_and_free_when_that_is_killed(tmp_path):
    with lock_folder(tmp_path / "run"):
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError, match=rf"run is in use by process {holder.pid} on "), lock_folder(tmp_path / "run"):
        raise AssertionError("the block must not run")
    holder.kill()
    holder.wait()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    with lock_folder(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_locked_folder_in_which_nothing_is_written_is_removed(tmp_path):
    with pytest.raises(ValueError), lock_folder(tmp_path / "new"):
        raise ValueError
    with lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
