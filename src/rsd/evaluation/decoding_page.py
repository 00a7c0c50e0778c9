"""`docs/results/decoding-18M.md` from committed raw results: an earlier policy's, of 18 M; the shipped one's page is
made by `shipped_page`. Every decoder's success, passes, acceptance, risk, latency.

    python -m rsd.evaluation.decoding_page

Nothing on the page but its prose is typed in by hand; the prose names no number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from rsd.decoding.calibration import RealisedRisk, realised_risk
from rsd.decoding.strategies import DECODERS
from rsd.evaluation.calibrate import SCORE, chunk_stat, deviations
from rsd.evaluation.config import DEFAULT, asked_rule
from rsd.evaluation.deviation import UNITS, DeviationRecord
from rsd.evaluation.latency import LatencyRecord
from rsd.evaluation.report import Run, difference_cell, level_cell, load_run, success_cell, task_labels
from rsd.evaluation.results import write_atomically
from rsd.evaluation.statistics import PairedDifference, paired_difference, percentiles
from rsd.evaluation.summary import success_rate, summarize_decoding
from rsd.policy import FOLLOW_UP
from rsd.types import COMPILED, CUDA_GRAPHS, EAGER, ONNX

ABSENT = "-"
EPSILON_MM, DELTA = 50.0, 0.1
PROSE = """\
# Decoders compared in closed loop: an earlier policy of 18 M

Made by `python -m rsd.evaluation.decoding_page` from the raw results named below; run it again after replacing them.
This policy shipped before the one of [decoding.md](decoding.md), and does not any more.

`ar` decodes level by level and is the baseline; `l1` regresses the chunk in one pass (the OpenVLA-OFT way) and is the
bar. `rsd-fused` lets a light draft propose the coarse levels before the main model looks; they ride in the main's
prefill, which corrects them and adds the fine levels: one pass. `rsd-skip` executes the draft's chunk without the main
where the draft expects to stay close to it. `rsd-ahead` executes the draft's chunk always, at once; the main looks at
the same observation while the robot moves, judges the draft's tokens and leaves what it saw to the draft's next chunk.
`light-alone` is the light draft as a policy of its own, without the main and without a memory.
"""


SHARED = """\
All runs of this table are of the files that shipped then, each with the policy in one process that serves all of its
simulators in batches of 13; the GPUs trained other policies meanwhile, so nothing here is about time. `ar`, `l1`,
`rsd-fused` and `rsd-skip` ran on one host, the others on another one of the same kind, later. `rsd-skip` is that of
before: the draft's memory of the main never expired, and the main looked at every episode's start and after two chunks
at the latest. {again}

The last three rows ran on a third host, in batches of 16: verified by one block instead of one a level (`--acceptance
residual`), `rsd-skip` by today's rule, calibrated with it (`calibration-residual` in the same folder; no threshold
failed there, so it leaves the main idle but at gripper switches and after six chunks). One block saves time on a CPU.
Against the same decoder by `margin`: {twins}. So `margin` stays the default, and the calibration that shipped was one
with `margin`, on the CPU (below).
"""
ROUNDED = """\
## Before the light draft was rounded

The same initial states on another host, every simulator with a policy of its own, and with the light draft's matrices
as they were before they were rounded to int8; main and first draft are the same bits. What
differs between these rows and those above is rounding, batching and host together: how much a success rate of so many
episodes may move without any change of method. `rsd-skip` allowed 4 chunks in a row without the main here, and its
calibration tested its rollouts task after task, where easy tasks vouch for the others: in a random order, as
calibrations are made now, it promises less.

"""
ON_CPU = """\
## The same files on a CPU

Runs on two cores with OSMesa: another renderer than the GPU's, so that these rows and those above differ by more than
the machine. `l1`, `rsd-fused-residual` (`--acceptance residual`: verified by one block instead of one a level) and
`rsd-skip` ran as ONNX graphs, the others as PyTorch before there were any; {repeats}.
`rsd-ahead` ran before its main's pass was put off: its chunks were decided as they are now, but the main's
pass was done before they were executed, and its acceptance was not kept. `rsd-skip-max2` is the rule of before.

