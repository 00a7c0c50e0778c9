"""One table for one or more runs: quantities down, runs across, all held against the first run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rsd.checks import Count, checked, each_once
from rsd.evaluation.acceptance import acceptance_rows
from rsd.evaluation.bench_config import CalibrateConfig
from rsd.evaluation.config import planned_states
from rsd.evaluation.realtime import Motion
from rsd.evaluation.results import (
    CONFIG_FILE,
    EPISODES_FILE,
    SUMMARY_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    read_run,
    scored,
)
from rsd.evaluation.statistics import PairedDifference, paired_difference
from rsd.evaluation.summary import DecodingSummary, SuccessRate, mean_success_steps, success_rate, summarize_decoding
from rsd.evaluation.tables import ABSENT, markdown, percent, plural, print_table
from rsd.json_files import read_object
from rsd.reporting.archive import located
from rsd.types import RsdError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rsd.decoding.calibration import RealisedRisk

MOTION = {field.name for field in fields(Motion)}  # statistics of chunks that have rows of their own


@dataclass(frozen=True)
class Run:
    """A results directory, read. episodes: those that count; broken: those that ended in an error."""

    name: str
    directory: Path
    record: RunRecord
    episodes: list[EpisodeResult]
    broken: list[EpisodeResult]

    @property
    def successes(self) -> dict[EpisodeKey, bool]:
        return {episode.key: episode.success for episode in self.episodes}

    @property
    def queued(self) -> str:
        """What chunks waited for beside their own computation, so that their latencies are no speed; "" if nothing."""
        config, cores = self.record.config, int(self.record.versions.get("cpu_cores", 0))
        if batch := config.get("batch", 0):
            return f"batch of {batch}"
        asked, threads = str(config.get("num_workers", "1")), config.get("threads", 1)
        workers = int(asked) if asked.isdecimal() else 1 if config.get("control_hz", 0) else cores
        workers = min(workers, len(self.episodes) + len(self.broken) + self.not_run)
        many, policy = plural(workers, "worker"), config.get("policy", "")
        if workers > 1 and str(config.get("device", "cpu")).startswith("cuda"):
            return f"{many} on one GPU"
        if workers > 1 and policy.startswith(("ws://", "wss://")):
            return f"{many}, one server"
        if cores and workers * threads > cores:
            return f"{many} of {plural(threads, 'thread')} on {plural(cores, 'core')}"
        return ""

    @property
    def planned_states(self) -> Sequence[int]:
        """Initial states of every task that the run was to do."""
        return planned_states(self.record.config.get("init_states", "0"), self.record.config["num_trials"])

    @property
    def not_run(self) -> int:
        """Planned episodes that an interrupted run never finished; they may well be the long, failing ones."""
        return max(0, self.record.planned - len(self.episodes) - len(self.broken))


def load_run(directory: Path) -> Run:
    """Read and check a results directory; raises RsdError if it is none or holds no counted episode."""
    folder = located(directory)
    record, by_key = read_run(folder)
    results = list(by_key.values())
    episodes = scored(results)
    if not episodes:
        raise RsdError(f"{directory}: no finished episode; run the `rsd eval` command that made it again")
    check_summary(folder, results)
    how = ", ".join(filter(None, [episodes[0].acceptance, *conditions(record.config)]))
    decode = episodes[0].decode
    broken = [result for result in results if result.is_error]
    return Run(f"{decode} ({how})" if how else decode, directory, record, episodes, broken)


def conditions(config: Mapping[str, Any]) -> Iterator[str]:
    """What a run differs by from one without it, though its initial states are the same."""
    for name in ("temperature", "delay", "motion", "view"):
        if (value := config.get(name)) not in (None, "", "none", 0):
            yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    if config.get("seed") and (config.get("view") or config.get("motion", "none") != "none"):
        yield f"seed {config['seed']}"


def check_summary(directory: Path, results: Sequence[EpisodeResult]) -> None:
    """Raises RsdError where summary.json, made after the episodes, has counted more of them, or others."""
    path = directory / SUMMARY_FILE
    if not path.exists():
        return
    summary = read_object(path, "a results directory")
    success = summary.get("success")
    of_success = success.get("successes") if isinstance(success, dict) else None
    name = f"{path}, which only sums up {EPISODES_FILE} (delete it): episodes, errors, successes"
    counted: list[int] = checked(list[Count], [summary.get("episodes"), summary.get("errors"), of_success], name)
    found = [len(results), sum(e.is_error for e in results), sum(e.success for e in results)]
    if counted[0] > found[0] or (counted[:2] == found[:2] and counted != found):
        held, had = (f"{part[2]} successes of {plural(part[0], 'episode')}" for part in (found, counted))
        remedy = f"`rsd eval --resume {directory}` runs what is missing and counts again"
        raise RsdError(f"{directory}: expected the {had} that {path.name} counted, found {held}; {remedy}")


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """Results directories as they are; a folder of them is all that lie in it, by name."""
    found: list[Path] = []
    for path in checked(list[Path], list(paths) if isinstance(paths, tuple) else paths, "runs"):
        inside = sorted(part.parent for part in path.glob(f"*/{EPISODES_FILE}"))
        if not inside or (path / CONFIG_FILE).exists():
            found.append(path)
        elif any(part.name.startswith("shard-") for part in inside):
            parts = plural(len(inside), "part")
            raise RsdError(f"{path}: holds {parts} of one run; bring them together: rsd merge {path}")
        else:
            found += [run for run in inside if run not in found]  # the baseline may be named before its folder
    each_once("runs", found)
    return found


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """Read several directories, or folders of them; runs of the same decoding are told apart by their directories."""
    directories = run_directories(directories)
    runs = [load_run(directory) for directory in directories]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{directory.name}: {run.name}")
        for run, directory in zip(runs, directories, strict=True)
    ]


def table_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(quantity, one cell a run). Rows that are empty for every run are left out."""
    decodings = [summarize_decoding(run.episodes) for run in runs]
    pairs = [paired(runs[0], run) for run in runs[1:]]
    # only where runs are not of the same states, so that their success rates compare different things
    longer = [max(len(runs[0].episodes), len(run.episodes)) for run in runs[1:]]
    common = [str(p.pairs) if p.pairs < most else ABSENT for p, most in zip(pairs, longer, strict=True)]
    timed = list(zip(runs, decodings, strict=True))
    passes = [f"{d.prefills_per_chunk:.3g} prefill + {d.target_passes_per_chunk:.3g}" for d in decodings]
    rows = [
        ("success", [success_cell(success_rate(run.episodes)) for run in runs]),
        ("paired difference", [ABSENT, *map(difference_cell, pairs)]),
        ("bootstrap 95 %, states drawn anew", [ABSENT, *(interval_cell(pair.interval()) for pair in pairs)]),
        ("bootstrap 95 %, tasks drawn anew", [ABSENT, *(interval_cell(pair.clustered_interval()) for pair in pairs)]),
        ("McNemar p", [ABSENT, *(f"{pair.p_value:.2g} (n = {pair.pairs})" for pair in pairs)]),
        ("verdict on success", [ABSENT, *map(verdict, pairs)]),
        ("episodes in common with the first", [ABSENT, *common]),
        ("latency per chunk, p50", [milliseconds(run, decoding, "p50") for run, decoding in timed]),
        ("latency per chunk, p95", [milliseconds(run, decoding, "p95") for run, decoding in timed]),
        ("speed-up of p50", [ABSENT, *(speedup(timed[0], other) for other in timed[1:])]),
        ("latency not shown, it holds waiting", [run.queued or ABSENT for run in runs]),
        ("target passes per chunk", passes),
        *acceptance_rows(decodings),
        *real_time_rows(runs, decodings),
        *further_rows(decodings),
        *risk_rows(runs),
        ("steps per success", [number(mean_success_steps(run.episodes)) for run in runs]),
        ("chunks decoded", [str(decoding.chunks) for decoding in decodings]),
        ("episodes not run", [str(run.not_run or ABSENT) for run in runs]),
        ("episodes with an error", [str(len(run.broken) or ABSENT) for run in runs]),
    ]
    return [(label, cells) for label, cells in rows if any(cell != ABSENT for cell in cells)]


