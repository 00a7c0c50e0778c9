"""Orthonormal transforms of an action chunk over time: an error keeps its size through the inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rsd.types import RsdError

TRANSFORMS = ("dct", "identity")


def transform_matrix(name: str, horizon: int) -> Tensor:
    """float32 [H, H], rows = basis vectors: coefficients = matrix @ chunk, chunk = matrix.T @ coefficients.

    `dct` is the orthonormal DCT-II (as in FAST, arXiv 2501.09747): row k holds frequency k.
    """
    if name == "identity":
        return torch.eye(horizon)
    if name == "dct":
        time = torch.arange(horizon, dtype=torch.float64) + 0.5
        frequency = torch.arange(horizon, dtype=torch.float64)[:, None]
        matrix = torch.cos(math.pi / horizon * frequency * time) * math.sqrt(2.0 / horizon)
        matrix[0] /= math.sqrt(2.0)
        return matrix.float()
    raise RsdError(f"transform {name!r}: expected one of {', '.join(TRANSFORMS)}")
