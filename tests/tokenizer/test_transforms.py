import numpy as np
import pytest
import torch
from scipy.fft import dct

from rsd.tokenizer.transforms import TRANSFORMS, transform_matrix
from rsd.types import RsdError


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("horizon", [1, 5, 8, 16])
def test_orthonormal(name: str, horizon: int) -> None:
    matrix = transform_matrix(name, horizon)
    assert torch.allclose(matrix @ matrix.T, torch.eye(horizon), atol=1e-6)


def test_dct_is_scipys() -> None:
    signal = np.random.default_rng(0).normal(size=(8, 3))
    expected = dct(signal, type=2, norm="ortho", axis=0)
    assert np.allclose(transform_matrix("dct", 8).numpy() @ signal, expected, atol=1e-6)


def test_unknown_transform_is_refused() -> None:
    with pytest.raises(RsdError, match="expected one of dct, identity"):
        transform_matrix("wavelet", 8)
