"""`rsd train tokenizer`: calibrate the action code on demonstrations (states suffice, no images needed)."""

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
    """Folder of demonstrations (HDF5)."""
    output: Path = Path("runs/tokenizer")
    """Where tokenizer.json goes."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def train_tokenizer(config: TrainTokenizerConfig) -> ActionTokenizer:
    """Fit, save, and print the error of every prefix of levels."""
    labels = [d.labels for d in load_demonstrations(config.data, images=False)]
    if not labels:
        raise RsdError(f"{config.data}: found no demonstrations; collect some with `rsd demos collect`")
    chunks = np.concatenate([chunk_targets(label, config.tokenizer.horizon) for label in labels])
    tokenizer = ActionTokenizer.fit(chunks, config.tokenizer)
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(config.output)
    chunk = torch.from_numpy(chunks[:: max(1, len(chunks) // 20_000)])
    tokens = tokenizer.encode(chunk)
    print(f"{len(labels)} demonstrations, {len(chunks)} chunks; first step {tokenizer.first_step:.4f}")
    for levels in range(1, tokenizer.config.levels + 1):
        error = (tokenizer.decode(tokens, levels) - chunk)[..., :-1].abs()
        mean, worst = float(error.mean()), float(error.max())
        print(f"levels 1..{levels}: mean error {mean:.5f}, max {worst:.4f} (action units)")
    return tokenizer
