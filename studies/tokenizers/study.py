"""`python -m studies.tokenizers`: codes of action chunks at matched rates, on held-out demonstrations.

Every method writes one JSON file; the document and its plots are made from all the files there are, so that one method
can be measured again without the others. With `--others` the codes, fitted as ever on `--data`, are measured on other
suites as well; those files lie apart, in `OTHERS` of the output folder, and may be of fewer training chunks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rsd.checks import each_once
from rsd.data.demonstrations import ActionEpisode, action_episodes, folder_provenance
from rsd.devices import cpu_model
from rsd.evaluation.backend import available_cores
from rsd.evaluation.results import encode_record, write_atomically
from rsd.output import Faults, refuse_to_replace, shown
from rsd.training.dataset import chunk_targets
from rsd.types import ACTION_DIM, RsdError
from rsd.versions import versions
from studies.tokenizers.codecs import Scale
from studies.tokenizers.config import TIMING, BenchConfig
from studies.tokenizers.methods import FULL, METHODS, QUICK, Effort
from studies.tokenizers.metrics import Chunks, RatePoint, rate_points
from studies.tokenizers.report import MADE_BY, OTHERS, read_records, write_report
from studies.tokenizers.timing import Timing, measure_times

FORMAT = 1
ENTROPY_CHUNKS = 40_000


@dataclass(frozen=True)
class MethodRecord:
    """One method's results. data: what they were measured on; points empty but for a method, times but for timing.

    others: folder name -> the same points, measured on the chunks of that folder.
    """

    format: int
    method: str
    data: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    quick: bool
    seconds: float
    points: list[RatePoint]
    times: list[Timing]
    others: dict[str, list[RatePoint]] = field(default_factory=dict)


def bench(config: BenchConfig) -> None:
    """Measure, write a JSON file per method, then the document."""
    console = Console()
    faults, done = Faults(f"the results of the others are in {config.output}"), 0
    if config.document.exists() and MADE_BY not in config.document.read_text():
        refuse_to_replace(config.document, config.overwrite)
    if not config.report_only:
        output = config.output / OTHERS if config.others else config.output
        for method in config.methods:
            refuse_to_replace(output / f"{method}.json", config.overwrite)
        torch.set_num_threads(1)
        chunks, described = load_chunks(config)
        console.print(f"{described['train_chunks']} training chunks, {described['held_out_chunks']} held out")
        others = load_others(config, chunks, described)
        require_same_data(output, config.methods, described)
        for method in config.methods:
            effort = QUICK if config.quick else FULL
            console.print(f"{method}: fitting and measuring")
            try:
                record = measure(method, chunks, others, described, effort, config.quick, console)
            except RsdError as error:
                faults.failed(method, str(error))
                continue
            done += 1
            write_atomically(output / f"{method}.json", encode_record(record) + "\n")
    write_report(config.output, config.document)
    console.print(f"{config.document} written, from the files in {config.output}")
    faults.raise_any(f"of {len(config.methods)} methods", done)


def require_same_data(output: Path, methods: Sequence[str], described: dict[str, Any]) -> None:
    """Raises RsdError where `output` holds other methods' results on other data: the two make no document."""
    data = json.loads(json.dumps(described))
    for record in read_records(output) if any(output.glob("*.json")) else []:
        if record["method"] not in methods and record["data"] != data:
            found = f"{output}: holds results of {record['method']} on other data or settings"
            raise RsdError(f"{found}; choose another --output")


def measure(
    method: str,
    chunks: Chunks,
    others: dict[str, Chunks],
    described: dict[str, Any],
    effort: Effort,
    quick: bool,
    console: Console,
) -> MethodRecord:
    start, points, times = time.perf_counter(), list[RatePoint](), list[Timing]()
    elsewhere: dict[str, list[RatePoint]] = {other: [] for other in others}
    if method == TIMING:
        times = measure_times(chunks)
    else:
        for entry in METHODS[method](chunks, effort):
            for point in rate_points(entry.curve, entry.setting, entry.codec, chunks, entry.levels):
                points.append(replace(point, extra={**point.extra, **entry.extra}))
                bits = f"{point.nominal_bits:.0f} nominal, {point.bits_order_1:.0f} coded"
                where = f"{point.curve} ({point.setting}), {point.levels} levels"
                console.print(f"{where}: {bits} bits, rmse {point.rmse:.4f}", highlight=False)
            for other, its_chunks in others.items():
                elsewhere[other] += rate_points(entry.curve, entry.setting, entry.codec, its_chunks, entry.levels)
    machine = {"cpu": cpu_model(), "cores": str(available_cores()), "torch_threads": "1"}
    used = {**versions(), **extra_versions()}
    seconds = round(time.perf_counter() - start, 1)
    return MethodRecord(FORMAT, method, described, used, machine, quick, seconds, points, times, elsewhere)


