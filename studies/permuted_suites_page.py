"""The tables of several suites and seeds in docs/results.md, from raw results.

    python -m studies.permuted_suites_page [--results results/permuted_suites] [--parts A B] [--suites libero_10 ...]

A part is a folder of the results: a policy (of one seed) on some states, with one for each decoder. The first table
is of all parts asked for, the others of one each. Pairs are states that a decoder shares with the target alone in the
same part, and a task is one cluster whatever the part; what is kept is counted on the states that the drafter alone has
too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsd.evaluation.results import EPISODES_FILE, EpisodeResult
from rsd.evaluation.statistics import paired_difference
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import ABSENT, markdown
from rsd.reporting.archive import located
from rsd.reporting.tables import load_run
from studies.permuted_page import ROWS, against_cell, passes, success_cell

SUITES = tuple(f"libero_{name}_permuted" for name in ("object", "spatial", "goal"))
TOGETHER = ["together [Wilson 95 %]", "against the target alone", "kept", "passes"]

Key = tuple[str, str, int, int]  # part, suite, task, initial state
Episodes = dict[Key, EpisodeResult]


@dataclass(frozen=True)
class PermutedSuitesPageConfig:
    """Print the tables."""

    results: Path = Path("results/permuted_suites")
    """Folder of the parts, or what its archive was made of."""
    parts: tuple[str, ...] = ()
    """Which of them; empty: all."""
    suites: tuple[str, ...] = SUITES
    """The columns."""
    against: str = ""
    """A part of another policy: its target alone against that of --parts, on the states that both have."""


def parts_of(folder: Path) -> tuple[str, ...]:
    """Folders that hold a run of the target alone."""
    return tuple(sorted(path.name for path in located(folder).iterdir() if (path / "l1").is_dir()))


def load(folder: Path, parts: tuple[str, ...]) -> dict[str, Episodes]:
    """By decoder the episodes of all parts that have it."""
    found: dict[str, Episodes] = {}
    for part in parts:
        for name in ROWS:
            for run in runs_in(folder / part / name):
                keyed = {(part, e.suite, e.task_id, e.init_state): e for e in load_run(run).episodes}
                found.setdefault(name, {}).update(keyed)
    return {name: found[name] for name in ROWS if name in found}


def runs_in(folder: Path) -> list[Path]:
    """The folder, where it is a run, or those in it."""
    there = located(folder)
    if not there.is_dir() or (there / EPISODES_FILE).is_file():
        return [folder] if there.is_dir() else []
    return [folder / path.name for path in sorted(there.iterdir()) if (path / EPISODES_FILE).is_file()]


def solved(episodes: Episodes, keys: Iterable[Key]) -> int:
    return sum(episodes[key].success for key in keys)


def cell(run: Episodes, suite: str, skipping: bool) -> str:
    """Solved of how many in a suite; where the target may be skipped, at which share of its passes."""
    some = {key: e for key, e in run.items() if key[1] == suite}
    if not some:
        return ABSENT
    return f"{solved(some, some)}/{len(some)}" + (f" at {passes(some.values()):.2f}" if skipping else "")


def compared(base: Episodes, run: Episodes) -> str:
    """The second against the first, on the states that both have, a task being one cluster."""
    first, second = ({key: e.success for key, e in episodes.items()} for episodes in (base, run))
    return against_cell(paired_difference(first, second, cluster=lambda key: key[1:3]))


def row(name: str, run: Episodes, target: Episodes, drafter: Episodes, suites: tuple[str, ...]) -> list[str]:
    rate, skipping = success_rate(list(run.values())), name.startswith("skip")
    against = kept = ABSENT
    if run is not target:
        against = compared(target, run)
    if common := run.keys() & drafter.keys() & target.keys():
        floor = solved(drafter, common)
        kept = f"{(solved(run, common) - floor) / (solved(target, common) - floor):.2f}"
    columns = [cell(run, suite, skipping) for suite in suites]
    return [ROWS[name], *columns, success_cell(rate), against, kept, f"{passes(run.values()):.2f}"]


def table(folder: Path, parts: tuple[str, ...] = (), suites: tuple[str, ...] = SUITES) -> str:
    """Of these parts together; without any, of all. suites: its columns."""
    runs = load(folder, parts or parts_of(folder))
    header = ["", *(suite.removeprefix("libero_").removesuffix("_permuted") for suite in suites), *TOGETHER]
    target, drafter = runs["l1"], runs.get("alone", {})
    return markdown(header, [row(name, run, target, drafter, suites) for name, run in runs.items()])


def against(folder: Path, other: str, parts: tuple[str, ...]) -> str:
    """The target alone of `parts` against that of the part `other`, on the states that both have."""
    before, after = ({key[1:]: e.success for key, e in load(folder, of)["l1"].items()} for of in ((other,), parts))
    return against_cell(paired_difference(before, after, cluster=lambda key: key[:2]))


def main(config: PermutedSuitesPageConfig) -> None:
    print(table(config.results, config.parts, config.suites))
    for part in config.parts or parts_of(config.results):
        print(f"part {part}", table(config.results, (part,), config.suites), sep="\n\n")
    if config.against:
        parts = config.parts or parts_of(config.results)
        print(f"the target alone against that of {config.against}: {against(config.results, config.against, parts)}")


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("permuted_suites_page")