def print_runs(console: Console, runs: Sequence[Run]) -> None:
    """The table, on a narrow console one run under another."""
    print_table(console, title(runs), ["", *(run.name for run in runs)], [[label, *c] for label, c in table_rows(runs)])


def markdown_table(runs: Sequence[Run]) -> str:
    rows = [[label, *cells] for label, cells in table_rows(runs)]
    return f"{title(runs)}\n\n" + markdown(["", *(run.name for run in runs)], rows)


def title(runs: Sequence[Run]) -> str:
    """Suites and sizes; where the runs differ in them it says so, because then only pairs can be compared."""
    suites = sorted({episode.suite for run in runs for episode in run.episodes})
    sizes = [len(run.episodes) for run in runs]
    tasks = {episode.task for run in runs for episode in run.episodes}
    if len(set(sizes)) == 1:
        episodes = plural(sizes[0], "episode") + (" a run" if len(runs) > 1 else "")
    else:
        episodes = f"{' / '.join(map(str, sizes))} episodes"
    return f"{', '.join(suites)}: {plural(len(tasks), 'task')}, {episodes}"


def success_cell(rate: SuccessRate) -> str:
    found, low, high = (100 * share for share in (rate.successes / rate.n, rate.low, rate.high))
    return f"{rate.successes}/{rate.n} = {found:.1f} % [{low:.1f}, {high:.1f}]"


