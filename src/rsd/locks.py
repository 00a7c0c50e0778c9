"""Work that one of several processes does for all of them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def first_or_after(folder: Path) -> Iterator[None]:
    """One process at a time begins with what is inside; those that come meanwhile wait and then go on together.

    A folder that cannot be written to, or that knows no locks, lets everybody in at once: that costs time, no more.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "first.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_SH)
        yield
