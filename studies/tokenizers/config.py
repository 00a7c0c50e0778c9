"""What `python -m studies.tokenizers` and `inspect` are told, without what they load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd.types import RsdError

METHODS = (  # in the order of the document
    *("ours-dct", "ours-dct-refined", "ours-pca", "ours-identity", "ours-step-autoencoder", "ours-chunk-autoencoder"),
    *("ours-codes", "ours-budgets", "shipped", "bins", "fast", "rvq", "residual-fsq", "layernorm-rfsq", "splines"),
)

TIMING = "timing"


@dataclass(frozen=True)
class BenchConfig:
    """Compare codes of action chunks at matched bits: error, rate, utilisation, time."""

    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of demonstrations, HDF5 (states suffice) or LeRobot, with LIBERO's actions of 7 numbers."""
    others: tuple[Path, ...] = ()
    """Folders that no code is fitted on: every n-th of all their chunks is measured, beside the held-out ones."""
    methods: tuple[str, ...] = (*METHODS, TIMING)
    """What to measure; the others keep the files they have."""
    report_only: bool = False
    """Measure nothing: make the document and the plots from the files there are."""
    output: Path = Path("runs/tokenizer-bench")
    """One JSON file per method."""
    document: Path = Path("runs/tokenizer-bench/tokenizers.md")
    """The document; its plots lie beside it."""
    overwrite: bool = False
    """Replace the results of these methods that are there."""
    horizon: int = 8
    """Steps in a chunk."""
    held_out_every: int = 5
    """Every n-th episode is held out."""
    held_out_stride: int = 4
    """Of the held-out chunks, which overlap, every n-th is measured."""
    train_chunks: int = 0
    """Fit on about this many training chunks, spread evenly, for a quicker study; 0: on all."""
    quick: bool = False
    """Learn next to nothing: to try the command out, not for a result."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in (*METHODS, TIMING)]
        if unknown or len(set(self.methods)) < len(self.methods):
            expected = f"some of {', '.join((*METHODS, TIMING))}, each once"
            raise RsdError(f"--methods {' '.join(self.methods)}: expected {expected}")
        if self.horizon < 1 or self.held_out_every < 2 or self.held_out_stride < 1 or self.train_chunks < 0:
            expected = "--horizon >= 1, --held-out-every >= 2, --held-out-stride >= 1 and --train-chunks >= 0"
            raise RsdError(f"bench: expected {expected}")
        if len({folder.resolve().name for folder in self.others}) < len(self.others):
            raise RsdError(f"--others {' '.join(map(str, self.others))}: expected folders of different names")
