"""Numbers from outside: types whose values are taken as they are, and one line for the rest.

Integers of a narrow type wrap in arithmetic, true and false pass for 1 and 0, and an imaginary part is dropped with no
more than a warning: nothing of that may reach an action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsd.types import RsdError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REALS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def integers(what: str, values: Any) -> Tensor:
    """Tokens as int64, from a tensor or an array of any integer type; `RsdError` for floats, bool and the rest."""
    return _tensor(what, values, INTEGERS, "integers").long()


def reals(what: str, values: Any) -> Tensor:
    """Floats or integers, from a tensor or an array, as a float32 tensor; `RsdError` for bool, complex and the rest."""
    return _tensor(what, values, REALS + INTEGERS, "real numbers").float()


def _tensor(what: str, values: Any, allowed: tuple[torch.dtype, ...], expected: str) -> Tensor:
    found: Any = values
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        wide = np.int64 if values.dtype.kind in "iu" else np.float64  # types and byte orders that torch lacks
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=wide))
        if values.dtype == np.uint64 and (found < 0).any():
            raise RsdError(f"{what}: expected {expected}, found uint64 beyond int64")
    if not isinstance(found, Tensor) or found.dtype not in allowed:
        kind = getattr(values, "dtype", type(values).__name__)
        raise RsdError(f"{what}: expected a tensor or an array of {expected}, found {kind}")
    return found