def difference_cell(pair: PairedDifference) -> str:
    return f"{100 * pair.difference:+.1f} points (+{pair.only_second} -{pair.only_first})"


def paired(first: Run, run: Run) -> PairedDifference:
    """On the initial states that both have, a cluster a task."""
    return paired_difference(first.successes, run.successes, cluster=lambda key: key[:2])


def interval_cell(interval: tuple[float, float] | None) -> str:
    return ABSENT if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}] points"


def verdict(pair: PairedDifference) -> str:
    """What the pairs allow to say, in words: of these tasks, and whether it holds with the tasks as the unit."""
    if not pair.distinguishable:
        return f"not distinguishable at n = {pair.pairs}"
    better, interval = pair.difference > 0, pair.clustered_interval()
    held = interval is not None and (interval[0] > 0 or interval[1] < 0)
    return ("better" if better else "worse") + ("" if held else " on these tasks, open for others")


def further_rows(decodings: Sequence[DecodingSummary]) -> list[tuple[str, list[str]]]:
    """One row for each further statistic that any run's decoder left, whatever its name."""
    names = dict.fromkeys(name for decoding in decodings for name in decoding.chunk_stats if name not in MOTION)
    rows = []
    for name in names:
        label, cell = CHUNK_STATS.get(name, (f"{name.replace('_', ' ')}, mean", lambda value: f"{value:.3g}"))
        found = [decoding.chunk_stats.get(name) for decoding in decodings]
        rows.append((label, [ABSENT if one is None else cell(one["mean"]) for one in found]))
    return rows


def risk_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What `--audit` found: drafts that led away from the target's chunks, and the risk of those that were executed."""
    audits = [audit(run) for run in runs]
    risks, beyond, gripper = [], [], []
    for found in audits:
        risks.append(ABSENT if not found or not found[2] else f"{found[0].share:.3f} (<= {found[0].share_upper:.3f})")
        beyond.append(ABSENT if not found else f"{found[0].beyond:,} of {found[0].executed:,} ({found[1]:g} mm)")
        alone = None if not found else found[0].gripper_only
        gripper.append(ABSENT if alone is None or not found else f"{alone:,} of {found[0].executed:,}")
    confidence = {1 - epsilon_and_delta(run)[1] for run in runs}
    bound = f"{100 * confidence.pop():.0f} %" if len(confidence) == 1 else "its confidence"
    return [
        (f"realised risk (bound at {bound})", risks),
        ("drafts beyond epsilon", beyond),
        ("drafts whose gripper alone differs", gripper),
    ]


def audit(run: Run) -> tuple[RealisedRisk, float, bool] | None:
    """(risk, epsilon in mm, whether the drafts were executed without the target); None if the run was not audited.

    Where no draft was executed so, the counts are of all drafts that were compared with the target's chunk."""
    import numpy as np

    if not any("deviation_mm" in episode.chunk_stats for episode in run.episodes):
        return None
    from rsd.decoding.calibration import realised_risk  # loads torch, which a table without audits need not

    def columns(name: str) -> list[NDArray[np.float64]]:
        """One number a chunk, NaN where it has none."""
        return [np.array(e.chunk_stats.get(name, [None] * e.chunks), dtype=np.float64) for e in run.episodes]

    skipped, apart = [column > 0 for column in columns("skipped")], columns("deviation_mm")
    recorded = all("gripper_differs" in episode.chunk_stats for episode in run.episodes)  # not by the first audits
    differs = [column > 0 for column in columns("gripper_differs")] if recorded else None
    known = [np.isfinite(values) for values in apart]
    compared = [a & b for a, b in zip(skipped, known, strict=True)]
    executed = any(flags.any() for flags in compared)
    epsilon, delta = epsilon_and_delta(run)
    found = realised_risk(compared if executed else known, apart, differs, epsilon_mm=epsilon, delta=delta)
    return found, epsilon, executed


def epsilon_and_delta(run: Run) -> tuple[float, float]:
    """Of the drafter or the calibration that the run was made with, else the default ones of `rsd calibrate`."""
    used = run.record.policy.get("drafter_gate") or run.record.policy.get("skip_calibration") or {}
    return used.get("epsilon_mm", CalibrateConfig.epsilon_mm), used.get("delta") or CalibrateConfig.delta


