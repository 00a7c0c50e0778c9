"""The tables of several permuted suites and seeds in docs/results.md, from raw results.

    python -m studies.permuted_suites_page [--results results/permuted_suites]

A folder of the results is a training of one seed, which holds a folder for each decoder. The first table is of both
seeds, the others of one each. Pairs are states that a decoder shares with the target alone under the same seed, and a
task is one cluster whatever the seed; what is kept is counted on the states that the drafter alone has, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import paired_difference
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import ABSENT, markdown
from rsd.reporting.archive import located
from rsd.reporting.tables import load_run
from studies.permuted_page import ROWS, against_cell, passes, success_cell

SEEDS = ("A", "B")
SUITES = tuple(f"libero_{name}_permuted" for name in ("object", "spatial", "goal"))
HEADER = ["", "object", "spatial", "goal", "together [Wilson 95 %]", "against the target alone", "kept", "passes"]

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
            if located(folder / seed / name).is_dir():
                episodes = load_run(folder / seed / name).episodes
                found.setdefault(name, {}).update({(seed, e.suite, e.task_id, e.init_state): e for e in episodes})
    return found


def solved(episodes: Episodes, keys: Iterable[Key]) -> int:
    return sum(episodes[key].success for key in keys)


def cell(run: Episodes, suite: str, skipping: bool) -> str:
    """Solved of how many in a suite; where the target may be skipped, at which share of its passes."""
    some = {key: e for key, e in run.items() if key[1] == suite}
    return f"{solved(some, some)}/{len(some)}" + (f" at {passes(some.values()):.2f}" if skipping else "")


def row(name: str, run: Episodes, target: Episodes, drafter: Episodes) -> list[str]:
    rate, skipping = success_rate(list(run.values())), name.startswith("skip")
    against = kept = ABSENT
    if run is not target:
        first, second = ({key: e.success for key, e in episodes.items()} for episodes in (target, run))
        against = against_cell(paired_difference(first, second, cluster=lambda key: key[1:3]))
    if common := run.keys() & drafter.keys() & target.keys():
        floor = solved(drafter, common)
        kept = f"{(solved(run, common) - floor) / (solved(target, common) - floor):.2f}"
    suites = [cell(run, suite, skipping) for suite in SUITES]
    return [ROWS[name], *suites, success_cell(rate), against, kept, f"{passes(run.values()):.2f}"]


def table(folder: Path, seeds: tuple[str, ...] = SEEDS) -> str:
    runs = load(folder, seeds)
    return markdown(HEADER, [row(name, run, runs["l1"], runs.get("alone", {})) for name, run in runs.items()])


if __name__ == "__main__":
    results = tyro.cli(PermutedSuitesPageConfig).results
    print(table(results))
    for seed in SEEDS:
        print(f"seed {seed}", table(results, (seed,)), sep="\n\n")
