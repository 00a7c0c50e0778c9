"""`rsd tokenizer fit`: calibrate the action code on demonstrations (states suffice, no images needed)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rsd.data.demonstrations import load_demonstrations
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.training.dataset import chunk_targets
from rsd.types import RsdError


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Calibrate the action tokenizer on demonstrations."""

    data: Path = Path("data/libero_spatial")
    """Folder of demonstrations (HDF5), this package's or LIBERO's own."""
    output: Path = Path("runs/tokenizer")
    """Where tokenizer.json goes (and tokenizer.safetensors, where something is learned)."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def demonstration_chunks(data: Path, horizon: int) -> tuple[np.ndarray, int]:
    """Every chunk of the labels float32 [N, H, 7], and the number of demonstrations they are from."""
    labels = [d.labels for d in load_demonstrations(data, images=False)]
    if not labels:
        raise RsdError(f"{data}: found no demonstrations; collect some with `rsd demos collect`")
    return np.concatenate([chunk_targets(label, horizon) for label in labels]), len(labels)


def train_tokenizer(config: TrainTokenizerConfig) -> ActionTokenizer:
    """Fit, save, and print the error of every prefix of levels and what was clipped."""
    chunks, demonstrations = demonstration_chunks(config.data, config.tokenizer.horizon)
    tokenizer = ActionTokenizer.fit(chunks, config.tokenizer)
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(config.output)
    chunk = torch.from_numpy(chunks[:: max(1, len(chunks) // 20_000)])
    tokens = tokenizer.encode(chunk)
    print(f"{demonstrations} demonstrations, {len(chunks)} chunks; first step {tokenizer.first_step:.4f}")
    for levels in range(1, tokenizer.config.levels + 1):
        error = (tokenizer.decode(tokens, levels) - chunk).index_select(-1, tokenizer.motion_index).abs()
        mean, worst = float(error.mean()), float(error.max())
        print(f"levels 1..{levels}: mean error {mean:.5f}, max {worst:.4f} (action units)")
    clipped = tokenizer.calibration
    print(f"beyond the code's reach: {100 * clipped.clipped_share:.4f} % of the coefficients, clipped")
    return tokenizer
