"""`rsd compare`, `rsd report`, `rsd merge`: what becomes of the runs that `rsd eval` wrote."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from rsd.cli.parsing import UsageError
from rsd.output import terminal


@dataclass(frozen=True)
class Runs:
    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Directories written by `rsd eval`, or folders of them; the first run is the baseline."""

    def __post_init__(self) -> None:
        if not self.directories:
            raise UsageError("expected at least one results directory")


@dataclass(frozen=True)
class CompareArguments(Runs):
    """Runs side by side; each is held against the first, on the initial states both have."""

    markdown: bool = False
    """Print the table as Markdown."""


def compare(options: CompareArguments) -> None:
    from rsd.reporting.tables import load_runs, markdown_table, print_runs

    runs = load_runs(options.directories)
    if options.markdown:
        print(markdown_table(runs), end="")
    else:
        print_runs(terminal(), runs)


@dataclass(frozen=True)
class ReportArguments(Runs):
    """Write one self-contained HTML page about runs of `rsd eval`, and its figures as SVG and PDF."""

    output: Path | None = None
    """The page; default report.html in the run's directory, or in the one that all runs share."""
    videos: Literal["embed", "link", "none"] = "embed"
    """Videos inside the page, linked relative to it, or left out."""
    overwrite: bool = False
    """Replace a page or a figure that `rsd report` has not written."""


def report(options: ReportArguments) -> None:
    from rsd.reporting.html_report import write_report
    from rsd.reporting.strips import corrections
    from rsd.reporting.tables import load_runs

    print(f"report: {write_report(options.directories, options.output, options.videos, options.overwrite)}")
    for run in load_runs(options.directories):
        if said := corrections(run):
            print(f"{run.name}: {said}")


@dataclass(frozen=True)
class MergeArguments:
    """Bring shards (`rsd eval --shard i/n`, `rsd submit`) together; may be called again as they go on."""

    output: tyro.conf.Positional[Path]
    """Results directory of the whole run."""
    shards: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The shards' directories; default all shard-i-of-n in the output."""


def merge(options: MergeArguments) -> int:
    from rsd.evaluation.merging import merge_shards, missing_parts
    from rsd.reporting.tables import load_runs, print_runs

    summary = merge_shards(options.output, options.shards)
    if summary.success.n:
        print_runs(terminal(), load_runs([options.output]))
    print(f"results: {options.output}")
    if missing := missing_parts(options.output):
        print(f"warning: {missing}; run them and merge again", file=sys.stderr)
    return 1 if summary.errors or missing else 0