"""
CAVEAT = """\
All by the rule of before, in which the draft's memory of the main never expired: `rsd-skip-max4` allowed 4 chunks in
a row without the main and lost the drawer task, on its states 0 to 19, after which 2 became the limit;
`rsd-skip-drawer` in the same folder is its states 20 to 49.
"""


TWIN = "-residual"
FORMER = {"light": "rsd-ahead"}  # names in older raw results of decoders with the same chunks


@dataclass(frozen=True)
class PageConfig:
    """Write the page that compares the decoders."""

    runs: Path = Path("results/libero_spatial/h200")
    """Folder with one results directory per run; the first two of --order are compared against."""
    order: tuple[str, ...] = (
        *("ar", "l1", "parallel", "rsd", "rsd-fused", "rsd-skip", "rsd-ahead", "light-alone"),
        *("rsd-residual", "rsd-fused-residual", "rsd-skip-residual"),
    )
    """Directories in it, in the order of the rows."""
    twins: tuple[str, ...] = ("rsd-residual", "rsd-fused-residual")
    """Of these, each is compared with the run that is called the same but for its end."""
    again: str = "l1-again"
    """A second run of the second of them, on the other host."""
    earlier_runs: Path = Path("results/libero_spatial/h200-fp16")
    """The same for the weights before rounding."""
    earlier_order: tuple[str, ...] = ("ar", "l1", "rsd-fused", "rsd-skip", "rsd-skip-200mm")
    """Directories in it."""
    cpu_runs: Path = Path("results/libero_spatial/cpu")
    """The same for a machine without a GPU."""
    cpu_order: tuple[str, ...] = ("l1", "rsd-fused", "rsd-skip", "rsd-skip-max4")
    """Directories in it."""
    cpu_shipped: tuple[str, ...] = (
        *("l1-500", "rsd-fused-500", "rsd-fused-residual-500", "rsd-skip-500", "rsd-ahead-500", "light-alone-500"),
        "rsd-skip-max2-500",
    )
    """Directories in it of runs on the initial states of the runs on the GPU; the first two are compared against."""
    repeated: tuple[str, ...] = ("rsd-fused", "rsd-ahead")
    """Of these, NAME-onnx in it repeats some of NAME-500 as ONNX graphs."""
    timed: tuple[str, ...] = ("timed-l1", "timed-rsd-fused", "timed-rsd-skip", "timed-rsd-ahead")
    """Directories in it of runs of one worker, for times in closed loop."""
    latencies: tuple[Path, ...] = (
        Path("results/libero_spatial/h200/latency.json"),
        Path("results/libero_spatial/h200/latency-residual.json"),
        Path("results/libero_spatial/cpu/latency.json"),
        Path("results/libero_spatial/cpu/latency-residual.json"),
        Path("results/libero_spatial/cpu/latency-eager.json"),
    )
    """Raw latencies of `rsd bench latency`."""
    deviation: Path = Path("results/libero_spatial/deviation.json")
    """Raw deviations of `rsd bench deviation`."""
    epsilon_mm: float = EPSILON_MM
    """What counts as a deviation in runs with a threshold of their own, which promise nothing."""
    delta: float = DELTA
    """The upper bounds of the realised risks hold with confidence 1 - delta."""
    output: Path = Path("docs/results/decoding-18M.md")
    """The page."""


def main(config: PageConfig) -> None:
    runs = [load_run(config.runs / name) for name in config.order]
    records = [latency_record(path) for path in config.latencies]
    cpu = [load_run(config.cpu_runs / name) for name in config.cpu_order]
    timed = [load_run(config.cpu_runs / name) for name in config.timed]
    earlier = [load_run(config.earlier_runs / name) for name in config.earlier_order]
    shipped = [load_run(config.cpu_runs / name) for name in config.cpu_shipped]
    on_cpu = [f"{name}, CPU" for name in config.cpu_shipped]
    twins = [(load_run(config.runs / name.removesuffix(TWIN)), load_run(config.runs / name)) for name in config.twins]
    shared = SHARED.format(
        again=again_sentence(runs[1], load_run(config.runs / config.again)),
        twins="; ".join(
            f"`{twin.name}` {against_cell(paired_difference(one.successes, twin.successes))}" for one, twin in twins
        ),
    )
    parts = [PROSE, success_section(config.order, runs), shared, task_section(config.order, runs)]
    repeats = ", ".join(repeat_phrase(config.cpu_runs, name) for name in config.repeated)
    parts += [ON_CPU.format(repeats=repeats) + success_table(on_cpu, shipped), task_table(on_cpu, shipped)]
    parts += [ROUNDED + success_table(config.earlier_order, earlier)]
    parts += [success_section(config.cpu_order, cpu), CAVEAT]
    named = [*config.order, *on_cpu, *(f"{name}, before rounding" for name in config.earlier_order)]
    named += [f"{name}, CPU" for name in config.cpu_order]
    parts += [risk_section(named, [*runs, *shipped, *earlier, *cpu], config.epsilon_mm, config.delta)]
    parts += [deviation_section(DeviationRecord.from_json(json.loads(config.deviation.read_text())), config.deviation)]
    parts += [timed_section(config.timed, timed)]
    parts += [latency_section(record, path) for record, path in zip(records, config.latencies, strict=True)]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, "\n".join(parts))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def success_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    versions = runs[0].record.versions
    made = ", ".join(f"{name} {versions[name]}" for name in ("mujoco", "robosuite", "libero", "gl_backend", "torch"))
    device, counts = versions.get("device", "?"), " or ".join(map(str, sorted({len(run.episodes) for run in runs})))
    return (
        f"## Success, policy on {device}\n\n{counts} episodes each on the benchmark's fixed initial states, the "
        f"same for all where both have them (exact McNemar test). {made}. Deviation: commanded "
        f"fingertip displacement over a chunk, p50 / p99 (the arm follows about a quarter of it).\n\n"
    ) + success_table(names, runs)


def success_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Success, against the first two, passes, acceptance, deviation."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        decoding, deviations = summarize_decoding(run.episodes), deviation_of(run)
        against = [
            ABSENT if run is other else against_cell(paired_difference(other.successes, run.successes))
            for other in runs[:2]
        ]
        rows.append(
            [
                f"`{name}`",
                success_cell(success_rate(run.episodes)),
                *against,
                f"{decoding.prefills_per_chunk:.2f} + {decoding.main_passes_per_chunk:.0f}",
                level_cell(decoding.acceptance_per_level),
                ABSENT if deviations is None else "{:.0f} / {:.0f}".format(*percentiles(deviations, (50, 99))),
            ]
        )
    header = ["decoder", "success [Wilson 95 %]", f"against `{names[0]}`", f"against `{names[1]}`"]
    header += ["main prefills + later passes per chunk", "accepted per level", "draft's deviation from the main, mm"]
    return table(header, rows)


def again_sentence(run: Run, again: Run) -> str:
    return f"`{run.name}` ran on both: {alike_phrase(run, again)}."


def repeat_phrase(folder: Path, name: str) -> str:
    again, run = (load_run(folder / f"{name}-{which}") for which in ("onnx", "500"))
    return f"`{name}` repeated as graphs: {alike_phrase(again, run)}"


def alike_phrase(run: Run, other: Run) -> str:
    """How many of a run's episodes ended as in another one, which has them all."""
    first, second = ({e.key: (e.success, e.steps) for e in one.episodes} for one in (run, other))
    alike, same = (sum(first[key][:n] == second[key][:n] for key in first) for n in (1, 2))
    return f"{alike} of {len(first)} episodes ended alike, {same} of them at the same step"


