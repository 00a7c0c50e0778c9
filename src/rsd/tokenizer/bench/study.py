"""`rsd tokenizer bench`: codes of action chunks at matched rates, on held-out demonstrations.

Every method writes one JSON file; the document and its plots are made from all the files there are, so that one method
can be measured again without the others.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rsd.data.demonstrations import load_demonstrations
from rsd.evaluation.backend import available_cores, cpu_model
from rsd.evaluation.results import encode_record, write_atomically
from rsd.tokenizer.bench.codecs import Scale
from rsd.tokenizer.bench.methods import FULL, METHODS, QUICK, Effort
from rsd.tokenizer.bench.metrics import Chunks, RatePoint, rate_points
from rsd.tokenizer.bench.report import write_report
from rsd.tokenizer.bench.timing import TIMING, Timing, measure_times
from rsd.training.dataset import chunk_targets
from rsd.types import ACTION_DIM, RsdError
from rsd.versions import versions

FORMAT = 1
ENTROPY_CHUNKS = 40_000


@dataclass(frozen=True)
class BenchConfig:
    """Compare codes of action chunks at matched bits: error, rate, utilisation, time."""

    data: Path = Path("data/libero_spatial")
    """Folder of demonstrations (HDF5; states suffice)."""
    methods: tuple[str, ...] = (*METHODS, TIMING)
    """What to measure; the others keep the files they have."""
    report_only: bool = False
    """Measure nothing: make the document and the plots from the files there are."""
    output: Path = Path("results/tokenizers")
    """One JSON file per method."""
    document: Path = Path("docs/results/tokenizers.md")
    """The document; its plots lie beside it."""
    horizon: int = 8
    """Steps in a chunk."""
    held_out_every: int = 5
    """Every n-th episode is held out."""
    held_out_stride: int = 4
    """Of the held-out chunks, which overlap, every n-th is measured."""
    quick: bool = False
    """Learn next to nothing: to try the command out, not for a result."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in (*METHODS, TIMING)]
        if unknown or len(set(self.methods)) < len(self.methods):
            expected = f"some of {', '.join((*METHODS, TIMING))}, each once"
            raise RsdError(f"--methods {' '.join(self.methods)}: expected {expected}")
        if self.horizon < 1 or self.held_out_every < 2 or self.held_out_stride < 1:
            raise RsdError("bench: expected --horizon >= 1, --held-out-every >= 2 and --held-out-stride >= 1")


@dataclass(frozen=True)
class MethodRecord:
    """One method's results. data: what they were measured on; points empty but for a method, times but for timing."""

    format: int
    method: str
    data: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    quick: bool
    seconds: float
    points: list[RatePoint]
    times: list[Timing]


def bench(config: BenchConfig) -> None:
    """Measure, write a JSON file per method, then the document."""
    console = Console()
    if not config.report_only:
        torch.set_num_threads(1)
        chunks, described = load_chunks(config)
        console.print(f"{described['train_chunks']} training chunks, {described['held_out_chunks']} held out")
        config.output.mkdir(parents=True, exist_ok=True)
        for name in config.methods:
            record = measure(name, chunks, described, QUICK if config.quick else FULL, config.quick, console)
            write_atomically(config.output / f"{name}.json", encode_record(record) + "\n")
    write_report(config.output, config.document)
    console.print(f"{config.document} written")


def measure(
    name: str, chunks: Chunks, described: dict[str, Any], effort: Effort, quick: bool, console: Console
) -> MethodRecord:
    start, points, times = time.perf_counter(), list[RatePoint](), list[Timing]()
    if name == TIMING:
        times = measure_times(chunks)
    else:
        for entry in METHODS[name](chunks, effort):
            for point in rate_points(entry.curve, entry.setting, entry.codec, chunks, entry.levels):
                points.append(RatePoint(**{**asdict(point), "extra": {**point.extra, **entry.extra}}))
                bits = f"{point.nominal_bits:.0f} nominal, {point.bits_order_1:.0f} coded"
                where = f"{point.curve} ({point.setting}), {point.levels} levels"
                console.print(f"{where}: {bits} bits, rmse {point.rmse:.4f}", highlight=False)
    machine = {"cpu": cpu_model(), "cores": str(available_cores()), "torch_threads": "1"}
    used = {**versions(), **extra_versions()}
    seconds = round(time.perf_counter() - start, 1)
    return MethodRecord(FORMAT, name, described, used, machine, quick, seconds, points, times)


def extra_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("scipy", "tokenizers", "vector-quantize-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def load_chunks(config: BenchConfig) -> tuple[Chunks, dict[str, Any]]:
    """The training and held-out chunks, and what to say of them in a result."""
    demonstrations = list(load_demonstrations(config.data, images=False))
    found, needed = len(demonstrations), config.held_out_every
    if found < needed:
        raise RsdError(f"{config.data}: expected at least {needed} demonstrations, found {found}")
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for number, demonstration in enumerate(demonstrations):
        held_out = number % config.held_out_every == config.held_out_every - 1
        parts[held_out].append(chunk_targets(demonstration.labels, config.horizon)[..., : ACTION_DIM - 1])
    train, held_out_chunks = np.concatenate(parts[False]), np.concatenate(parts[True])[:: config.held_out_stride]
    scale = Scale.of(train)
    normalised = scale.normalise(train)
    chunks = Chunks(
        normalised,
        scale.normalise(held_out_chunks),
        normalised[:: max(1, len(train) // ENTROPY_CHUNKS)],
        scale,
    )
    described = {
        "tasks": sorted({demonstration.task for demonstration in demonstrations}),
        "train_episodes": len(parts[False]),
        "held_out_episodes": len(parts[True]),
        "train_chunks": len(train),
        "held_out_chunks": len(held_out_chunks),
        "horizon": config.horizon,
        "low": (scale.centre - scale.half_width).tolist(),
        "high": (scale.centre + scale.half_width).tolist(),
    }
    return chunks, described
