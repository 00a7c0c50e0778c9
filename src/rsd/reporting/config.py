"""Options of `rsd tokenizer inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd.checks import Checked, Count, Rules
from rsd.training.config import DEFAULT_TOKENIZER

SUFFIXES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class InspectConfig(Checked):
    """Plot a chunk reconstructed from 1..L levels, and each level's symbols, entropy and utilisation."""

    tokenizer: str = "checkpoints/libero"
    """Directory with tokenizer.json (a checkpoint is one) or hub id."""
    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of demonstrations: HDF5 files (states suffice) or LeRobot data sets."""
    chunk: Count | None = None
    """Number of the chunk to draw; by default the one that moves most within its steps."""
    output: Path = DEFAULT_TOKENIZER / "inspect.svg"
    """The picture: .svg, .png or .pdf; an earlier one is replaced."""
    overwrite: bool = False
    """Replace any other file, too."""

    def rules(self) -> Rules:
        yield self.output.suffix in SUFFIXES, f"an --output that ends in {', '.join(SUFFIXES)}", str(self.output)
