"""Encode and decode times on one core.

The codes take turns, so that whatever the machine does meanwhile hits them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from studies.tokenizers.codecs import Bins, Codec, ResidualCode, Splines
from studies.tokenizers.extended import AUTOENCODERS
from studies.tokenizers.methods import QUICK, extension_of, our_entry
from studies.tokenizers.metrics import Chunks

BATCHES = (1, 256)
ROUNDS, WARMUP = 200, 20


@dataclass(frozen=True)
class Timing:
    """Microseconds per chunk, p50 and p95 of the rounds, in a batch of `batch` chunks."""

    name: str
    batch: int
    encode_p50: float
    encode_p95: float
    decode_p50: float
    decode_p95: float
    both_p50: float


def measure_times(chunks: Chunks) -> list[Timing]:
    """Every code at every batch size. What a network has learned does not change its time, so they learn little."""
    some = Chunks(chunks.train[:20_000], chunks.held_out, chunks.entropy, chunks.scale)
    codes = timed_codes(some)
    found = []
    for batch in BATCHES:
        motion = chunks.held_out[:batch]
        inputs = {name: prepare(codec, motion) for name, codec in codes.items()}
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
        for turn in range(WARMUP + ROUNDS):
            for name, (encode, decode) in inputs.items():
                start = time.perf_counter()
                tokens = encode()
                middle = time.perf_counter()
                decode(tokens)
                if turn >= WARMUP:
                    seen[name].append((middle - start, time.perf_counter() - middle))
        for name, pairs in seen.items():
            each = np.array(pairs) * 1e6 / batch
            (e50, d50), (e95, d95) = np.percentile(each, 50, axis=0), np.percentile(each, 95, axis=0)
            both = float(np.percentile(each.sum(1), 50))
            found.append(Timing(name, batch, float(e50), float(e95), float(d50), float(d95), both))
    return found


def timed_codes(chunks: Chunks) -> dict[str, Codec]:
    from studies.tokenizers.fast import Fast  # the extra `tokenizers`
    from studies.tokenizers.vector import ResidualFsq, ResidualVq

    horizon, motion = chunks.train.shape[1:]
    learn = QUICK.learn

    def our(transform: str, refine: bool = False) -> Codec:
        config = TokenizerConfig(horizon, "dct" if transform in AUTOENCODERS else transform)  # type: ignore[arg-type]
        return our_entry("", "", config, chunks, extension_of(transform, refine, learn)).codec

    return {
        "ours, dct, 8 levels": our("dct"),
        "ours, dct + refiner": our("dct", refine=True),
        "ours, pca": our("pca"),
        "ours, chunk-autoencoder": our("chunk-autoencoder"),
        "256 bins": Bins(256, np.ones(motion, np.float32), horizon),
        "FAST, scale 10": Fast(chunks.train, 10.0),
        "RVQ 1024, 8 levels": ResidualVq(chunks.train, 1024, 8, 2),
        "ResidualFSQ, 16 latents, 4 levels": ResidualFsq(chunks.train, 16, 4, learn),
        "B-spline, 5 points": Splines(chunks.train, 5, 256),
    }


def prepare(codec: Codec, motion: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """encode() and decode(tokens) on these chunks; ours from and to actions, as a policy uses it."""
    if isinstance(codec, ResidualCode):
        tokenizer: ActionTokenizer = codec.tokenizer
        actions = codec.scale.denormalise(motion)
        chunk = torch.from_numpy(np.concatenate([actions, np.ones((*motion.shape[:2], 1), np.float32)], axis=2))
        return lambda: tokenizer.encode(chunk), tokenizer.decode
    return lambda: codec.encode(motion), lambda tokens: codec.decode(tokens, codec.levels)
