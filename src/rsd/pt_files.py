"""Reading .pt files: tensors and plain values; nothing is unpickled that could run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rsd.types import RsdError

LFS = b"version https://git-lfs"


def read_pt(path: Path) -> dict[Any, Any]:
    """The dictionary in a file of `torch.save`; `RsdError` for a file that is missing, empty, cut off or another."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise RsdError(f"{path}: not found: expected a file of torch.save, found {found}")
    if not path.stat().st_size:
        raise RsdError(f"{path}: not readable: expected a file of torch.save, found an empty one; copy it again")
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise RsdError(f"{path}: this is a git-lfs pointer, not the file; run `git lfs pull` in its repository")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: not a zip, unpickling refused, cut off
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        if "weights_only" in reason:  # torch's advice is to run whatever code the file holds
            reason = f"{type(error).__name__}: it holds more than tensors and plain values, or is cut off"
        raise RsdError(f"{path}: not readable without unpickling ({reason}); copy it again") from None
    if not isinstance(content, dict):
        raise RsdError(f"{path}: expected a state dict (names to tensors), found {type(content).__name__}")
    return content
