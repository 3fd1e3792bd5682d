# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A folder that one process holds, while it writes there.

Not in files.py, which is part of the code that a published checkpoint carries, and must not need `filelock`.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


# In the folder, while a process holds it.
LOCK_FILE = "lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder alone. The system ends the lock with its process, so a killed one leaves no stale lock.

    Args:
        folder (`Path`): made if it does not exist, and removed again if nothing was written there; the file `lock` in
            it names the process that holds it.

    Raises:
        `OSError`: if another process holds it, with that process.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        owner = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        raise OSError(
            f"folder {folder} is in use by {owner or 'another process'}; wait until it ends, or use another folder."
        ) from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # Before the release: a process that waits for the removed file notices, and makes a new one.
        path.unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
