"""The tables of several permuted suites and seeds in docs/results.md, from raw results.

    python -m studies.permuted_suites_page [--results results/permuted_suites]

A folder of the results is a training of one seed, which holds a folder for each decoder. The first table counts each
seed by itself, the second one suite by suite over the seeds; pairs are states that a decoder shares with the target
alone under the same seed, and a task is one cluster whatever the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import paired_difference
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import ABSENT, markdown
from rsd.reporting.tables import load_run
from studies.permuted_page import ROWS

SEEDS = ("A", "B")
HEADER = ["", "", "success [Wilson 95 %]", "like training / held out", "against the target alone", "kept", "passes"]

Key = tuple[str, str, int, int]  # seed, suite, task, initial state
Episodes = dict[Key, EpisodeResult]


@dataclass(frozen=True)
class PermutedSuitesPageConfig:
    """Print the tables."""

    results: Path = Path("results/permuted_suites")
    """Folder of the seeds' folders of runs, or what its archive was made of."""


def load(folder: Path, seeds: tuple[str, ...] = SEEDS) -> dict[str, Episodes]:
    """By decoder the episodes of all seeds that have it."""
    found: dict[str, Episodes] = {}
    for seed in seeds:
        for name in ROWS:
            if (folder / seed / name).is_dir():
                episodes = load_run(folder / seed / name).episodes
                found.setdefault(name, {}).update({(seed, e.suite, e.task_id, e.init_state): e for e in episodes})
    return found


def of(episodes: Episodes, seed: str = "", suite: str = "") -> Episodes:
    return {key: e for key, e in episodes.items() if seed in ("", key[0]) and suite in ("", key[1])}


def solved(episodes: Episodes, keys: Episodes) -> int:
    return sum(episodes[key].success for key in keys)


def row(scope: str, name: str, run: Episodes, target: Episodes, drafter: Episodes) -> list[str]:
    rate = success_rate(list(run.values()))
    share = f"{100 * rate.successes / len(run):.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    halves = [[e.success for e in run.values() if e.init_state % 2 == odd] for odd in (0, 1)]
    seen = " / ".join(f"{100 * sum(half) / len(half):.0f}" for half in halves) + " %"
    passes = sum(e.prefills for e in run.values()) / sum(e.chunks for e in run.values())
    against = kept = ABSENT
    if run is not target:
        first, second = ({key: e.success for key, e in episodes.items()} for episodes in (target, run))
        pair = paired_difference(first, second, cluster=lambda key: key[1:3])
        interval = pair.clustered_interval()
        assert interval is not None
        against = f"{100 * pair.difference:+.1f} (+{pair.only_second} -{pair.only_first}), p {pair.p_value:.2g}"
        against += f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    if common := {key: e for key, e in run.items() if key in drafter and key in target}:
        floor, gap = solved(drafter, common), solved(target, common) - solved(drafter, common)
        kept = f"{(solved(run, common) - floor) / gap:.2f}"
    counted = f"{rate.successes}/{len(run)} = {share}"
    return [scope, ROWS[name], counted, seen, against, kept, f"{passes:.2f}"]


def table(folder: Path, scopes: list[tuple[str, str, str]]) -> str:
    """scopes: (how the table calls it, seed or "", suite or "")."""
    runs, rows = load(folder), []
    for scope, seed, suite in scopes:
        some = {name: chosen for name, run in runs.items() if (chosen := of(run, seed, suite))}
        target, drafter = some["l1"], some.get("alone", {})
        rows += [row(scope, name, run, target, drafter) for name, run in some.items()]
    return markdown(HEADER, rows)


def by_seed(folder: Path) -> str:
    return table(folder, [(f"seed {seed}", seed, "") for seed in SEEDS])


def by_suite(folder: Path) -> str:
    suites = dict.fromkeys(key[1] for key in load(folder)["l1"])
    return table(folder, [(suite, "", suite) for suite in suites] + [("together", "", "")])


if __name__ == "__main__":
    results = tyro.cli(PermutedSuitesPageConfig).results
    print(by_seed(results))
    print(by_suite(results))
