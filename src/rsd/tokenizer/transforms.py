"""Orthonormal transforms of an action chunk: an error keeps its size through the inverse."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rsd.tokenizer.config import OVER_TIME
from rsd.types import RsdError

BLOCK = 64  # products summed as one tree: bounds the memory of long chunks


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
    raise RsdError(f"transform {name!r}: expected one of {', '.join(OVER_TIME)}")


def principal_components(normalised: Tensor) -> Tensor:
    """Normalised chunks [N, H, M] -> float32 [P, P], P = H*M: rows of falling second moment, orthonormal.

    About zero, which is the middle of the range, not about the mean: the code has no offset.
    """
    flat = normalised.flatten(1).double().numpy()
    vectors = np.linalg.eigh(flat.T @ flat / len(flat))[1]
    # the sign of an eigenvector is arbitrary: fix it, so that a fit can be repeated
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), np.arange(len(vectors))] < 0, -1.0, 1.0)
    return torch.tensor(vectors[:, ::-1].T.copy(), dtype=torch.float32)


def ordered_product(matrix: Tensor, grid: Tensor) -> Tensor:
    """matrix [R, C] times grid [B, C, M] -> float32 [B, R, M], bit by bit the same on every device and in every batch.

    Products and sums of single numbers in a fixed order: a matrix product's order depends on the device and the
    batch, and autocast would round it to bf16.
    """
    grid, total = grid.float(), None
    for start in range(0, matrix.shape[1], BLOCK):
        terms = matrix[:, start : start + BLOCK, None] * grid[:, None, start : start + BLOCK]  # [B, R, C, M]
        while (count := terms.shape[2]) > 1:
            half = count // 2
            halves = terms[:, :, :half] + terms[:, :, half : 2 * half]
            terms = torch.cat([halves, terms[:, :, 2 * half :]], dim=2) if count % 2 else halves
        total = terms[:, :, 0] if total is None else total + terms[:, :, 0]
    assert total is not None
    return total
