"""Raw results that lie in the repository as one archive a study, `NAME.tar.xz`: found by their former paths."""

from __future__ import annotations

import lzma
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from rsd.checks import told
from rsd.types import RsdError

SUFFIX = ".tar.xz"


def located(path: Path) -> Path:
    """The path, or, where a folder above it is only there as an archive, its unpacked copy, kept while this runs."""
    if path.exists():
        return path
    for folder in (path, *path.parents):
        if folder.name and (archive := folder.with_name(folder.name + SUFFIX)).is_file():
            return Path(_unpacked(archive.resolve()).name) / path.relative_to(folder)
    return path


@cache
def _unpacked(archive: Path) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix=f"{archive.name.removesuffix(SUFFIX)}-")
    try:
        with tarfile.open(archive) as content:
            content.extractall(folder.name, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise RsdError(f"{archive}: cannot be unpacked ({told(error)}); fetch it again") from error
    return folder
