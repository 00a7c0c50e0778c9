"""Codes of a chunk's motion behind one interface, so that the benchmark treats them alike: ours and the simple ones.

All work on motion normalised by the training data's 1 % and 99 % quantiles to [-1, 1], float32 [N, H, M]. The gripper
is left out of every code: it is H bits for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline

from rsd.tokenizer.action_tokenizer import ActionTokenizer, ChunkTokens
from studies.tokenizers.entropy import Ints

Motion = NDArray[np.float32]
VALUE_GRID = 64  # per last step: tells different values of a code apart, whatever its rho, and not rounding errors


class Codec(Protocol):
    """A fitted code. `levels` is how many prefixes of a code decode (1 where only the whole does)."""

    levels: int
    alphabet: int  # symbols of a token

    def encode(self, motion: Motion) -> Any: ...

    def decode(self, codes: Any, levels: int) -> Motion: ...

    def tokens(self, codes: Any, levels: int) -> Any:
        """int [N, T], or a list of N sequences where their length varies."""
        ...

    def symbols(self, codes: Any, levels: int) -> Any:
        """What an entropy coder codes as one symbol: the tokens, or a scalar's digits taken together."""
        ...


@dataclass(frozen=True)
class Scale:
    """centre, half_width [M] of the 1 % .. 99 % range of every motion dimension, in action units."""

    centre: NDArray[np.float32]
    half_width: NDArray[np.float32]

    @classmethod
    def of(cls, motion: Motion) -> Scale:
        low, high = np.quantile(motion.reshape(-1, motion.shape[2]), [0.01, 0.99], axis=0).astype(np.float32)
        return cls((low + high) / 2, np.maximum((high - low) / 2, 1e-6))

    def normalise(self, motion: Motion) -> Motion:
        return (motion - self.centre) / self.half_width

    def denormalise(self, normalised: Motion) -> Motion:
        return normalised * self.half_width + self.centre


class ResidualCode:
    """Our tokenizer. Symbols: what a scalar's digits decode to.

    Several digit sequences may decode to one value: they are one symbol, since sending any of them will do.
    """

    def __init__(self, tokenizer: ActionTokenizer, scale: Scale) -> None:
        self.tokenizer, self.scale = tokenizer, scale
        self.levels, self.alphabet = tokenizer.config.levels, tokenizer.config.symbols
        active = getattr(tokenizer, "active", None)  # of one with a budget of bits
        shape = (self.levels, tokenizer.scalars)
        self.active = np.ones(shape, bool) if active is None else active.numpy() > 0

    def encode(self, motion: Motion) -> ChunkTokens:
        chunk = self.scale.denormalise(motion)
        gripper = np.ones((*chunk.shape[:2], self.tokenizer.action_dim - chunk.shape[2]), np.float32)
        return self.tokenizer.encode(torch.from_numpy(np.concatenate([chunk, gripper], axis=2)))

    def decode(self, codes: ChunkTokens, levels: int) -> Motion:
        actions = self.tokenizer.decode(codes, levels).numpy()
        return self.scale.normalise(actions[..., : len(self.scale.centre)])

    def tokens(self, codes: ChunkTokens, levels: int) -> Ints:
        return codes.motion[:, :levels].numpy()[:, self.active[:levels]]

    def symbols(self, codes: ChunkTokens, levels: int) -> Ints:
        rfsq = self.tokenizer.rfsq
        value = rfsq.dequantise(codes.motion[:, :levels]).numpy().astype(np.float64)
        return np.round(value / rfsq.step(levels) * VALUE_GRID).astype(np.int64)

    def digit_sequences(self, codes: ChunkTokens, levels: int) -> Ints:
        """A scalar's digits as one number: more symbols than values where the code is redundant."""
        places = self.alphabet ** np.arange(levels)[:, None]
        return (codes.motion[:, :levels].numpy() * places).sum(1)


