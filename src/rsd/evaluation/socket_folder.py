"""The folder of a pool's sockets: in TMPDIR, deleted with the pool, and after a kill by the next one that starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "rsd-sockets-"
LOCK = "lock"


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder of this process alone. Held by a lock, which the kernel opens however the process ends."""
    remove_stale(Path(tempfile.gettempdir()))
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    folder = hidden.with_name(hidden.name[1:])
    try:
        with (hidden / LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # no locks there: it is never taken for a stale one
                fcntl.flock(lock, fcntl.LOCK_EX)
            hidden.rename(folder)  # it is found by others only now that it is held
            yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(place: Path) -> None:
    """Delete the folders of killed processes of this user."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # held, another user's, or gone meanwhile
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with (folder / LOCK).open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
