"""`rsd tokenizer inspect`: what a tokenizer makes of demonstrations, as a picture and a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from rsd.evaluation.tables import print_table
from rsd.output import refuse_to_replace, terminal, writing
from rsd.reporting.config import InspectConfig
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.tokenizer import demonstration_chunks
from rsd.types import RsdError

NAMES = ("x", "y", "z", "roll", "pitch", "yaw")
MOST_CHUNKS = 20_000
TITLE = "rsd tokenizer inspect"  # in the picture's metadata, so that it is known as one


@dataclass(frozen=True)
class LevelStatistics:
    """One level over many chunks. counts: how often each symbol occurs [K], over the scalars that have a token.

    entropy: bits a token, each scalar on its own. utilisation: share of (scalar, symbol) pairs that occur.
    mean_error, max_error: of the actions decoded from the levels up to this one (action units).
    """

    level: int
    counts: list[int]
    entropy: float
    utilisation: float
    mean_error: float
    max_error: float


def level_statistics(tokenizer: ActionTokenizer, chunk: Tensor) -> list[LevelStatistics]:
    """chunk float [N, H, A] -> a record for every level 1..L."""
    tokens, symbols, found = tokenizer.encode(chunk), tokenizer.config.symbols, []
    for level in range(1, tokenizer.config.levels + 1):
        motion = tokens.motion[:, level - 1]
        counts = np.stack([(motion == symbol).sum(0).numpy() for symbol in range(symbols)], axis=1)  # [P, K]
        error = (tokenizer.decode(tokens, level) - chunk).index_select(-1, tokenizer.motion_index).abs()
        found.append(
            LevelStatistics(
                level,
                counts.sum(0).tolist(),
                entropy(counts),
                float((counts > 0).mean()),
                float(error.mean()),
                float(error.max()),
            )
        )
    return found


def entropy(counts: NDArray[np.int64]) -> float:
    """Counts [P, K] of each scalar's symbols -> bits a token, mean over the scalars; 0 for no scalar."""
    if not counts.size:
        return 0.0
    share = counts / counts.sum(1, keepdims=True)
    logarithm = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return float(-(share * logarithm).sum(1).mean())


def inspect_tokenizer(config: InspectConfig) -> list[LevelStatistics]:
    """Print the table, write the picture."""
    refuse_to_replace(config.output, config.overwrite, TITLE.encode())
    tokenizer = ActionTokenizer.from_pretrained(config.tokenizer)
    chunks, _ = demonstration_chunks(config.data, tokenizer.config.horizon)
    if chunks.shape[2] != tokenizer.action_dim:
        where = ", ".join(map(str, config.data))
        raise RsdError(f"{where}: expected actions of {tokenizer.action_dim} numbers, found {chunks.shape[2]}")
    if config.chunk is not None and config.chunk >= len(chunks):
        raise RsdError(f"--chunk {config.chunk}: expected a number below {len(chunks)}")
    spread = chunks[..., tokenizer.motion_index.numpy()].std(axis=1).sum(-1)  # within the steps of each chunk
    number = int(spread.argmax()) if config.chunk is None else config.chunk
    statistics = level_statistics(tokenizer, torch.from_numpy(chunks[:: max(1, len(chunks) // MOST_CHUNKS)]))
    seen = tokenizer.statistics
    console = terminal()
    print_statistics(console, statistics)
    console.print(
        f"{seen.chunks} chunks; {seen.clipped_chunks} of them reach beyond the code "
        f"({100 * seen.clipped_share:.4f} % of the coefficients) and are clipped"
    )
    draw(tokenizer, torch.from_numpy(chunks[number : number + 1]), statistics, number, config.output)
    console.print(f"chunk {number}: {config.output}")
    return statistics


def print_statistics(console: Console, statistics: list[LevelStatistics]) -> None:
    header = ["level", "entropy, bits a token", "utilisation", "mean error", "max error"]
    rows = []
    for each in statistics:
        errors = f"{each.mean_error:.5f}", f"{each.max_error:.4f}"
        rows.append([str(each.level), f"{each.entropy:.3f}", f"{100 * each.utilisation:.0f} %", *errors])
    print_table(console, "levels", header, rows, "rows")


def draw(tokenizer: ActionTokenizer, chunk: Tensor, statistics: list[LevelStatistics], number: int, path: Path) -> None:
    """Left: every motion dimension of chunk [1, H, A] and its prefixes. Right: each level's symbols."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tokens, levels = tokenizer.encode(chunk), tokenizer.config.levels
    dimensions = tokenizer.motion_index.tolist()
    rows = max(len(dimensions), levels)
    figure = plt.figure(figsize=(11, 1.5 * rows), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1), squeeze=False)[0]
    left.suptitle(f"chunk {number} (black) from its first 1..{levels} levels")
    right.suptitle("share of each symbol")
    colours = plt.get_cmap("viridis")(np.linspace(0.9, 0.0, levels))
    decoded = [tokenizer.decode(tokens, level)[0] for level in range(1, levels + 1)]
    for place, axes in enumerate(left.subplots(len(dimensions), 1, sharex=True, squeeze=False)[:, 0]):
        dimension = dimensions[place]
        for level, actions in enumerate(decoded):
            axes.plot(actions[:, dimension], color=colours[level], linewidth=1, label=f"1..{level + 1}")
        axes.plot(chunk[0, :, dimension], "k.--", linewidth=1)
        axes.set_ylabel(NAMES[dimension] if len(dimensions) == len(NAMES) else str(dimension))
        if place == 0:
            axes.legend(ncols=levels, fontsize=5, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    half = tokenizer.config.rfsq.half
    for each, axes in zip(statistics, right.subplots(levels, 1, sharex=True, squeeze=False)[:, 0], strict=True):
        share = np.array(each.counts) / max(1, sum(each.counts))
        axes.bar(np.arange(-half, half + 1), share, color=colours[each.level - 1])
        axes.set(ylim=(0, 1), ylabel=f"level {each.level}")
        text = f"{each.entropy:.2f} bits, {100 * each.utilisation:.0f} % used"
        axes.text(0.99, 0.8, text, transform=axes.transAxes, ha="right", fontsize=7)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Title": TITLE})
    plt.close(figure)
