"""Reading .pt files, writing .safetensors: tensors and plain values; nothing is unpickled that could run code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsd.types import RsdError

scalar = np.float64(0).__reduce__()[0]  # NumPy's own way to make a number; its module is private

LFS = b"version https://git-lfs"
NUMBERS = (np.float64, np.float32, np.int64, np.int32, np.bool_)
# What a pickled NumPy number is made of, under NumPy 1's name for it, too: a loss or an accuracy beside the weights.
NUMPY_NUMBERS: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in NUMBERS)]
NUMPY_NUMBERS += [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]


def read_pt(path: Path) -> dict[Any, Any]:
    """The dictionary in a file of `torch.save`; `RsdError` for a file that is missing, empty, cut off or another."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise RsdError(f"{path}: not found: expected a file of torch.save, found {found}")
    if not path.stat().st_size:
        raise RsdError(f"{path}: not readable: expected a file of torch.save, found an empty one; copy it again")
    refuse_pointer(path)
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: not a zip, unpickling refused, cut off
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        if "weights_only" in str(error):  # torch's advice is to run whatever code the file holds
            reason = f"{type(error).__name__}: it holds more than tensors and plain values, or is cut off"
        raise RsdError(f"{path}: not readable without unpickling ({reason}); copy it again") from None
    if not isinstance(content, dict):
        raise RsdError(f"{path}: expected a state dict (names to tensors), found {type(content).__name__}")
    return content


def refuse_pointer(path: Path) -> None:
    """`RsdError` for what `git clone` leaves in the place of a large file where git-lfs is missing."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise RsdError(f"{path}: this is a git-lfs pointer, not the file; run `git lfs pull` in its repository")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file with the permissions of every other file; the library would keep it to its owner."""
    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
