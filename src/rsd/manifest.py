"""`manifest.json`: the SHA-256 of every file of a checkpoint directory, so that what is loaded is what was saved.

Its files are those that this package reads, JSON and safetensors. Saving writes it and loading verifies it. A
checkpoint that was edited on purpose is sealed again by `rsd checkpoint seal`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsd.checks import Checked, Sha256, checked
from rsd.json_files import from_json, read_versioned, write_atomically
from rsd.types import RsdError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
BASE_LINK = "base"  # the model that a policy on OpenVLA builds on: has a fingerprint of its own
SUFFIXES = (".json", ".safetensors")
SETTLED = 10.0  # s since a file last changed
REMEDY = "copy the checkpoint again, or after an edit on purpose seal it: rsd checkpoint seal"


@dataclass(frozen=True)
class Manifest(Checked):
    """sha256: path within the directory, with slashes -> SHA-256 of the file in hexadecimal."""

    sha256: dict[str, Sha256]


def file_sha256(path: Path) -> str:
    """SHA-256 in hexadecimal; `RsdError` if the file cannot be read. One that has not changed is read once a process:
    an evaluation asks ten times."""
    if path.exists() and not path.is_file():
        raise RsdError(f"{path}: expected a file, found a folder, a device or a pipe")
    try:
        found = path.stat()
        changed = max(found.st_mtime, found.st_ctime)
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        settled = 0 < changed < time.time() - SETTLED  # what is written within one tick of the clock has one stamp
        return _read_sha256(path.absolute(), stamp) if settled else _read_sha256.__wrapped__(path, stamp)
    except OSError as error:
        raise RsdError(f"{path}: not readable ({error.strerror or error})") from None


@functools.lru_cache(maxsize=1024)
def _read_sha256(path: Path, stamp: tuple[int, ...]) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoint_files(directory: Path) -> list[str]:
    """The files that a manifest is about: neither itself, nor hidden ones, nor those of the base."""
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix in SUFFIXES]  # a folder is refused later
    names = [path.relative_to(directory) for path in paths]
    ours = [n for n in names if n.parts[0] != BASE_LINK and not any(part.startswith(".") for part in n.parts)]
    return [name.as_posix() for name in ours if name.as_posix() != MANIFEST_FILE]


def read_manifest(directory: Path) -> Manifest | None:
    """None of an unsealed directory."""
    path = checked(Path, directory, "checkpoint directory") / MANIFEST_FILE
    if not path.exists():
        return None
    content = read_versioned(path, "manifest", FORMAT_VERSION, "use the rsd-vla that wrote it")
    return from_json(Manifest, content, str(path), ignore=("format_version",))


def verify(directory: Path, remedy: str = "") -> Manifest:
    """The manifest; `RsdError` if it is not there, or if a file is another than it says, is gone or came later.

    remedy: of what is no checkpoint, which could be sealed again."""
    remedy = remedy or f"{REMEDY} {directory}"
    manifest = read_manifest(directory)
    if manifest is None:
        raise RsdError(f"{directory / MANIFEST_FILE}: not found; {remedy}")
    found = checkpoint_files(directory)
    for name, expected in manifest.sha256.items():
        if name not in found:
            raise RsdError(f"{directory / name}: not found; the checkpoint is incomplete, copy it again")
        if file_sha256(directory / name) != expected:
            why = f"is not what {MANIFEST_FILE} names (sha256 differs)"
            raise RsdError(f"{directory / name}: {why}; {remedy}")
    if later := [name for name in found if name not in manifest.sha256]:
        raise RsdError(f"{directory / later[0]}: came later than {MANIFEST_FILE}, take it out; or {remedy}")
    return manifest


def verify_made(directory: Path, name: str, said: str, command: str) -> None:
    """`verify` of a directory with the file `name` that a command writes; said: what a message calls the directory."""
    if not (directory / name).is_file():
        found = "one without" if directory.is_dir() else "none"
        raise RsdError(f"{said}: expected a directory with {name} ({command}), found {found}")
    verify(directory, f"copy the directory again, or make it anew: {command}")


def seal(directory: Path, only: Iterable[str] | None = None) -> Manifest:
    """Write the manifest of the files as they are; only: of these alone, the others stay as the manifest has them."""
    if not checked(Path, directory, "checkpoint directory").is_dir():
        raise RsdError(f"{directory}: expected a checkpoint directory, found none")
    names = set(checkpoint_files(directory) if only is None else only)
    manifest = read_manifest(directory) if only is not None else None
    kept = {} if manifest is None else manifest.sha256
    sha256 = {name: file_sha256(directory / name) for name in names}
    sealed = Manifest(dict(sorted({**kept, **sha256}.items())))
    content = {"format_version": FORMAT_VERSION, "sha256": sealed.sha256}
    write_atomically(directory / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")
    return sealed