def real_time_rows(runs: Sequence[Run], decodings: Sequence[DecodingSummary]) -> list[tuple[str, list[str]]]:
    """What `--control-hz` measured: how long the robot stands still between two chunks, and how well it kept time."""
    paced = [run.record.config.get("control_hz", 0) > 0 for run in runs]
    stats = [decoding.chunk_stats for decoding in decodings]
    # only decoders that have a pending verification can wait for it
    verifications = [d.latency_ms.get("verify-pending") if on else None for d, on in zip(decodings, paced, strict=True)]
    shares = [found.get("waited") if ran else None for found, ran in zip(stats, verifications, strict=True)]
    waited = [percent(found["mean"] if found else None) for found in shares]
    return [
        ("standstill between chunks, p50 / p95", [range_cell(found.get("pause_ms")) for found in stats]),
        ("the same without drawing", [range_cell(found.get("pause_without_drawing_ms")) for found in stats]),
        ("pending verification while the robot moves, p50 / p95", [range_cell(found) for found in verifications]),
        ("chunks that waited for the pending verification", waited),
        ("late steps", [late_cell(run.episodes) if on else ABSENT for run, on in zip(runs, paced, strict=True)]),
    ]


def range_cell(summary: dict[str, float] | None) -> str:
    return ABSENT if summary is None else f"{summary['p50']:.1f} / {summary['p95']:.1f} ms"


def late_cell(episodes: Sequence[EpisodeResult]) -> str:
    late = sum(count or 0 for episode in episodes for count in episode.chunk_stats.get("late_steps", []))
    worst = max((ms or 0 for episode in episodes for ms in episode.chunk_stats.get("late_ms", [])), default=0)
    steps = sum(episode.steps for episode in episodes)
    return f"{late:.0f} of {steps}" + (f", by up to {worst:.1f} ms" if late else "")


def milliseconds(run: Run, decoding: DecodingSummary, point: str) -> str:
    total = decoding.latency_ms.get("total")
    return f"{total[point]:.1f} ms" if total and not run.queued else ABSENT


def speedup(first: tuple[Run, DecodingSummary], other: tuple[Run, DecodingSummary]) -> str:
    """How many times as fast; none where either run's latencies hold waiting."""
    totals = [None if run.queued else decoding.latency_ms.get("total") for run, decoding in (first, other)]
    if totals[0] is None or totals[1] is None or not totals[1]["p50"]:
        return ABSENT
    return f"{totals[0]['p50'] / totals[1]['p50']:.2f}x"


def millimetres(value: float) -> str:
    return f"{value:.1f} mm"


# Further statistics of chunks -> what people call the mean, and how it is written.
CHUNK_STATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "skipped": ("chunks without the target", percent),
    "forced": ("chunks that had to ask the target", percent),
    "stood": ("drafts that stood whole, with the gripper", percent),
    "gripper_acceptance": ("drafted gripper accepted", percent),
    "gripper_differs": ("drafts with another gripper", percent),
    "expected_deviation_mm": ("deviation the draft expects, mean", millimetres),
    "deviation_mm": ("deviation of the draft, mean", millimetres),
    "held_steps": ("steps stood still a chunk, mean", lambda steps: f"{steps:.2f}"),
    "tail_steps": ("steps of the answer before a chunk, mean", lambda steps: f"{steps:.2f}"),
    "drafted_steps": ("drafted steps before the target's answer, mean", lambda steps: f"{steps:.2f}"),
    "replaced": ("actions that the target's answer replaced", percent),
    "replaced_mm": ("the two lead apart where it did, mean", millimetres),
    "draft_delay": ("steps until the drafter's chunk was there, mean", lambda steps: f"{steps:.2f}"),
    "answer_delay": ("steps until the target's answer was there, mean", lambda steps: f"{steps:.2f}"),
}


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def task_labels(runs: Sequence[Run]) -> dict[tuple[str, int], str]:
    """(suite, task) -> a short name: its number and what tells its instruction from the suite's others."""
    instructions = {e.task: e.instruction for run in runs for e in run.episodes}
    suites = {suite for suite, _ in instructions}
    labels = {}
    for suite in suites:
        words = {task: text.split() for (name, task), text in instructions.items() if name == suite}
        head, tail = shared(list(words.values())), shared([text[::-1] for text in words.values()])
        for task, text in words.items():
            middle = " ".join(text[head : len(text) - tail]) or " ".join(text)
            prefix = f"{suite} {task}" if len(suites) > 1 else str(task)
            labels[suite, task] = f"{prefix}  {middle}" if len(middle) <= 64 else f"{prefix}  {middle[:62]}…"
    return labels


def shared(texts: Sequence[list[str]]) -> int:
    """How many leading words several texts share; 0 for a single one, which has nothing to be told from."""
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False))
    return len(list(alike)) if len(texts) > 1 else 0
