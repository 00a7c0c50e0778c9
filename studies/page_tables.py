"""Tables that the pages of results share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.decoding.calibration import RealisedRisk, realised_risk
from rsd.decoding.decoders import DECODERS
from rsd.evaluation.calibrate import SCORE, chunk_stat
from rsd.evaluation.config import DEFAULT, asked_rule
from rsd.evaluation.latency import LatencyRecord
from rsd.evaluation.statistics import PairedDifference, percentiles
from rsd.evaluation.summary import success_rate, summarize_decoding
from rsd.evaluation.tables import level_cell, markdown
from rsd.reporting.tables import Run, difference_cell, interval_cell, paired, success_cell, task_labels
from rsd.types import COMPILED, CUDA_GRAPHS, EAGER, ONNX, VERIFY_PENDING
from studies.archive import read_json
from studies.deviation import UNITS, DeviationRecord

ABSENT = "-"
EPSILON_MM, DELTA = 50.0, 0.1


def training_of(path: Path) -> str:
    """What a checkpoint's own record, its config.json, says of its training."""
    provenance = read_json(path)["provenance"]
    data, loop = provenance["data"], provenance["training"]["loop"]
    length = f"{loop['minutes']:g} minutes" if loop["minutes"] else f"{loop['steps']} steps"
    processes = f" x {provenance['processes']}" if "processes" in provenance else ""
    return (
        f"`{path}`: {data['episodes']} demonstrations, {data['frames']} frames, {length} of batches "
        f"of {loop['batch_size']}{processes}, learning rate {loop['learning_rate']:g}."
    )


def success_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    versions = runs[0].record.versions
    made = ", ".join(f"{name} {versions[name]}" for name in ("mujoco", "robosuite", "libero", "gl_backend", "torch"))
    device, counts = versions.get("device", "?"), " or ".join(map(str, sorted({len(run.episodes) for run in runs})))
    return (
        f"## Success, policy on {device}\n\n{counts} episodes each on the benchmark's fixed initial states, the "
        "same for all where both have them: exact McNemar test, which speaks of these tasks, and the 95 % bootstrap "
        f"interval with whole tasks drawn anew, which speaks of other tasks like these. {made}. Deviation: commanded "
        "fingertip displacement over a chunk, p50 / p99 (the arm follows about a quarter of it).\n\n"
    ) + success_table(names, runs)


def success_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Success, against the first two, passes, acceptance, deviation."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        decoding, deviations = summarize_decoding(run.episodes), deviation_of(run)
        against = [ABSENT if run is other else against_cell(paired(other, run)) for other in runs[:2]]
        rows.append(
            [
                f"`{name}`",
                success_cell(success_rate(run.episodes)),
                *against,
                f"{decoding.prefills_per_chunk:.2f} + {decoding.target_passes_per_chunk:.0f}",
                level_cell(decoding.acceptance_per_level),
                ABSENT if deviations is None else "{:.0f} / {:.0f}".format(*percentiles(deviations, (50, 99))),
            ]
        )
    header = ["decoder", "success [Wilson 95 %]", f"against `{names[0]}`", f"against `{names[1]}`"]
    header += [
        "target prefills + later passes per chunk",
        "accepted per level",
        "draft's deviation from the target, mm",
    ]
    return markdown(header, rows)


def against_cell(pair: PairedDifference) -> str:
    """The difference, its p, and where it is known of tasks what it may be of others like them."""
    tasks = pair.clustered_interval()
    unit = "" if tasks is None else f"; tasks drawn anew {interval_cell(tasks)}"
    return f"{difference_cell(pair)}, p {pair.p_value:.2g}{unit}"


def task_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "## By task\n\n" + task_table(names, runs)


def task_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    labels = task_labels(runs)
    rows = []
    for key, label in sorted(labels.items()):
        cells = []
        for run in runs:
            mine = [episode.success for episode in run.episodes if episode.task == key]
            cells.append(f"{sum(mine)}/{len(mine)}")
        rows.append([label, *cells])
    return markdown(["task", *(f"`{name}`" for name in names)], rows)


