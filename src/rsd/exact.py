"""Numbers from outside: types whose values are taken as they are, shapes, and one line for the rest.

Integers of a narrow type wrap in arithmetic, true and false pass for 1 and 0, and an imaginary part is dropped with no
more than a warning: nothing of that may reach an action. numpy and torch are imported where they are used: without
them `rsd --help` takes half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rsd.checks import RsdError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
REALS = ("float64", "float32", "float16", "bfloat16")
Shape = Sequence[int | str | Any]  # a number, a name for any size, and `...` in front for any number of sizes


def check_shape(what: str, found: Sequence[int], expected: Shape) -> None:
    """`RsdError` unless the sizes are those: ("B", 8, 7), or (..., 7)."""
    wanted = [size for size in expected if size is not ...]
    rest = list(found)[max(0, len(found) - len(wanted)) :] if len(wanted) < len(expected) else list(found)
    if len(rest) != len(wanted) or any(isinstance(w, int) and w != n for w, n in zip(wanted, rest, strict=True)):
        words = ", ".join("..." if size is ... else str(size) for size in expected)
        raise RsdError(f"{what}: expected [{words}], found {list(found)}")


def real_array(what: str, values: Any, dtype: str = "float32", shape: Shape = (...,)) -> NDArray[Any]:
    """Finite numbers of an array or a sequence, float or integer, as `dtype`; `RsdError` for bool, complex, text."""
    import numpy as np

    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths; a tensor on another device
        raise RsdError(f"{what}: expected numbers, found {type(values).__name__} ({error})") from None
    if found.dtype.kind not in "iuf":
        raise RsdError(f"{what}: expected real numbers, found {found.dtype}")
    check_shape(what, found.shape, shape)
    with np.errstate(over="ignore"):
        cast = found.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        raise RsdError(f"{what}: expected finite numbers, found NaN, infinity, or one beyond {dtype}")
    return cast


def integers(what: str, values: Any, shape: Shape = (...,), within: tuple[int, int] | None = None) -> Tensor:
    """Tokens as int64, from a tensor or an array of any integer type; `RsdError` for floats, bool and the rest.

    within: the smallest and the largest one allowed; a GPU is waited for."""
    found = _tensor(what, values, INTEGERS, "integers").long()
    check_shape(what, found.shape, shape)
    if within is not None and found.numel() and _readable(found):
        low, high = int(found.min()), int(found.max())
        if low < within[0] or high > within[1]:
            raise RsdError(f"{what}: expected numbers from {within[0]} to {within[1]}, found {low}..{high}")
    return found


def reals(what: str, values: Any, shape: Shape = (...,), finite: bool = False) -> Tensor:
    """Floats or integers, from a tensor or an array, as a float32 tensor; `RsdError` for bool, complex and the rest.

    finite: refuse NaN and infinity; a GPU is waited for."""
    found = _tensor(what, values, (*REALS, *INTEGERS), "real numbers").float()
    check_shape(what, found.shape, shape)
    if finite and _readable(found) and not found.isfinite().all():
        raise RsdError(f"{what}: expected finite numbers, found NaN or infinity")
    return found


def _readable(found: Tensor) -> bool:
    """False while a CUDA graph is recorded, when nothing can be looked at."""
    import torch

    return not (found.is_cuda and torch.cuda.is_current_stream_capturing())


def _tensor(what: str, values: Any, allowed: Sequence[str], expected: str) -> Tensor:
    import numpy as np
    import torch

    found: Any = values
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        wide = np.int64 if values.dtype.kind in "iu" else np.float64  # types and byte orders that torch lacks
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=wide))
        if values.dtype == np.uint64 and (found < 0).any():
            raise RsdError(f"{what}: expected {expected}, found uint64 beyond int64")
    if not isinstance(found, torch.Tensor) or str(found.dtype).removeprefix("torch.") not in allowed:
        kind = getattr(values, "dtype", type(values).__name__)
        raise RsdError(f"{what}: expected a tensor or an array of {expected}, found {kind}")
    return found
