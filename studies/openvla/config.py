"""What `python -m studies.openvla` is told, without what it loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rsd.checks import Checked, Rules, Some, Time, between, one_of

CASES = ("vision", "l1", "prefill", "ar7", "rfsq-ar", "rsd", "rsd-fused", "light")

SECTIONS = ("reference", "eager", "graph", "compiled", "fp8", "load", "train")


@dataclass(frozen=True)
class OpenVlaBenchConfig(Checked):
    """Time OpenVLA's decoders on full-size random weights."""

    sections: tuple[str, ...] = ("reference", "eager", "graph", "compiled", "fp8")
    """reference (transformers and timm, as the published code runs); on one native model, always in this order: eager,
    graph (CUDA graphs), compiled (and graphs), fp8 (compiled, graphs and FP8 matrices); load writes a 15 GB checkpoint
    and loads it; train times LoRA training steps with two cameras."""
    cases: tuple[str, ...] = CASES
    """Of vision, l1, prefill, ar7, rfsq-ar, rsd, rsd-fused, light (the draft's own chunk)."""
    cameras: tuple[Annotated[int, between(1, 2)], ...] = (2, 1)
    """Cameras at batch 1 for reference, graph and fp8; the other sections and larger batches take the first."""
    batches: tuple[Some, ...] = (1, 4, 16)
    """Batch sizes; those after the first are timed for prefill, l1 and rsd, graph and fp8 only."""
    train_batches: tuple[Some, ...] = (16,)
    """Chunks in the batch of a training step, even numbers: half of them are earlier moments of the others."""
    prompt_tokens: Some = 30
    repeats: Some = 20
    warmup: Some = 3
    max_seconds: Time = 270.0
    """No new row is begun later than this; what is left out says so."""
    device: str = "cuda"
    size: Annotated[str, one_of(("7b", "tiny"))] = "7b"
    """7b, or tiny for a check on a CPU."""
    checkpoint: Path = Path("runs/bench/openvla-random")
    """Where `load` writes its checkpoint, which it deletes again."""
    output: Path = Path("runs/bench/openvla.json")

    def rules(self) -> Rules:
        for name, given, allowed in (("sections", self.sections, SECTIONS), ("cases", self.cases, CASES)):
            unknown = [value for value in given if value not in allowed]
            yield not unknown, f"--{name} of {', '.join(allowed)}", " ".join(unknown)
        for name, some in (("cameras", self.cameras), ("batches", self.batches), ("train-batches", self.train_batches)):
            yield some, f"one or more of --{name}", "none"
        even = all(size % 2 == 0 for size in self.train_batches)
        yield even, "even numbers for --train-batches", " ".join(map(str, self.train_batches))
