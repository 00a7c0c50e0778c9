"""Folders that several processes come to: one that holds it alone, or one that goes first.

flock: the kernel lets go of a lock when its process ends, however it ends, so that there are no stale ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rsd.checks import checked
from rsd.output import writing
from rsd.types import RsdError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder, made if need be, for one run: everything that writes a run takes it first.

    Raises RsdError if another process has it, or if nothing can be written there. A file system without locks (NFS and
    Lustre can be mounted so) is used after a warning.
    """
    folder = checked(Path, folder, "folder")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder) as lock:
        try:
            with writing(folder):
                lock.truncate(0)
                # past the buffer, which would fail again as it is closed
                os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone
                (folder / LOCK_FILE).unlink()  # while it is held: who opened it meanwhile finds another one there
                for path in new:
                    path.rmdir()  # where nothing was written


def _locked(folder: Path) -> TextIO:
    """The open lock file; see `exclusive`."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK_FILE).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
            raise RsdError(
                f"{folder}: another run is writing here ({holder}); wait for it or choose another folder"
            ) from None
        except OSError as error:
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}; NFS without them?); make sure "
                "that no other process writes there, or choose a folder on a local disk",
                file=sys.stderr,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                return lock
        lock.close()  # its holder ended between the two lines above, and took the file away


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
