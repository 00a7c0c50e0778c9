"""Reading and writing JSON files: found, whole, and of the version this package writes. What is in them is checked by
`checks.from_json`; what is wrong is an `RsdError` of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rsd.checks import RsdError, checked, shown
from rsd.checks import from_json as from_json
from rsd.output import replacing


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in `path`; kind: what a directory with this file is called, "a checkpoint directory"."""
    path = checked(Path, path, "a file's name")
    if path.exists() and not path.is_file():
        raise RsdError(f"{path}: expected a file, found a {'directory' if path.is_dir() else 'device or a pipe'}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RsdError(f"{path}: not found; {kind} holds {path.name}") from None
    except UnicodeDecodeError as error:
        raise RsdError(f"{path}: not valid JSON ({error}); the file is cut off or was edited") from None
    except OSError as error:
        raise RsdError(f"{path}: not readable ({error.strerror or error})") from None
    return parse_object(text, str(path))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
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
    """See `output.replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def section(record: Any, *names: str) -> dict[str, Any]:
    """A part of a free-form record by its path; empty where there is none."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}
