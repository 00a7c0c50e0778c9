"""What `python -m studies.openvla` and `rsd import-legacy` are told, without what they load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd.types import RsdError

CASES = ("vision", "l1", "prefill", "ar7", "rfsq-ar", "rsd", "rsd-fused", "light")

SECTIONS = ("reference", "eager", "graph", "compiled", "fp8", "load", "train")


@dataclass(frozen=True)
class OpenVlaBenchConfig:
    """Time OpenVLA's decoders on full-size random weights."""

    sections: tuple[str, ...] = ("reference", "eager", "graph", "compiled", "fp8")
    """reference (transformers and timm, as the published code runs); on one native model, always in this order: eager,
    graph (CUDA graphs), compiled (and graphs), fp8 (compiled, graphs and FP8 matrices); load writes a 15 GB checkpoint
    and loads it; train times LoRA training steps with two cameras."""
    cases: tuple[str, ...] = CASES
    """Of vision, l1, prefill, ar7, rfsq-ar, rsd, rsd-fused, light (the draft's own chunk)."""
    cameras: tuple[int, ...] = (2, 1)
    """Cameras at batch 1 for reference, graph and fp8; the other sections and larger batches take the first."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes; those after the first are timed for prefill, l1 and rsd, graph and fp8 only."""
    train_batches: tuple[int, ...] = (16,)
    """Chunks in the batch of a training step, even numbers: half of them are earlier moments of the others."""
    prompt_tokens: int = 30
    repeats: int = 20
    warmup: int = 3
    max_seconds: float = 270.0
    """No new row is begun later than this; what is left out says so."""
    device: str = "cuda"
    size: str = "7b"
    """7b, or tiny for a check on a CPU."""
    checkpoint: Path = Path("runs/bench/openvla-random")
    """Where `load` writes its checkpoint, which it deletes again."""
    output: Path = Path("runs/bench/openvla.json")

    def __post_init__(self) -> None:
        for name, given, allowed in (("sections", self.sections, SECTIONS), ("cases", self.cases, CASES)):
            if unknown := [value for value in given if value not in allowed]:
                raise RsdError(f"--{name} {' '.join(unknown)}: expected some of {', '.join(allowed)}")
        if self.repeats < 1 or self.warmup < 1 or not self.cameras or not self.batches or min(self.batches) < 1:
            raise RsdError(f"bench: expected repeats, warmup and batches of at least 1, found {self}")
        if not self.train_batches or any(size < 2 or size % 2 for size in self.train_batches):
            raise RsdError(f"--train-batches: expected even numbers of at least 2, found {self.train_batches}")
