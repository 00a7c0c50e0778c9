"""Tensors from outside: types whose values are taken as they are, shapes, and one line for the rest.

Integers of a narrow type wrap in arithmetic, true and false pass for 1 and 0, and an imaginary part is dropped with no
more than a warning: nothing of that may reach an action. Arrays of NumPy: `checks.real_array`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsd.checks import RsdError, Shape, check_shape

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REALS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def integers(
    what: str, values: Any, shape: Shape | None = None, within: tuple[int, int] | None = None, wait: bool = True
) -> Tensor:
    """Tokens as int64, from a tensor or an array of any integer type; `RsdError` for floats, bool and the rest.

    within: the smallest and the largest one allowed; wait: for a GPU, which otherwise is not looked at."""
    found = _tensor(what, values, INTEGERS, "integers", shape).long()
    if within is not None and found.numel() and _readable(found, wait):
        low, high = int(found.min()), int(found.max())
        if low < within[0] or high > within[1]:
            raise RsdError(f"{what}: expected numbers from {within[0]} to {within[1]}, found {low}..{high}")
    return found


def reals(what: str, values: Any, shape: Shape | None = None, finite: bool = False, wait: bool = True) -> Tensor:
    """Floats or integers, from a tensor or an array, as a float32 tensor; `RsdError` for bool, complex and the rest.

    finite: refuse NaN and infinity; wait: for a GPU, which otherwise is not looked at."""
    found = _tensor(what, values, REALS + INTEGERS, "real numbers", shape).float()
    if finite and _readable(found, wait) and not found.isfinite().all():
        raise RsdError(f"{what}: expected finite numbers, found NaN or infinity")
    return found


def _readable(found: Tensor, wait: bool) -> bool:
    """False while a CUDA graph is recorded or a program compiled or exported, when nothing can be looked at."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not (wait or found.is_cpu):
        return False
    return not (found.is_cuda and torch.cuda.is_current_stream_capturing())


def _tensor(what: str, values: Any, allowed: tuple[torch.dtype, ...], expected: str, shape: Shape | None) -> Tensor:
    found: Any = values
    if isinstance(values, np.ma.MaskedArray):
        raise RsdError(f"{what}: expected {expected}, found a masked array")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        wide = np.int64 if values.dtype.kind in "iu" else np.float64  # types and byte orders that torch lacks
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=wide))
        if values.dtype == np.uint64 and (found < 0).any():
            raise RsdError(f"{what}: expected {expected}, found uint64 beyond int64")
    dense = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta
    if not dense or found.dtype not in allowed:
        odd = f"{found.layout} on {found.device}" if isinstance(found, Tensor) and not dense else ""
        kind = odd or getattr(values, "dtype", type(values).__name__)
        raise RsdError(f"{what}: expected a tensor or an array of {expected}, found {kind}")
    if shape is not None:
        check_shape(what, found.shape, shape)
    return found
