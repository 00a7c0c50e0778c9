"""Reading JSON files: found, whole, and of the version this package writes, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rsd.types import RsdError


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
        raise RsdError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def read_versioned(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """The object in `path`, whose "format_version" is `version`; kind and remedy word the error of another one."""
    content = read_object(path, "a checkpoint directory")
    found = content.get("format_version")
    if found != version:
        raise RsdError(f"{path}: expected {kind} format {version}, found {found}; {remedy}")
    return content