def extra_versions() -> dict[str, str]:
    found = {}
    for name in ("scipy", "tokenizers", "vector-quantize-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def load_chunks(config: BenchConfig) -> tuple[Chunks, dict[str, Any]]:
    """The training and held-out chunks, and what to say of them in a result."""
    each_once("--data", config.data)
    episodes = list(shown((e for folder in config.data for e in libero_episodes(folder)), "demonstrations read"))
    found, needed = len(episodes), config.held_out_every
    if found < needed:
        where = ", ".join(map(str, config.data))
        raise RsdError(f"{where}: expected at least {needed} demonstrations, found {found}")
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for number, episode in enumerate(episodes):
        held_out = number % config.held_out_every == config.held_out_every - 1
        parts[held_out].append(motion_chunks(episode, config.horizon))
    train, held_out_chunks = np.concatenate(parts[False]), np.concatenate(parts[True])[:: config.held_out_stride]
    if config.train_chunks:
        train = train[:: max(1, len(train) // config.train_chunks)]
    scale = Scale.of(train)
    normalised = scale.normalise(train)
    chunks = Chunks(
        normalised,
        scale.normalise(held_out_chunks),
        normalised[:: max(1, len(train) // ENTROPY_CHUNKS)],
        scale,
    )
    described = {
        "recorded_by": sorted({str(folder_provenance(folder)["recorded_by"]) for folder in config.data}),
        "tasks": sorted({episode.task for episode in episodes}),
        "train_episodes": len(parts[False]),
        "held_out_episodes": len(parts[True]),
        "train_chunks": len(train),
        "held_out_chunks": len(held_out_chunks),
        "horizon": config.horizon,
        "low": (scale.centre - scale.half_width).tolist(),
        "high": (scale.centre + scale.half_width).tolist(),
    }
    return chunks, described


def load_others(config: BenchConfig, chunks: Chunks, described: dict[str, Any]) -> dict[str, Chunks]:
    """`--others`: folder name -> its chunks in the place of the held-out ones; adds to `described` what they are."""
    found = {}
    for folder in config.others:
        episodes = list(libero_episodes(folder))
        motion = np.concatenate([motion_chunks(e, config.horizon) for e in episodes])[:: config.held_out_stride]
        normalised = chunks.scale.normalise(motion)
        found[name(folder)] = replace(chunks, held_out=normalised)
        described.setdefault("others", {})[name(folder)] = {
            "recorded_by": str(folder_provenance(folder)["recorded_by"]),
            "tasks": sorted({episode.task for episode in episodes}),
            "episodes": len(episodes),
            "chunks": len(motion),
            # how far the actions are beyond what the codes were fitted to
            "chunks_beyond_train_range": beyond(chunks.train, normalised),
        }
    return found


def beyond(train: np.ndarray, motion: np.ndarray) -> float:
    """Share of the chunks [N, H, M] with a number outside what the training chunks have in its dimension."""
    outside = (motion < train.min((0, 1))) | (motion > train.max((0, 1)))
    return float(outside.any((1, 2)).mean())


def libero_episodes(folder: Path) -> Iterator[ActionEpisode]:
    for episode in action_episodes(folder):
        if episode.actions.shape[1] != ACTION_DIM:
            raise RsdError(
                f"{folder}: expected LIBERO's actions of {ACTION_DIM} numbers (the study measures millimetres of its "
                f"controller), found {episode.actions.shape[1]}"
            )
        yield episode


def motion_chunks(episode: ActionEpisode, horizon: int) -> np.ndarray:
    """[T, H, 6]: the gripper, the last number, left out."""
    return chunk_targets(episode.actions, horizon)[..., : ACTION_DIM - 1]


def name(folder: Path) -> str:
    return folder.resolve().name
