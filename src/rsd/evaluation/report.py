"""One table for one or more runs: quantities down, runs across, all held against the first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from rsd.evaluation.archive import located
from rsd.evaluation.config import planned_states, planned_tasks
from rsd.evaluation.results import (
    EPISODES_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    read_episodes,
    read_run_record,
    scored,
)
from rsd.evaluation.statistics import PairedDifference, paired_difference
from rsd.evaluation.summary import DecodingSummary, SuccessRate, success_rate, summarize_decoding
from rsd.types import RsdError

ABSENT = "-"
# Statistics of the robot's motion, which have rows of their own (`realtime.Motion`).
MOTION = ("pause_ms", "pause_without_drawing_ms", "waited", "late_steps", "late_ms")


@dataclass(frozen=True)
class Run:
    """A results directory, read. episodes: those that count; broken: those that ended in an error."""

    name: str
    directory: Path
    record: RunRecord
    episodes: list[EpisodeResult]
    broken: list[EpisodeResult]

    @property
    def errors(self) -> int:
        return len(self.broken)

    @property
    def successes(self) -> dict[EpisodeKey, bool]:
        return {episode.key: episode.success for episode in self.episodes}

    @property
    def planned_states(self) -> list[int]:
        """Initial states of every task that the run was to do."""
        return planned_states(self.record.config.get("init_states", 0), self.record.config["num_trials"])

    @property
    def not_run(self) -> int:
        """Planned episodes that an interrupted run never finished; they may well be the long, failing ones."""
        config = self.record.config
        tasks, count = planned_tasks(config["tasks"]), 0
        named = {suite.strip() for suite in config.get("task_suite", "").split(",")}
        for suite in {episode.suite for episode in self.episodes} | named - {""}:
            seen = {episode.task_id for episode in self.episodes if episode.suite == suite}
            count += len(tasks.get(suite, tasks.get("", seen)))
        part, _, parts = (config.get("shard") or "0/1").partition("/")
        planned = len(range(int(part), count * len(self.planned_states), int(parts)))
        return max(0, planned - len(self.episodes) - self.errors)


def load_run(directory: Path) -> Run:
    """Read and check a results directory; raises RsdError if it is none or holds no counted episode."""
    folder = located(directory)
    record = read_run_record(folder)
    results = list(read_episodes(folder / EPISODES_FILE).values())
    episodes = scored(results)
    if not episodes:
        raise RsdError(f"{directory}: no finished episode; run the `rsd eval` command that made it again")
    temperature = record.config.get("temperature", 0.0)
    how = ", ".join(filter(None, [episodes[0].acceptance, f"temperature {temperature:g}" if temperature else ""]))
    decode = episodes[0].decode
    broken = [result for result in results if result.is_error]
    return Run(f"{decode} ({how})" if how else decode, directory, record, episodes, broken)


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """Read several directories; runs of the same decoding are told apart by their directories' names."""
    runs = [load_run(directory) for directory in directories]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{directory.name}: {run.name}")
        for run, directory in zip(runs, directories, strict=True)
    ]


def table_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(quantity, one cell a run). Rows that are empty for every run are left out."""
    decodings = [summarize_decoding(run.episodes) for run in runs]
    pairs = [paired_difference(runs[0].successes, run.successes) for run in runs[1:]]
    common = [common_cell(runs[0], run, pair) for run, pair in zip(runs[1:], pairs, strict=True)]
    rows = [
        ("success", [success_cell(success_rate(run.episodes)) for run in runs]),
        ("paired difference", [ABSENT, *map(difference_cell, pairs)]),
        ("bootstrap 95 % interval", [ABSENT, *map(interval_cell, pairs)]),
        ("McNemar p", [ABSENT, *(f"{pair.p_value:.2g} (n = {pair.pairs})" for pair in pairs)]),
        ("verdict on success", [ABSENT, *map(verdict, pairs)]),
        ("episodes in common with the first", [ABSENT, *common]),
        ("latency per chunk, p50", [milliseconds(decoding, "p50") for decoding in decodings]),
        ("latency per chunk, p95", [milliseconds(decoding, "p95") for decoding in decodings]),
        ("speed-up of p50", [ABSENT, *(speedup(decodings[0], other) for other in decodings[1:])]),
        ("main passes per chunk", [passes_cell(decoding) for decoding in decodings]),
        ("draft tokens accepted", [percent(decoding.acceptance_rate) for decoding in decodings]),
        ("accepted per level", [level_cell(decoding.acceptance_per_level) for decoding in decodings]),
        ("mean acceptance length", [number(decoding.mean_acceptance_length) for decoding in decodings]),
        *real_time_rows(runs, decodings),
        *further_rows(decodings),
        ("steps per success", [number(mean_steps(run.episodes)) for run in runs]),
        ("chunks timed", [str(decoding.chunks) for decoding in decodings]),
        ("episodes not run", [str(run.not_run) if run.not_run else ABSENT for run in runs]),
        ("episodes with an error", [str(run.errors) if run.errors else ABSENT for run in runs]),
    ]
    return [(label, cells) for label, cells in rows if any(cell != ABSENT for cell in cells)]


def rich_table(runs: Sequence[Run]) -> Table:
    table = Table(title=title(runs), title_justify="left", title_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right", style="bold" if run is not runs[0] else "")
    for label, cells in table_rows(runs):
        table.add_row(label, *cells)
    return table


def markdown_table(runs: Sequence[Run]) -> str:
    lines = [
        "| " + " | ".join(["", *(run.name for run in runs)]) + " |",
        "|---|" + "---:|" * len(runs),
        *("| " + " | ".join([label, *cells]) + " |" for label, cells in table_rows(runs)),
    ]
    return f"{title(runs)}\n\n" + "\n".join(lines) + "\n"


def title(runs: Sequence[Run]) -> str:
    """Suites and sizes; where the runs differ in them it says so, because then only pairs can be compared."""
    suites = sorted({episode.suite for run in runs for episode in run.episodes})
    sizes = [len(run.episodes) for run in runs]
    tasks = sorted({(episode.suite, episode.task_id) for run in runs for episode in run.episodes})
    same = len(set(sizes)) == 1
    episodes = f"{sizes[0] if same else ' / '.join(map(str, sizes))} episodes"
    if same and len(runs) > 1:
        episodes += " each"
    return f"{', '.join(suites)}: {len(tasks)} task{'s' if len(tasks) != 1 else ''}, {episodes}"


def success_cell(rate: SuccessRate) -> str:
    return (
        f"{rate.successes}/{rate.n} = {100 * rate.successes / rate.n:.1f} % "
        f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    )


def difference_cell(pair: PairedDifference) -> str:
    return f"{100 * pair.difference:+.1f} points (+{pair.only_second} -{pair.only_first})"


def common_cell(first: Run, run: Run, pair: PairedDifference) -> str:
    """Only where the runs are not of the same states, so that success rates of all of them compare different things."""
    return str(pair.pairs) if pair.pairs < max(len(first.episodes), len(run.episodes)) else ABSENT


def interval_cell(pair: PairedDifference) -> str:
    low, high = pair.interval()
    return f"[{100 * low:+.1f}, {100 * high:+.1f}] points"


def verdict(pair: PairedDifference) -> str:
    """What the pairs allow to say, in words."""
    if not pair.distinguishable:
        return f"not distinguishable at n = {pair.pairs}"
    return "better" if pair.difference > 0 else "worse"


def further_rows(decodings: Sequence[DecodingSummary]) -> list[tuple[str, list[str]]]:
    """One row for each further statistic that any run's decoder left, whatever its name."""
    names = dict.fromkeys(name for decoding in decodings for name in decoding.chunk_stats if name not in MOTION)
    return [(f"{name}, mean", [mean_cell(decoding.chunk_stats.get(name)) for decoding in decodings]) for name in names]