def against_cell(pair: PairedDifference) -> str:
    return f"{difference_cell(pair)}, p {pair.p_value:.2g}"


def task_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "## By task\n\n" + task_table(names, runs)


def task_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    labels = task_labels(runs)
    rows = []
    for key, label in sorted(labels.items()):
        cells = []
        for run in runs:
            mine = [episode.success for episode in run.episodes if (episode.suite, episode.task_id) == key]
            cells.append(f"{sum(mine)}/{len(mine)}")
        rows.append([label, *cells])
    return table(["task", *(f"`{name}`" for name in names)], rows)


def timed_section(names: Sequence[str], runs: Sequence[Run]) -> str:
    cores = runs[0].record.versions.get("cpu_cores", "?")
    return (
        f"## Milliseconds per chunk in closed loop, {runs[0].record.versions.get('cpu', '?')}, {cores} cores\n\n"
        "One simulator at a time, which rests while the policy decides: milliseconds from the observation to the "
        "chunk. The mean is what counts for `rsd-skip`. Behind: what `rsd-ahead` leaves to do while the chunk is "
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
        behind = [value for episode in run.episodes for value in episode.latency_ms.get(FOLLOW_UP, [])]
        cells.append(f"{np.mean(behind):.1f}" if behind else ABSENT)
        rows.append([f"`{name}`", *cells, f"{skipped:.1%}", success_cell(success_rate(run.episodes)), str(len(totals))])
    header = ["decoder", "mean", "p50 / p95 / max", f"`{names[0]}` / mean", "behind, mean", "without the main"]
    return table([*header, "success", "chunks"], rows)


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
                f"{found.deviating}/{found.executed}",
                f"{found.executed / found.chunks:.1%}",
                f"{correlation[0, 1]:.2f}",
            ]
        )
    header = ["decoder", "threshold", "epsilon", "promised risk", "realised risk (upper bound)"]
    header += ["deviating of the executed drafts", "chunks without the main", "corr(expected, true deviation)"]
    return (
        "## Skipping: the promise and what became of it\n\nRisk: mean share of an episode's executed draft chunks that "
        "deviate by more than epsilon. The main ran beside every skipped chunk, untimed.\n\n"
    ) + table(header, rows)


