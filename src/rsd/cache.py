"""Folders for what is compiled once and loaded again, which nobody else may have put there.

numba's cache is of pickles: whoever can write into it can run code as the reader. So a folder is used only if it is
the user's own and nobody else may write into it, and never because its name can be foretold.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path


def private_folder(name: str) -> Path:
    """`name` in the user's cache ($XDG_CACHE_HOME, else ~/.cache); where that cannot be, in the temporary folder, and
    if somebody else has that name there, a fresh one that is deleted when the process ends."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for parent in (Path(home) / "rsd-vla", Path(tempfile.gettempdir()) / f"rsd-{os.getuid()}"):
        if _is_private(parent) and _is_private(parent / name):
            return parent / name
    fresh = Path(tempfile.mkdtemp(prefix="rsd-"))
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    return fresh


def _is_private(folder: Path) -> bool:
    """Whether the folder, made here if need be, is ours, no link, and only ours to write into."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found, above = folder.lstat(), folder.parent.stat()
    except OSError:
        return False
    replaceable = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not replaceable and os.access(folder, os.W_OK)


def make_room(current: Path, limit_bytes: int) -> None:
    """Delete the folders beside it, used longest ago first and it never, until the rest fits."""
    with contextlib.suppress(FileNotFoundError):  # another process makes room as well
        folders = [folder for folder in current.parent.iterdir() if folder.is_dir()]
        sizes = {each: sum(path.stat().st_size for path in each.rglob("*") if path.is_file()) for each in folders}
        for folder in sorted(sizes.keys() - {current}, key=lambda folder: folder.stat().st_mtime):
            if sum(sizes.values()) > limit_bytes:
                shutil.rmtree(folder, ignore_errors=True)
                sizes.pop(folder)