def timed_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    cores = runs[0].record.versions.get("cpu_cores", "?")
    return (
        f"## Milliseconds per chunk in closed loop, {runs[0].record.versions.get('cpu', '?')}, {cores} cores\n\n"
        "One simulator at a time, which rests while the policy decides: milliseconds from the observation to the "
        "chunk. The mean is what counts for `rsd-skip`. Behind: what `draft-first` leaves to do while the chunk is "
        "executed.\n\n"
    ) + timed_table(names, runs)


def timed_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    rows = []
    means = []
    for name, run in zip(names, runs, strict=True):
        totals = totals_of(run)
        means.append(float(np.mean(totals)))
        p50, p95 = percentiles(totals)
        skipped = 1 - summarize_decoding(run.episodes).prefills_per_chunk
        cells = [f"{means[-1]:.1f}", f"{p50:.1f} / {p95:.1f} / {max(totals):.1f}", f"{means[0] / means[-1]:.2f}x"]
        behind = [value for episode in run.episodes for value in episode.latency_ms.get(VERIFY_PENDING, [])]
        cells.append(f"{np.mean(behind):.1f}" if behind else ABSENT)
        rows.append([f"`{name}`", *cells, f"{skipped:.1%}", success_cell(success_rate(run.episodes)), str(len(totals))])
    header = ["decoder", "mean", "p50 / p95 / max", f"`{names[0]}` / mean", "behind, mean", "without the target"]
    return markdown([*header, "success", "chunks"], rows)


def totals_of(run: Run) -> list[float]:
    """Milliseconds from the observation to the chunk, of every chunk."""
    return [value for episode in run.episodes for value in episode.latency_ms["total"]]


