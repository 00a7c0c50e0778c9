import itertools

import numpy as np
import pytest

from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import RsdError
from studies.tokenizers.allocation import active_cells, allocate

CODE = RfsqConfig(3, 3, 3.0)


def left(scalar: np.ndarray, run: tuple[int, int] | None) -> float:
    residual = scalar.copy()
    for level in range(run[0], run[1] + 1) if run else ():
        step = CODE.weight(level)
        residual -= step * np.clip(np.round(residual / step), -1, 1)
    return float(np.mean(residual**2))


def test_no_other_allocation_of_as_many_tokens_leaves_less_error() -> None:
    rng = np.random.default_rng(0)
    coefficients = (rng.normal(size=(500, 3)) * [0.7, 0.2, 0.02]).astype(np.float32)
    runs = [None, *((first, last) for first in (1, 2, 3) for last in range(first, 4))]
    for bits in (1.6, 3.2, 6.4, 9.6):
        chosen = allocate(coefficients, CODE, 1.0, bits)
        count = int(active_cells(chosen, 3).sum())
        assert 0 < count * np.log2(3) <= bits
        error = sum(left(coefficients[:, i].astype(float), run) for i, run in enumerate(chosen))
        for others in itertools.product(runs, repeat=3):
            if int(active_cells(list(others), 3).sum()) <= count:
                assert error <= sum(left(coefficients[:, i].astype(float), run) for i, run in enumerate(others)) + 1e-9


def test_small_scalars_start_at_finer_levels() -> None:
    rng = np.random.default_rng(0)
    coefficients = (rng.uniform(-1, 1, size=(500, 2)) * [1.4, 0.15]).astype(np.float32)
    cells = active_cells(allocate(coefficients, CODE, 1.0, 8.0), 3)
    assert cells[:, 0].tolist() == [1, 1, 1]
    assert cells[:, 1].tolist() == [0, 0, 1]


def test_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(RsdError, match=r"at least 1\.58, one token of 3 symbols; found 1\.0"):
        allocate(np.ones((5, 2), np.float32), CODE, 1.0, 1.0)
