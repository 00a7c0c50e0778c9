"""Which levels of which coefficient carry a token, for a budget of bits: reverse water-filling over (level, scalar).

A coefficient that is always small needs no coarse levels, one that hardly matters no fine ones. Each gets a run of
levels first..last; the runs minimise the squared error on the calibration data for the bits they cost. The code stays
what it was: a prefix of levels decodes, and a level without a token for a scalar is its middle symbol.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError

Run = tuple[int, int] | None  # first and last level (1..L) that carry a token; None for no token at all
Option = tuple[Run, float]  # with the mean squared error it leaves


def allocate(coefficients: NDArray[np.float32], code: RfsqConfig, first_step: float, bits: float) -> list[Run]:
    """coefficients [N, P], at most `bits` nominal bits a chunk (tokens * log2 K) -> a run of levels per scalar."""
    cost = math.log2(code.symbols)
    if bits < cost:
        one = f"{cost:.2f}, one token of {code.symbols} symbols"
        raise RsdError(f"tokenizer bits: expected at least {one}; found {bits}")
    options = [_options(column, code, first_step) for column in coefficients.T]
    low, high = 1e-12, 1e6  # price of a token in squared error: the more it costs, the fewer are bought
    for _ in range(60):
        price = math.sqrt(low * high)
        tokens = sum(_length(_best(runs, price)[0]) for runs in options)
        low, high = (low, price) if tokens * cost <= bits else (price, high)
    return [_best(runs, high)[0] for runs in options]


def _options(scalar: NDArray[np.float32], code: RfsqConfig, first_step: float) -> list[Option]:
    """Every run of levels for one scalar [N] with its mean squared error."""
    found: list[Option] = [(None, float(np.mean(scalar**2)))]
    for first in range(1, code.levels + 1):
        residual = scalar.astype(np.float64)
        for last in range(first, code.levels + 1):
            step = first_step * code.weight(last)
            residual = residual - step * np.clip(np.round(residual / step), -code.half, code.half)
            found.append(((first, last), float(np.mean(residual**2))))
    return found


def _length(run: Run) -> int:
    return 0 if run is None else run[1] - run[0] + 1


def _best(options: list[Option], price: float) -> Option:
    return min(options, key=lambda option: option[1] + price * _length(option[0]))


def active_cells(runs: list[Run], levels: int) -> NDArray[np.float32]:
    """float32 [L, P], 1 where a (level, scalar) carries a token."""
    cells = np.zeros((levels, len(runs)), dtype=np.float32)
    for scalar, run in enumerate(runs):
        if run is not None:
            cells[run[0] - 1 : run[1], scalar] = 1.0
    return cells
