"""Options of `rsd import-legacy`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImportLegacyConfig:
    """Read the files of the original experiment and write them as one checkpoint without pickle."""

    autoencoder: Path
    """rfsq_robust_best.pt"""
    head: Path
    """best_rfsq_head.pt"""
    draft: Path | None = None
    """best_draft_with_projection.pt; without it the head decodes alone, if it is not conditioned."""
    layernorm: bool | None = None
    """Whether the autoencoder was trained with LayerNorm; needed where its file does not say."""
    calibration: Path | None = None
    """Demonstrations (HDF5), or a .npy file of action chunks [N, 8, 7], in the units the autoencoder was trained on."""
    output: Path = Path("runs/legacy")
