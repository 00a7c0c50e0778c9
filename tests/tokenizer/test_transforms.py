from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.fft import dct

from rsd.tokenizer.config import OVER_TIME
from rsd.tokenizer.transforms import ordered_product, principal_components, transform_matrix
from rsd.types import RsdError


@pytest.mark.parametrize("name", OVER_TIME)
@pytest.mark.parametrize("horizon", [1, 5, 8, 16, 64])
def test_orthonormal(name: str, horizon: int) -> None:
    matrix = transform_matrix(name, horizon)
    assert torch.allclose(matrix @ matrix.T, torch.eye(horizon), atol=1e-6)


def test_dct_is_scipys() -> None:
    signal = np.random.default_rng(0).normal(size=(8, 3))
    expected = dct(signal, type=2, norm="ortho", axis=0)
    assert np.allclose(transform_matrix("dct", 8).numpy() @ signal, expected, atol=1e-6)


def test_principal_components_are_orthonormal_and_hold_the_most_first() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, 12)) * np.linspace(3, 0.1, 12) @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    matrix = principal_components(torch.tensor(mixed, dtype=torch.float32).unflatten(1, (4, 3)))
    assert torch.allclose(matrix @ matrix.T, torch.eye(12), atol=1e-6)
    power = (mixed @ matrix.numpy().T).var(0)
    assert (np.diff(power) < 0).all()
    assert power[0] == pytest.approx(9, rel=0.2)


@settings(max_examples=50)
@given(
    data=st.data(),
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 2, 3, 7, 8, 63, 64, 65, 130]),
    batch=st.integers(1, 3),
)
def test_ordered_product_is_the_product_and_the_same_in_every_batch(
    data: Any, rows: int, columns: int, batch: int
) -> None:
    numbers = st.floats(-10, 10, width=32)
    seed = data.draw(st.integers(0, 1000))
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = torch.from_numpy(data.draw(hnp.arrays(np.float32, (batch, columns, 2), elements=numbers, fill=numbers)))
    product = ordered_product(matrix, grid)
    expected = torch.einsum("rc,bcm->brm", matrix.double(), grid.double())
    assert torch.allclose(product.double(), expected, atol=1e-3)
    for index in range(batch):
        assert torch.equal(ordered_product(matrix, grid[index : index + 1])[0], product[index])


def test_ordered_product_is_not_rounded_by_autocast() -> None:
    matrix, grid = torch.randn(8, 8), torch.randn(4, 8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ordered_product(matrix, grid), ordered_product(matrix, grid.clone()))
        inside = ordered_product(matrix, grid)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, ordered_product(matrix, grid))


def test_unknown_transform_is_refused() -> None:
    with pytest.raises(RsdError, match="expected one of dct, identity"):
        transform_matrix("wavelet", 8)