def risk_section(names: Sequence[str], runs: Sequence[Run], epsilon_mm: float, delta: float) -> str:
    """epsilon_mm: of runs with a threshold of their own; the upper bounds hold with confidence 1 - delta."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        calibration = run.record.policy.get("skip_calibration")
        if run.episodes[0].decode != "rsd-skip":
            continue
        epsilon = calibration["epsilon_mm"] if calibration else epsilon_mm
        found = risk_of(run, epsilon, delta)
        scores, true = (np.log1p(np.concatenate(columns(run, stat))) for stat in (SCORE, "deviation_mm"))
        correlation = np.corrcoef(scores, true)
        threshold = calibration["threshold"] if calibration else run.record.config["skip_threshold_mm"]
        rows.append(
            [
                f"`{name}`",
                f"{threshold:.1f} mm",
                f"{epsilon:g} mm",
                f"<= {calibration['alpha']:g} at {1 - calibration['delta']:g}" if calibration else "nothing",
                f"{found.share:.3f} (<= {found.share_upper:.3f})",
                f"{found.beyond} / {'?' if found.gripper_only is None else found.gripper_only} / {found.executed}",
                f"{found.executed / found.chunks:.1%}",
                f"{correlation[0, 1]:.2f}",
            ]
        )
    header = ["decoder", "threshold", "epsilon", "promised risk", "realised risk (upper bound)"]
    header += ["executed drafts: beyond epsilon / only the gripper differs / all", "chunks without the target"]
    header += ["corr(expected, true deviation)"]
    return (
        "## Skipping: the promise and what became of it\n\nRisk: mean share of an episode's executed draft chunks that "
        "deviate by more than epsilon, or whose gripper differs (?: not "
        "recorded, and in no risk). The target ran beside every skipped chunk, untimed.\n\n"
    ) + markdown(header, rows)


def risk_of(run: Run, epsilon_mm: float, delta: float) -> RealisedRisk:
    """What an audited run of `rsd-skip` says of the risk."""
    skipped = [flags.astype(bool) for flags in columns(run, "skipped")]
    recorded = all("gripper_differs" in episode.chunk_stats for episode in run.episodes)  # not by the first audits
    differs = [column > 0 for column in columns(run, "gripper_differs")] if recorded else None
    return realised_risk(skipped, columns(run, "deviation_mm"), differs, epsilon_mm=epsilon_mm, delta=delta)


def deviation_section(record: DeviationRecord, path: Path) -> str:
    rows = [
        [
            f"`{row.decode}`",
            row.acceptance if DECODERS[row.decode].drafts else ABSENT,
            row.fine if DECODERS[row.decode].drafts else ABSENT,
            *(" / ".join(f"{x:.2f}" for x in row.from_ar[unit]) for unit in UNITS),
            f"{row.gripper_differs_from_ar:.1%}",
            " / ".join(f"{x:.2f}" for x in row.from_expert["mm"]),
        ]
        for row in record.rows
    ]
    header = ["decoder", "acceptance", "fine", "from `ar`, normalised", "from `ar`, mm", "from `ar`, degrees"]
    header += ["gripper differs from `ar`", "from the expert, mm"]
    return (
        f"## Deviation of a step's command, p50 / p99 / max\n\n`{path}`: {record.frames} frames of {record.episodes} "
        "held-out episodes. Normalised: largest of the six motion numbers. Decoders with a visual drafter remember the "
        "target's run one chunk earlier.\n\n"
    ) + markdown(header, rows)


def latency_record(path: Path) -> LatencyRecord:
    """Raw latencies of `rsd bench latency`."""
    return LatencyRecord(**read_json(path))


def latency_section(record: LatencyRecord, path: Path) -> str:
    machine = record.machine
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['torch_threads']} threads"
    base = percentiles(record.milliseconds["ar"]["total"])[0]
    bar = percentiles(record.milliseconds["l1"]["total"])[0]
    ideals = record.ideal_ms()
    rows = []
    for name, stages in record.milliseconds.items():
        p50, p95 = percentiles(stages["total"])
        parts = ", ".join(f"{s} {percentiles(v)[0]:.1f}" for s, v in stages.items() if s != "total")
        if name not in DECODERS:
            continue  # of a decoder that is no more
        share = f"{ideals[name]:.2f} ({ideals[name] / p50:.0%})" if name in ideals else ABSENT
        rows.append([f"`{name}`", f"{p50:.1f} / {p95:.1f}", f"{base / p50:.2f}x", f"{p50 / bar:.2f}", share, parts])
    count = len(record.milliseconds["ar"]["total"])
    engine = machine.get("engine", CUDA_GRAPHS if machine["device"] != "cpu" else EAGER)  # not named by older records
    graphs = {
        CUDA_GRAPHS: ", every decoder replayed from CUDA graphs",
        COMPILED: ", every decoder compiled and replayed from CUDA graphs",
        ONNX: ", every decoder as ONNX graphs",
        EAGER: ", every decoder by PyTorch operation by operation",
    }
    tasks, judged = record.config.get("num_tasks", 10), rule_phrase(record.config)
    header = ["decoder", "p50 / p95 ms", "speed-up over `ar`", "time relative to `l1`"]
    header += ["roofline ms (share reached)", "stages, p50 ms"]
    return (
        f"## Latency per chunk, {where}{judged}\n\n`{path}`: {count} predictions each on two observations of each of "
        f"{tasks} tasks, decoders taking turns{graphs[engine]}; torch {record.versions.get('torch', '?')}.\n\n"
    ) + markdown(header, rows)


def rule_phrase(config: dict[str, Any]) -> str:
    """The acceptance rule that a measurement was asked for; older records know none."""
    rule = asked_rule(config.get("acceptance", DEFAULT))
    return f", acceptance `{rule}`" if rule else ""


def columns(run: Run, name: str) -> list[NDArray[np.float64]]:
    return [chunk_stat(episode, name) for episode in run.episodes]


def deviation_of(run: Run) -> list[float] | None:
    if "deviation_mm" not in run.episodes[0].chunk_stats:
        return None
    return [float(value) for column in columns(run, "deviation_mm") for value in column]
