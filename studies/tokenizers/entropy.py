"""Bits per chunk that an entropy coder would need, with the same two simple models for every code.

Both are fitted on training chunks and charged for held-out ones (cross entropy: a symbol that was rare in training
costs its price). `order 0`: every symbol on its own, by position. `order 1`: with one earlier symbol as context, the
one that helps most (a tree over the positions, as Chow and Liu 1968); for a code of variable length the previous token.
Counts of a context are mixed with order 0 by Witten and Bell's rule (1991).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SMOOTHING = 0.05  # pseudo-count of every symbol
CHOICE_CHUNKS = 12_000  # training chunks that choose the contexts
VALIDATION = 5  # every fifth of them judges
CANDIDATES = 48  # earlier positions that may be the context, the nearest ones
NEGLIGIBLE = 0.01  # a position of fewer bits is not worth a context


def fixed_length_bits(train: Ints, held_out: Ints, order: int = 1) -> tuple[Floats, Floats]:
    """Symbols [N, S] of training and held-out chunks -> bits of each position [S], order 0 and (if asked) order 1."""
    columns = [_relabel(train[:, s], held_out[:, s]) for s in range(train.shape[1])]
    some = np.arange(len(train)) % max(1, len(train) // CHOICE_CHUNKS) == 0  # these choose the contexts
    judged = np.cumsum(some) % VALIDATION == 0
    learned, judged = some & ~judged, some & judged
    order_0, order_1 = np.zeros(len(columns)), np.zeros(len(columns))
    for position, (own, seen, size) in enumerate(columns):
        fitted = _order_0(own[learned], size)
        cost, parent = _bits(fitted, own[judged]), None
        for earlier in range(max(0, position - CANDIDATES), position) if order and cost > NEGLIGIBLE else ():
            context, _, contexts = columns[earlier]
            if contexts == 1:
                continue
            bits = _order_1(own[learned], context[learned], own[judged], context[judged], fitted, contexts)
            if bits < cost:
                cost, parent = bits, earlier
        whole = _order_0(own, size)
        order_0[position] = order_1[position] = _bits(whole, seen)
        if parent is not None:
            context, context_seen, contexts = columns[parent]
            order_1[position] = _order_1(own, context, seen, context_seen, whole, contexts)
    return order_0, order_1


def variable_length_bits(
    train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], size: int
) -> tuple[float, float]:
    """Token sequences over 0..size-1 -> bits per chunk, order 0 and order 1. The end needs no symbol."""
    start = size  # context of a first token
    own, seen = np.concatenate([np.asarray(s) for s in train]), np.concatenate([np.asarray(s) for s in held_out])
    before, before_seen = (
        np.concatenate([np.r_[start, np.asarray(s[:-1], dtype=np.int64)] for s in part]) for part in (train, held_out)
    )
    order_0 = _order_0(own, size)
    per_chunk = len(seen) / len(held_out)
    order_1 = _order_1(own, before, seen, before_seen, order_0, size + 1)
    plain = _bits(order_0, seen)
    return plain * per_chunk, min(plain, order_1) * per_chunk


def _relabel(train: Ints, held_out: Ints) -> tuple[Ints, Ints, int]:
    symbols, labels = np.unique(np.concatenate([train, held_out]), return_inverse=True)
    return labels[: len(train)], labels[len(train) :], len(symbols)


def _order_0(symbols: Ints, size: int) -> Floats:
    counts = np.bincount(symbols, minlength=size) + SMOOTHING
    return counts / counts.sum()


def _bits(probabilities: Floats, symbols: Ints) -> float:
    return float(-np.log2(probabilities[symbols]).mean())


def _order_1(
    own: Ints, context: Ints, seen: Ints, context_seen: Ints, order_0: Floats, contexts: int
) -> float:
    """Mean bits of the symbols `seen` after their contexts, with counts from `own` and its contexts."""
    size = len(order_0)
    pairs, pair_counts = np.unique(context * size + own, return_counts=True)
    totals = np.bincount(context, minlength=contexts)
    kinds = np.bincount(pairs // size, minlength=contexts)
    wanted = context_seen * size + seen
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    count = np.where(pairs[place] == wanted, pair_counts[place], 0)
    denominator = np.maximum(totals + kinds, 1)[context_seen]
    unknown = np.where(totals > 0, kinds, 1)[context_seen]  # a context never met says nothing
    return float(-np.log2((count + unknown * order_0[seen]) / denominator).mean())
