"""Command lines from annotated functions and dataclasses (tyro), with errors of one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rsd import former
from rsd.types import RsdError, require_finite_numbers

Result = TypeVar("Result")
OUTPUTS = {"output": "", "out": "folder"}  # names of options, and what is written where none has a default


class UsageError(Exception):
    """A command line that cannot be run; its message says what is allowed."""


def parse(target: Callable[..., Result], arguments: Sequence[str], prog: str, writes: bool = True) -> Result:
    """Call `target` (a dataclass or a function) with the options in `arguments`.

    Raises UsageError for what tyro or the dataclass itself refuses, and with `writes` for an output that cannot be
    written; `--help` prints and exits.
    """
    if (found := former.refusal(arguments)) is not None:
        raise UsageError(found)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed = tyro.cli(target, args=list(arguments), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
        if is_dataclass(parsed):
            require_finite_numbers(parsed)
        if writes:
            check_outputs(parsed)
        return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    except RsdError as error:
        raise UsageError(str(error)) from error
    raise UsageError(one_line(messages.getvalue()))


def one_line(box: str) -> str:
    """tyro's message, drawn as a box (UTF-8) or as paragraphs under a title (ASCII) -> its sentence."""
    paragraphs: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip(" │")
        if not text.strip("─-╭╮╰╯"):
            paragraphs.append([])
        elif text[0] != "╭":
            paragraphs[-1].append(text)
    titled = not box.lstrip().startswith("╭")
    written = [" ".join(lines) for lines in paragraphs if lines][1 if titled else 0 :]
    if not written:
        return "the command line is not understood"
    near = re.search(r"Perhaps you meant:\s+(--\S+)", " ".join(written))
    return written[0] + (f"; did you mean {near[1]}?" if near else "")


def check_outputs(options: Any) -> None:
    """Raises UsageError where what the options name as output, at any depth, cannot be written: hours of work later it
    would be too late."""
    for entry in fields(options) if is_dataclass(options) else ():
        value = getattr(options, entry.name)
        if is_dataclass(value):
            check_outputs(value)
        elif entry.name in OUTPUTS and value and isinstance(value, str | Path):
            default = entry.default
            wanted = "file" if isinstance(default, Path) and default.suffix else "folder"
            if default is None:
                wanted = OUTPUTS[entry.name]
            check_output(f"--{entry.name} {value}", Path(value), wanted)


def check_output(option: str, path: Path, wanted: str) -> None:
    """wanted: "file", "folder", or "" for either."""
    standing = next(place for place in (path, *path.parents) if place.exists())
    found = "folder" if standing.is_dir() else "file" if standing.is_file() else "device"
    if standing != path and found != "folder":
        raise UsageError(f"{option}: expected a path in a folder, found that {standing} is a {found}; choose another")
    if standing == path and found != (wanted or found):
        raise UsageError(f"{option}: expected a {wanted}, or nothing yet, found a {found}; choose another path")
    if not os.access(standing, os.W_OK):
        raise UsageError(f"{option}: not permitted to write to {standing}; choose another path")


def check_choice(option: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of `allowed`; the message names them all and the nearest."""
    names = list(allowed)
    if value in names:
        return
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{option} '{value}': expected one of {', '.join(names)}{hint}")
