"""Reading the JSON files of a checkpoint: found, whole, and of the version this package writes, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rsd.types import RsdError


def read_versioned(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """The object in `path`, whose "format_version" is `version`; kind and remedy word the error of another one."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise RsdError(f"{path}: not found; a checkpoint directory holds {path.name}") from None
    except ValueError as error:  # cut off, or not text at all
        raise RsdError(f"{path}: not valid JSON ({error}); the file is cut off or was edited") from None
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != version:
        raise RsdError(f"{path}: expected {kind} format {version}, found {found}; {remedy}")
    return dict(content)