class Bins:
    """One token per scalar, uniform bins between two limits, clipped outside (256 of them: OpenVLA, arXiv 2406.09246).

    limits: [M] in normalised units; 1 is OpenVLA's own choice, the 1 % and 99 % quantiles.
    """

    levels = 1

    def __init__(self, alphabet: int, limits: NDArray[np.float32], horizon: int) -> None:
        self.alphabet, self.limits, self.horizon = alphabet, limits, horizon

    def encode(self, motion: Motion) -> Ints:
        share = (motion / self.limits + 1) / 2
        return np.clip(np.floor(share * self.alphabet), 0, self.alphabet - 1).astype(np.int64).reshape(len(motion), -1)

    def decode(self, codes: Ints, levels: int) -> Motion:
        share = (codes.reshape(len(codes), self.horizon, -1) + 0.5) / self.alphabet
        return ((2 * share - 1) * self.limits).astype(np.float32)

    def tokens(self, codes: Ints, levels: int) -> Ints:
        return codes

    symbols = tokens


class Splines:
    """Least-squares B-spline per dimension, its control points in uniform bins (as BEAST, arXiv 2506.06072)."""

    levels = 1

    def __init__(self, train: Motion, control_points: int, alphabet: int) -> None:
        horizon = train.shape[1]
        degree = min(3, control_points - 1)
        inner = np.linspace(0.0, 1.0, control_points - degree + 1)
        knots = np.r_[[0.0] * degree, inner, [1.0] * degree]
        self.basis = BSpline.design_matrix(np.linspace(0.0, 1.0, horizon), knots, degree).toarray()  # [H, C]
        self.inverse = np.linalg.pinv(self.basis)
        self.bins = Bins(alphabet, np.abs(self._fit(train)).max((0, 1)).astype(np.float32) + 1e-6, control_points)
        self.alphabet = alphabet

    def _fit(self, motion: Motion) -> Motion:
        return np.einsum("ch,nhm->ncm", self.inverse, motion).astype(np.float32)

    def encode(self, motion: Motion) -> Ints:
        return self.bins.encode(self._fit(motion))

    def decode(self, codes: Ints, levels: int) -> Motion:
        return np.einsum("hc,ncm->nhm", self.basis, self.bins.decode(codes, 1)).astype(np.float32)

    def tokens(self, codes: Ints, levels: int) -> Ints:
        return codes

    symbols = tokens


class LayerNormRfsq:
    """Residual FSQ with a LayerNorm per sample and level before quantising, as the public "robust" code has it.

    The statistics that undo the LayerNorm belong to the sample and are not in the tokens. `forward` uses them, and
    looks excellent; `decode`, which has the tokens alone, can only put the training data's mean statistics there.
    """

    def __init__(self, train: Motion, levels: int, alphabet: int) -> None:
        self.levels, self.alphabet, self.horizon = levels, alphabet, train.shape[1]
        self.values = np.linspace(-1.0, 1.0, alphabet)
        _, _, statistics = self._quantise(train)
        self.mean_statistics = statistics.mean(0)  # [L, 2]

    def _quantise(self, motion: Motion) -> tuple[Ints, Motion, NDArray[np.float64]]:
        residual = motion.reshape(len(motion), -1).astype(np.float64)
        total, tokens, statistics = np.zeros_like(residual), [], []
        for _ in range(self.levels):
            mean, std = residual.mean(1, keepdims=True), residual.std(1, keepdims=True) + 1e-5
            token = np.abs(((residual - mean) / std)[..., None] - self.values).argmin(-1)
            value = self.values[token] * std + mean
            residual, total = residual - value, total + value
            tokens.append(token)
            statistics.append(np.concatenate([mean, std], axis=1))
        return np.stack(tokens, 1), total.reshape(motion.shape).astype(np.float32), np.stack(statistics, 1)

    def forward(self, motion: Motion) -> Motion:
        return self._quantise(motion)[1]

    def encode(self, motion: Motion) -> Ints:
        return self._quantise(motion)[0]

    def decode(self, codes: Ints, levels: int) -> Motion:
        mean, std = self.mean_statistics[:levels].T[:, None, :, None]
        value = (self.values[codes[:, :levels]] * std + mean).sum(1)
        return value.reshape(len(codes), self.horizon, -1).astype(np.float32)

    def tokens(self, codes: Ints, levels: int) -> Ints:
        return codes[:, :levels].reshape(len(codes), -1)

    def symbols(self, codes: Ints, levels: int) -> Ints:
        return (codes[:, :levels] * self.alphabet ** np.arange(levels)[:, None]).sum(1)


def nominal_bits(tokens: Any, alphabet: int) -> float:
    """Mean number of tokens of a chunk times log2 of their alphabet."""
    return float(np.mean([len(sequence) for sequence in tokens])) * math.log2(alphabet)
