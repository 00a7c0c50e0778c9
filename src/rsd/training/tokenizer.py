"""`rsd tokenizer fit`: calibrate the action code on demonstrations (states suffice, no images needed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rsd.data.episodes import action_episodes
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.config import TrainTokenizerConfig
from rsd.training.dataset import chunk_targets
from rsd.types import RsdError

MOST_CHUNKS = 200_000  # neighbours overlap in all but a step: more would say nothing new


def demonstration_chunks(data: Sequence[Path], horizon: int) -> tuple[np.ndarray, int]:
    """Chunks of the labels float32 [N, H, A], and the number of demonstrations they are from.

    Every chunk, or every n-th where there would be more than MOST_CHUNKS.
    """
    labels = [episode.actions for folder in data for episode in action_episodes(folder)]
    where = ", ".join(map(str, data))
    if not labels:
        raise RsdError(f"{where or '--data'}: found no demonstrations; collect some with `rsd demos collect`")
    widths = sorted({label.shape[1] for label in labels})
    if len(widths) > 1:
        raise RsdError(f"{where}: expected actions of one size, found {' and '.join(map(str, widths))} numbers")
    every = -(-sum(map(len, labels)) // MOST_CHUNKS)
    return np.concatenate([chunk_targets(label, horizon)[::every] for label in labels]), len(labels)


def train_tokenizer(config: TrainTokenizerConfig) -> ActionTokenizer:
    """Fit, save, and print the error of every prefix of levels and what was clipped."""
    chunks, demonstrations = demonstration_chunks(config.data, config.tokenizer.horizon)
    tokenizer = ActionTokenizer.fit(chunks, config.tokenizer)
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(config.output)
    chunk = torch.from_numpy(chunks[:: max(1, len(chunks) // 20_000)])
    tokens = tokenizer.encode(chunk)
    print(f"{demonstrations} demonstrations, {len(chunks)} chunks; first step {tokenizer.first_step:.4f}")
    for dimension, low, high in zip(
        tokenizer.binary_index.tolist(), tokenizer.binary_low.tolist(), tokenizer.binary_high.tolist(), strict=True
    ):
        print(f"dimension {dimension} is binary: {low:g} (symbol 0) or {high:g} (symbol 1)")
    for levels in range(1, tokenizer.config.levels + 1):
        error = (tokenizer.decode(tokens, levels) - chunk).index_select(-1, tokenizer.motion_index).abs()
        mean, worst = float(error.mean()), float(error.max())
        print(f"levels 1..{levels}: mean error {mean:.5f}, max {worst:.4f} (action units)")
    clipped = tokenizer.calibration
    print(f"beyond the code's reach: {100 * clipped.clipped_share:.4f} % of the coefficients, clipped")
    return tokenizer
