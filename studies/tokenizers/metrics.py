"""What a code costs and loses on held-out chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from studies.tokenizers.codecs import Codec, Motion, ResidualCode, Scale, nominal_bits
from studies.tokenizers.entropy import fixed_length_bits, variable_length_bits

TOLERANCE = 0.02  # 1 % of the width of [-1, 1]
# robosuite's OSC_POSE, LIBERO's controller: action 1 asks for 0.05 m or 0.5 rad in a step
MILLIMETRES, MILLIRADIANS = 50.0, 500.0
TRANSLATION = 3  # first dimensions


@dataclass(frozen=True)
class Chunks:
    """Normalised motion float32 [N, H, M] of the training episodes and of the held-out ones, and their scale.

    entropy: those training chunks that the entropy models are fitted on."""

    train: Motion
    held_out: Motion
    entropy: Motion
    scale: Scale


class Errors(TypedDict):
    """Those of `RatePoint`."""

    rmse: float
    max_error: float
    rmse_mm: float
    rmse_mrad: float
    max_mm: float
    max_mrad: float
    within_1_percent: float


@dataclass(frozen=True)
class RatePoint:
    """One code at one prefix of its levels, on the held-out chunks.

    tokens: mean number a chunk. bits: nominal (tokens * log2 of the alphabet) and entropy-coded (see `entropy`).
    rmse, max_error: normalised, [-1, 1] being the 1 % .. 99 % range of a dimension; _mm and _mrad of a single step.
    within_1_percent: share of chunks whose every number is within 1 % of its dimension's range.
    utilisation: share of (token position, symbol) pairs that occur in the held-out chunks.
    extra: digits_order_0 of our codes, the bits of the digits instead of what they decode to; others by code.
    """

    curve: str
    setting: str
    levels: int
    tokens: float
    nominal_bits: float
    bits_order_0: float
    bits_order_1: float
    rmse: float
    max_error: float
    rmse_mm: float
    rmse_mrad: float
    max_mm: float
    max_mrad: float
    within_1_percent: float
    utilisation: float
    extra: dict[str, float] = field(default_factory=dict)


def rate_points(curve: str, setting: str, codec: Codec, chunks: Chunks, levels: list[int]) -> Iterator[RatePoint]:
    """A point for each of the prefixes `levels`."""
    train, held_out = codec.encode(chunks.entropy), codec.encode(chunks.held_out)
    whole = None
    for count in levels:
        tokens = codec.tokens(held_out, count)
        if isinstance(tokens, list):
            order_0, order_1 = variable_length_bits(codec.tokens(train, count), tokens, codec.alphabet)
        elif codec.symbols(held_out, count).shape[1] == count:  # a symbol a level: the bits of a prefix add up
            if whole is None:
                last = max(levels)
                whole = fixed_length_bits(codec.symbols(train, last), codec.symbols(held_out, last))
            order_0, order_1 = (float(bits[:count].sum()) for bits in whole)
        else:
            bits = fixed_length_bits(codec.symbols(train, count), codec.symbols(held_out, count))
            order_0, order_1 = (float(each.sum()) for each in bits)
        extra = {}
        if isinstance(codec, ResidualCode):
            digits = fixed_length_bits(codec.digit_sequences(train, count), codec.digit_sequences(held_out, count), 0)
            extra["digits_order_0"] = float(digits[0].sum())
        decoded = codec.decode(held_out, count)
        yield RatePoint(
            curve,
            setting,
            count,
            float(np.mean([len(sequence) for sequence in tokens])),
            nominal_bits(tokens, codec.alphabet),
            order_0,
            order_1,
            **errors(decoded, chunks),
            utilisation=utilisation(tokens, codec.alphabet),
            extra=extra,
        )


def errors(decoded: Motion, chunks: Chunks) -> Errors:
    """Errors on the held-out chunks.

    Every code's actions are clipped to [-1, 1], which is all a robot is sent.
    """
    scale = chunks.scale
    actions = scale.denormalise(decoded).clip(-1.0, 1.0)
    physical = np.abs(actions - scale.denormalise(chunks.held_out))  # float32 [N, H, M], action units
    error = physical / scale.half_width
    move, turn = physical[..., :TRANSLATION] * MILLIMETRES, physical[..., TRANSLATION:] * MILLIRADIANS
    within = float((error <= TOLERANCE).all((1, 2)).mean())
    return {
        "rmse": rms(error),
        "max_error": float(error.max()),
        "rmse_mm": rms(move),
        "rmse_mrad": rms(turn),
        "max_mm": float(move.max()),
        "max_mrad": float(turn.max()),
        "within_1_percent": within,
    }


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def utilisation(tokens: Any, alphabet: int) -> float:
    """Share of (position, symbol) pairs in use; of the vocabulary where a sequence's length varies."""
    if isinstance(tokens, list):
        return len(set().union(*tokens)) / alphabet
    return float(np.mean([len(np.unique(column)) / alphabet for column in tokens.T]))
