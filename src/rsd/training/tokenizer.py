"""`rsd tokenizer fit`: calibrate the action code on demonstrations (states suffice, no images needed)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from rsd.checks import each_once
from rsd.data.demonstrations import action_episodes
from rsd.data.lerobot import located
from rsd.output import plural, refuse_to_replace, shown, writing
from rsd.tokenizer.action_tokenizer import FILE_NAME, ActionTokenizer
from rsd.training.config import TrainTokenizerConfig
from rsd.training.dataset import chunk_targets
from rsd.training.loop import one_run_a_folder
from rsd.types import RsdError

MOST_CHUNKS = 200_000  # neighbours overlap in all but a step: more would say nothing new


def demonstration_chunks(data: Sequence[Path], horizon: int) -> tuple[np.ndarray, int]:
    """Chunks of the labels float32 [N, H, A], and the number of demonstrations they are from.

    Every chunk, or every n-th where there would be more than MOST_CHUNKS."""
    each_once("--data", [located(folder)[0] for folder in data])
    episodes = (episode for folder in data for episode in action_episodes(folder))
    labels = [episode.actions for episode in shown(episodes, "demonstrations read")]
    where = ", ".join(map(str, data))
    if not labels:
        raise RsdError(f"{where or '--data'}: found no demonstrations; collect some with `rsd demos collect`")
    widths = sorted({label.shape[1] for label in labels})
    if len(widths) > 1:
        raise RsdError(f"{where}: expected actions of one size, found {' and '.join(map(str, widths))} numbers")
    if (longest := max(map(len, labels))) < horizon:
        padded = f"every chunk repeats its demonstration's last action: none has more than {longest} steps"
        print(f"warning: --tokenizer.horizon {horizon}: {padded}", file=sys.stderr)
    every = -(-sum(map(len, labels)) // MOST_CHUNKS)
    return np.concatenate([chunk_targets(label, horizon)[::every] for label in labels]), len(labels)


@one_run_a_folder
def train_tokenizer(config: TrainTokenizerConfig) -> ActionTokenizer:
    """Fit, save, and print the error of every prefix of levels and what was clipped."""
    refuse_to_replace(config.output / FILE_NAME, config.overwrite)
    chunks, demonstrations = demonstration_chunks(config.data, config.tokenizer.horizon)
    tokenizer = ActionTokenizer.fit(chunks, config.tokenizer)
    chunk = torch.from_numpy(chunks[:: max(1, len(chunks) // 20_000)])
    tokens = tokenizer.encode(chunk)
    print(f"{plural(demonstrations, 'demonstration')}, {len(chunks)} chunks; first step {tokenizer.first_step:.4f}")
    for dimension, low, high in zip(
        tokenizer.binary_index.tolist(), tokenizer.binary_low.tolist(), tokenizer.binary_high.tolist(), strict=True
    ):
        print(f"dimension {dimension} is binary: {low:g} (symbol 0) or {high:g} (symbol 1)")
    for levels in range(1, tokenizer.config.levels + 1):
        error = (tokenizer.decode(tokens, levels) - chunk).index_select(-1, tokenizer.motion_index).abs()
        mean, worst = float(error.mean()), float(error.max())
        print(f"levels 1..{levels}: mean error {mean:.5f}, max {worst:.4f} (action units)")
    with writing(config.output, SafetensorError):  # only what has encoded and decoded
        tokenizer.save(config.output)
    clipped = tokenizer.calibration
    print(f"beyond the code's reach: {100 * clipped.clipped_share:.4f} % of the coefficients, clipped")
    print(f"tokenizer: {config.output}; next: rsd train policy --tokenizer {config.output} --data DIR")
    return tokenizer
