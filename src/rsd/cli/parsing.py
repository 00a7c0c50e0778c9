"""Command lines from annotated functions and dataclasses (tyro), with errors of one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from rsd import former
from rsd.checks import At, RsdError, check, checked_later, listed, shown

Result = TypeVar("Result")
REGISTRY = ConstructorRegistry()
UNKNOWN = "Unrecognized options: "  # how tyro's sentence begins
NARROWEST = 20  # columns; in fewer, tyro's help never ends
OUTPUTS = {"output": "", "out": "folder"}  # names of options, and what is written where none has a default


class UsageError(Exception):
    """A command line that cannot be run; its message says what is allowed."""


@REGISTRY.primitive_rule
def plain_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers as people write them; Python's own `int` takes 1_0 and digits of every alphabet, too."""
    kind = info.type
    if kind not in (int, float):
        return None

    def number(texts: list[str]) -> Any:
        pattern, words = (r"[+-]?[0-9]{1,100}", "an integer") if kind is int else (r"[-+.a-zA-Z0-9]+", "a number")
        with contextlib.suppress(ValueError):
            if re.fullmatch(pattern, texts[0]):
                return kind(texts[0])
        raise ValueError(f"expected {words}, found {shown(texts[0])}")

    return PrimitiveConstructorSpec(1, kind.__name__.upper(), number, lambda x: type(x) is kind, lambda x: [str(x)])


@REGISTRY.primitive_rule
def list_of_integers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """As `rsd eval --tasks` takes them, with commas and ranges, and as the shell separates them."""
    kinds = get_args(info.type)
    if info.type_origin is not tuple or kinds[1:] != (...,) or (get_args(kinds[0]) or kinds)[0] is not int:
        return None

    def integers(texts: list[str]) -> tuple[int, ...]:
        try:
            return tuple(listed(",".join(text.removesuffix(",") for text in texts))) if texts else ()
        except RsdError as error:
            raise ValueError(str(error)) from None

    form = "[INT|INT-INT ...]"
    return PrimitiveConstructorSpec("*", form, integers, lambda x: isinstance(x, tuple), lambda x: list(map(str, x)))


def parse(target: Callable[..., Result], arguments: Sequence[str], prog: str, writes: bool = True) -> Result:
    """The dataclass `target` of the options in `arguments`.

    Raises UsageError for what tyro or the dataclass itself refuses, and with `writes` for an output that cannot be
    written; `--help` prints and exits.
    """
    if (found := former.refusal(arguments)) is not None:
        raise UsageError(found)
    refuse_twice(arguments)
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    messages, config = io.StringIO(), (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(messages), checked_later():
            parsed = tyro.cli(target, args=list(arguments), prog=prog, config=config, registry=REGISTRY)
        check(parsed, named)
        if writes:
            check_outputs(parsed)
        return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    except RsdError as error:
        raise UsageError(str(error)) from error
    said = one_line(messages.getvalue())
    raise UsageError(stray(said.removeprefix(UNKNOWN), target, prog) if said.startswith(UNKNOWN) else said)


def stray(found: str, target: Any, prog: str) -> str:
    """The message about what is no option of `target`, such as a path without one."""
    if found.startswith("-"):
        return UNKNOWN + found
    first = fields(target)[0]
    such = f" such as --{first.name}" if first.type in ("str", "Path") else ""
    return f"expected values behind options{such}, lists with commas, found {found}; {prog} --help lists the options"


def named(at: At) -> str:
    """A field as its option."""
    return "--" + ".".join(part for part in at if not part.startswith("[")).replace("_", "-") if at else ""


def refuse_twice(arguments: Sequence[str]) -> None:
    """Raises UsageError for an option given twice, of which the first would go without a word, or an empty output."""
    names = [text.partition("=")[0].replace("_", "-") for text in arguments if re.match("--[a-z]", text)]
    if empty := [a for a, b in itertools.pairwise(arguments) if a in ("--output", "--out") and not b.strip()]:
        raise UsageError(f"{empty[0]}: expected a path, found an empty one")
    if again := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{again}: expected once, found {names.count(again)} times")


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
    said = written[0].removeprefix("Error parsing ")
    said = said.replace("Could not find valid parse for arguments:", "expected other values, found")
    said = re.sub(r"no type matching (\S+) could be instantiated from (.*?)\.?$", r"expected \1, found \2", said)
    return f"{said:.500}" + (f"; did you mean {near[1]}?" if near else "")


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
    if re.match("[a-z]+:/", str(path)):
        raise UsageError(f"{option}: expected a path, found an address; choose a folder here")
    standing = next(place for place in (path, *path.parents) if place.exists())
    found = "folder" if standing.is_dir() else "file" if standing.is_file() else "device"
    if standing != path and found != "folder":
        raise UsageError(f"{option}: expected a path in a folder, found that {standing} is a {found}; choose another")
    if standing == path and found != (wanted or found):
        raise UsageError(f"{option}: expected a {wanted}, or nothing yet, found a {found}; choose another path")
    files = "manifest.json", "model.safetensors"
    if inside := next((p for p in (path, *path.parents) if all((p / name).is_file() for name in files)), None):
        raise UsageError(f"{option}: expected a place outside of checkpoints, found {inside} to be one; choose another")
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