def real_time_rows(runs: Sequence[Run], decodings: Sequence[DecodingSummary]) -> list[tuple[str, list[str]]]:
    """What `--control-hz` measured: how long the robot stands still between two chunks, and how well it kept time."""
    paced = [run.record.config.get("control_hz", 0) > 0 for run in runs]
    stats = [decoding.chunk_stats for decoding in decodings]
    # only decoders that have a follow-up can wait for it
    follow_ups = [d.latency_ms.get("follow-up") if on else None for d, on in zip(decodings, paced, strict=True)]
    waited = [found.get("waited") if ran else None for found, ran in zip(stats, follow_ups, strict=True)]
    return [
        ("standstill between chunks, p50 / p95", [range_cell(found.get("pause_ms")) for found in stats]),
        ("the same without drawing", [range_cell(found.get("pause_without_drawing_ms")) for found in stats]),
        ("follow-up while the robot moves, p50 / p95", [range_cell(found) for found in follow_ups]),
        ("chunks that waited for the follow-up", [percent(found["mean"] if found else None) for found in waited]),
        ("late steps", [late_cell(run.episodes) if on else ABSENT for run, on in zip(runs, paced, strict=True)]),
    ]


def range_cell(summary: dict[str, float] | None) -> str:
    return ABSENT if summary is None else f"{summary['p50']:.1f} / {summary['p95']:.1f} ms"


def late_cell(episodes: Sequence[EpisodeResult]) -> str:
    late = sum(count or 0 for episode in episodes for count in episode.chunk_stats.get("late_steps", []))
    worst = max((ms or 0 for episode in episodes for ms in episode.chunk_stats.get("late_ms", [])), default=0)
    steps = sum(episode.steps for episode in episodes)
    return f"{late:.0f} of {steps}" + (f", by up to {worst:.1f} ms" if late else "")


def mean_cell(summary: dict[str, float] | None) -> str:
    return ABSENT if summary is None else f"{summary['mean']:.3g}"


def milliseconds(decoding: DecodingSummary, point: str) -> str:
    total = decoding.latency_ms.get("total")
    return f"{total[point]:.1f} ms" if total else ABSENT


def speedup(first: DecodingSummary, other: DecodingSummary) -> str:
    totals = [decoding.latency_ms.get("total") for decoding in (first, other)]
    if totals[0] is None or totals[1] is None or not totals[1]["p50"]:
        return ABSENT
    return f"{totals[0]['p50'] / totals[1]['p50']:.2f}x"


def passes_cell(decoding: DecodingSummary) -> str:
    return f"{decoding.prefills_per_chunk:.3g} prefill + {decoding.main_passes_per_chunk:.3g}"


def level_cell(rates: Sequence[float]) -> str:
    return " / ".join(f"{100 * rate:.0f} %" for rate in rates) or ABSENT


def percent(rate: float | None) -> str:
    return ABSENT if rate is None else f"{100 * rate:.1f} %"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def mean_steps(episodes: Sequence[EpisodeResult]) -> float | None:
    steps = [episode.steps for episode in episodes if episode.success]
    return sum(steps) / len(steps) if steps else None


def task_labels(runs: Sequence[Run]) -> dict[tuple[str, int], str]:
    """(suite, task) -> a short name: its number and what tells its instruction from the suite's others."""
    instructions = {(e.suite, e.task_id): e.instruction for run in runs for e in run.episodes}
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
    if len(texts) < 2:
        return 0
    count = 0
    for words in zip(*texts, strict=False):
        if len(set(words)) > 1:
            break
        count += 1
    return count
