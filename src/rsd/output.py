"""What every command owes whoever waits for its output: a line for a disk that fails, nothing replaced, progress."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rsd.checks import RsdError, one_line, told

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
Made = TypeVar("Made")
SHOW_EVERY = 2.0  # seconds
LITTLE = 1 << 20  # bytes left on a disk that is full
AGAIN = "then run the command again (without --overwrite, if it had that)"
KEPT = "what was written before is kept"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"{KEPT}; make room, {AGAIN}"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "something else is in its place: choose another one"),
    errno.ENOENT: f"its folder is not there, or not any more: put it back, {AGAIN}",
}

# What helps where the operating system refuses; it names the file or address itself.
OF_THE_SYSTEM = {
    errno.ENOSPC: "make room and run the same command again",
    errno.EACCES: "choose another path, or ask for the permission",
    errno.EROFS: "choose another folder",
    errno.EEXIST: "expected a folder there, or nothing; choose another path",
    errno.ENOTDIR: "expected a folder there; choose another path",
    errno.EISDIR: "expected a file there, not a folder",
    errno.ENOENT: "check the path",
}


def plural(count: int, noun: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def terminal(stderr: bool = False, highlight: bool = True, soft_wrap: bool = False) -> Console:
    """Where a command prints; names of others stay as they are: no `:key:` in a path becomes a picture."""
    # start-up time: a policy is loaded without it
    from rich.console import Console

    return Console(emoji=False, stderr=stderr, highlight=highlight, soft_wrap=soft_wrap)


def warn_in_one_line() -> None:
    """Python's own warnings hold a place in the source and a line of it; from now on what they say alone."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(str(message))}\n"


def reason(error: BaseException) -> str:
    """What an error says; of one that is not the package's own, which names nothing to do, what helps."""
    if isinstance(error, RsdError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has closed it (broken pipe)"
    if isinstance(error, OSError) and error.strerror:
        parts = [error.strerror, OF_THE_SYSTEM.get(error.errno or 0)]
        return (f"{error.filename}: " if error.filename is not None else "") + "; ".join(filter(None, parts))
    return f"{type(error).__name__}: {told(error)}; RSD_DEBUG=1 shows where"


@contextlib.contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Whatever fails inside, which only writes `path`, becomes an RsdError of one line.

    RuntimeError is how torch and HDF5 report a full disk; also: further exceptions of the kind.
    """
    caught: tuple[type[Exception], ...] = (OSError, RuntimeError, *also)
    try:
        yield
    except caught as error:
        inside = re.search(r"errno = (\d+)|os error (\d+)", str(error))  # HDF5's and safetensors' way to tell it
        number = int(inside[1] or inside[2]) if inside else getattr(error, "errno", None)
        standing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if number is None and shutil.disk_usage(standing).free < LITTLE:  # torch says "unexpected pos"
            number = errno.ENOSPC
        reason = os.strerror(number) if number else str(error).split("\n")[0][:200]
        if number is None and "inline_container" in reason:  # torch's writer, which does not say why
            reason = "not all of it was taken: a full disk, a quota, or a limit to a file's size"
        remedy = REMEDIES.get(number or 0, f"{KEPT}; choose another folder, or let this one be written to")
        raise RsdError(f"{path}: cannot be written ({reason}); {remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what then takes the place of `path`, in a folder that is made if need be: a reader, or a kill,
    meets the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # as of a disk that is full
                temporary.unlink(missing_ok=True)


def refuse_to_replace(path: Path, overwrite: bool, mark: bytes = b"") -> None:
    """Raises RsdError where `path` is there, unless it is a file that may be overwritten: call it before any work.

    mark: what an earlier file of the same kind holds, which may always be overwritten."""
    if path.is_dir():
        raise RsdError(f"{path}: expected a file, or nothing yet, found a folder; choose another --output")
    same_kind = mark and path.is_file() and mark in path.read_bytes()
    if path.exists() and not overwrite and not same_kind:
        raise RsdError(f"{path}: exists already; choose another --output, or --overwrite to replace it")


class Unfinished(RsdError):
    """Some of the work could not be done; the rest is there."""


class Faults:
    """Pieces of a long job that could not be done: each costs itself only, but a fault that lasts (a server that is
    gone) ends the job."""

    def __init__(self, kept: str, most_equal: float = math.inf) -> None:
        """kept: what an error says of the work done before, and of how to go on. most_equal: so many different pieces
        in a row that fail in the same way are a fault that lasts."""
        self._kept, self._most_equal = kept, most_equal
        self._seen: dict[object, str] = {}
        self._alike, self._row = "", set[object]()

    def worked(self) -> None:
        """A piece was done."""
        self._row.clear()

    def failed(self, piece: object, fault: str) -> None:
        """`piece` could not be done; raises RsdError where the fault lasts."""
        self._seen[piece] = fault
        alike = re.sub(r"\d+", "#", fault)  # ports, process ids, addresses
        if alike != self._alike:
            self._alike, self._row = alike, set()
        self._row.add(piece)
        if len(self._row) >= self._most_equal:
            raise RsdError(f"{fault} ({len(self._row)} times in a row, so the run stops here); {self._kept}")

    def raise_any(self, what: str, done: int) -> None:
        """Once everything is tried: raises Unfinished if something could not be done, RsdError where nothing was. what:
        such as "of 50 episodes"; done: how many are there."""
        if self._seen:
            piece, fault = next(iter(self._seen.items()))
            kind = Unfinished if done else RsdError
            raise kind(f"{len(self._seen)} {what} failed, the first of them {piece} ({fault}); {self._kept}")


def attempt(
    pieces: Iterable[Item], make: Callable[[Item], Made], keep: Callable[[Item, Made], object]
) -> tuple[int, list[tuple[Item, str]]]:
    """Makes and keeps each piece -> how many, and the others with their errors: what cannot be made costs itself only,
    what cannot be kept is an error."""
    done, failed = 0, []
    for piece in pieces:
        try:
            made = make(piece)
        except RsdError as error:
            failed.append((piece, str(error)))
            continue
        keep(piece, made)
        done += 1
    return done, failed


def shown(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a line on stderr about how many there were whenever SHOW_EVERY seconds have passed."""
    start = said = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - said > SHOW_EVERY:
            print(f"{what}: {count}{f' of {total}' if total else ''}, {now - start:.0f} s", file=sys.stderr)
            said = now
        yield item