def risk_of(run: Run, epsilon_mm: float, delta: float) -> RealisedRisk:
    """What an audited run of `rsd-skip` says of the risk."""
    skipped = [flags.astype(bool) for flags in columns(run, "skipped")]
    return realised_risk(skipped, [deviations(e) for e in run.episodes], epsilon_mm=epsilon_mm, delta=delta)


def deviation_section(record: DeviationRecord, path: Path) -> str:
    rows = [
        [
            f"`{FORMER.get(row.decode, row.decode)}`",
            row.acceptance if row.decode.startswith("rsd") else ABSENT,
            row.fine if row.decode.startswith("rsd") else ABSENT,
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
        "held-out episodes. Normalised: largest of the six motion numbers. Decoders with a light draft remember the "
        "main's run one chunk earlier.\n\n"
    ) + table(header, rows)


def latency_record(path: Path) -> LatencyRecord:
    """Raw latencies of `rsd bench latency`."""
    return LatencyRecord(**json.loads(path.read_text()))


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
        whole = name in ideals and FOLLOW_UP not in stages  # the work counted is that of both
        share = f"{ideals[name]:.2f} ({ideals[name] / p50:.0%})" if whole else ABSENT
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
    ) + table(header, rows)


def rule_phrase(config: dict[str, Any]) -> str:
    """The acceptance rule that a measurement was asked for; older records know none."""
    rule = asked_rule(config.get("acceptance", DEFAULT))
    return f", acceptance `{rule}`" if rule else ""


def columns(run: Run, name: str) -> list[NDArray[np.float64]]:
    return [np.array(chunk_stat(episode, name)) for episode in run.episodes]


def deviation_of(run: Run) -> list[float] | None:
    if "deviation_mm" not in run.episodes[0].chunk_stats:
        return None
    return [float(value) for column in columns(run, "deviation_mm") for value in column]


if __name__ == "__main__":
    main(tyro.cli(PageConfig))
