"""`docs/results/suites.md` from committed raw results: one policy on several suites, with and without its main.

    python -m rsd.evaluation.suites_page

Nothing on the page but its prose is typed in by hand; the prose names no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from rsd.evaluation.decoding_page import success_table, table, task_table
from rsd.evaluation.report import Run, load_run, success_cell
from rsd.evaluation.results import write_atomically
from rsd.evaluation.studies_page import training_of
from rsd.evaluation.summary import success_rate

TITLE = """\
# Several suites: what a main is worth

Made by `python -m rsd.evaluation.suites_page` from the raw results in the folder named below.
"""


@dataclass(frozen=True)
class SuitesPageConfig:
    """Write the page about a policy of several suites."""

    results: Path = Path("results/suites")
    """Folder with one results directory per row."""
    order: tuple[str, ...] = ("l1", "light-alone", "light-only", "rsd-fused", "rsd-ahead", "ar")
    """Directories in it, in the order of the rows; the first two are compared against."""
    output: Path = Path("docs/results/suites.md")
    """The page."""


def main(config: SuitesPageConfig) -> None:
    runs = [load_run(config.results / name) for name in config.order]
    suites = list(dict.fromkeys(episode.suite for run in runs for episode in run.episodes))
    parts = [TITLE, training_of(config.results / "checkpoint.json") + "\n", "## All together\n"]
    parts += [success_table(config.order, runs), by_suite(config.order, runs, suites)]
    for suite in suites:
        own = [of_suite(run, suite) for run in runs]
        parts += [f"## {suite}\n", success_table(config.order, own), task_table(config.order, own)]
    write_atomically(config.output, "\n".join(parts))


def of_suite(run: Run, suite: str) -> Run:
    """The run's episodes of one suite."""
    return replace(run, episodes=[episode for episode in run.episodes if episode.suite == suite])


def by_suite(names: Sequence[str], runs: Sequence[Run], suites: Sequence[str]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        rows.append([f"`{name}`", *(success_cell(success_rate(of_suite(run, suite).episodes)) for suite in suites)])
    return table(["decoder", *suites], rows)


if __name__ == "__main__":
    main(tyro.cli(SuitesPageConfig))
