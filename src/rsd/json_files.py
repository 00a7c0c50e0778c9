"""Reading JSON files: found, whole, of the version this package writes, every value of the type it should have.

`read_object` reads a file, `from_json` makes a dataclass of its content; what is wrong is an `RsdError` of one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rsd.output import writing
from rsd.types import RsdError

T = TypeVar("T")
SHOWN = 60  # characters of an odd value in a message


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in `path`; kind: what a directory with this file is called, "a checkpoint directory"."""
    if path.is_dir():
        raise RsdError(f"{path}: expected a file, found a directory")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RsdError(f"{path}: not found; {kind} holds {path.name}") from None
    except UnicodeDecodeError as error:
        raise RsdError(f"{path}: not valid JSON ({error}); the file is cut off or was edited") from None
    except OSError as error:
        raise RsdError(f"{path}: not readable ({error.strerror or error})") from None
    return parse_object(text, str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; `RsdError` naming `where` for anything else, NaN and infinity included."""

    def refuse_constant(name: str) -> None:
        raise RsdError(f"{where}: holds {name}; every number of a file is finite")

    try:
        content = json.loads(text, parse_constant=refuse_constant)
    except ValueError as error:
        raise RsdError(f"{where}: not valid JSON ({error}); the file is cut off or was edited") from None
    except RecursionError:
        raise RsdError(f"{where}: not valid JSON (nested too deeply); the file was edited") from None
    if not isinstance(content, dict):
        raise RsdError(f"{where}: expected a JSON object, found {shown(content)}")
    return content


def read_versioned(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """The object in `path`, whose "format_version" is `version`; kind and remedy word the error of another one."""
    content = read_object(path, "a checkpoint directory")
    check_version(content, str(path), kind, version, remedy)
    return content


def check_version(content: dict[str, Any], where: str, kind: str, version: int, remedy: str) -> None:
    found = content.get("format_version")
    if type(found) is not int or found != version:  # true equals 1
        raise RsdError(f"{where}: expected {kind} format {version}, found {shown(found)}; {remedy}")


def write_atomically(path: Path, text: str) -> None:
    """Write through a temporary file, in a folder that is made if need be: a reader, or a kill, meets the old content
    or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def from_json(kind: type[T], content: Any, where: str, ignore: Iterable[str] = ()) -> T:
    """A dataclass, and the dataclasses in it, of a JSON object: known fields, none missing that has no default, every
    value of its annotated type.

    An integer passes for a float and a list for a tuple; true and false are no numbers; numbers are finite.
    where: begins the message of an `RsdError`, a file's name. ignore: keys of the object that are no fields.
    """
    return _object(kind, {name: content[name] for name in content.keys() - set(ignore)}, where, "")


def _object(kind: type[T], content: dict[str, Any], where: str, at: str) -> T:
    """at: the path to this object within the file, "" or "target."."""
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind) if entry.init}  # type: ignore[arg-type]
    required = {name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING}
    missing, unknown = sorted(required - content.keys()), sorted(content.keys() - known.keys())
    if missing or unknown:
        found = f"missing {shown(missing)}, unknown {shown(unknown)}"
        raise RsdError(f"{where}: unknown or missing field of {at.rstrip('.') or kind.__name__}: {found}")
    hints = get_type_hints(kind)
    values = {name: typed_value(hints[name], value, where, f"{at}{name}") for name, value in content.items()}
    try:
        return kind(**values)
    except RsdError as error:
        raise type(error)(f"{where}: {error}") from None


def typed_value(expected: Any, value: Any, where: str, at: str) -> Any:
    """The value at a path within the file as `expected`, an annotation, has it; `RsdError` if it is of another type."""
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = [part for part in arguments if part is not type(None)]
        for part in others:
            with contextlib.suppress(RsdError):
                return typed_value(part, value, where, at)
        return typed_value(last, value, where, at)
    if is_dataclass(expected) and isinstance(expected, type) and isinstance(value, dict):
        return _object(expected, value, where, f"{at}.")
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is list and isinstance(value, list):
        return [typed_value(arguments[0], item, where, at) for item in value]
    if origin is tuple and isinstance(value, list):
        parts = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(parts) == len(value):
            return tuple(typed_value(part, item, where, at) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: typed_value(arguments[1], item, where, at) for name, item in value.items()}
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return value
    elif type(value) is expected and (expected is not int or abs(value) < 1 << 63):
        return value
    raise RsdError(f"{where}: field {at}: expected {_words(expected)}, found {shown(value)}")


def _words(expected: Any) -> str:
    """An annotation in a message's words."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (list, tuple):
        inner = "values" if not arguments or get_origin(arguments[0]) else f"{_words(arguments[0])} values"
        return f"a list of {inner}"
    if origin is dict or is_dataclass(expected):
        return "an object"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part) for part in arguments)
    return str(getattr(expected, "__name__", expected))


def shown(value: Any) -> str:
    """A value for a message, on one line and not longer than that takes."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
