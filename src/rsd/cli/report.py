"""`rsd report`: one HTML page about one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from rsd.cli.parsing import UsageError, parse


@dataclass(frozen=True)
class ReportArguments:
    """Write one self-contained HTML page about runs of `rsd eval`, and its figures as SVG and PDF."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Directories written by `rsd eval`, or folders of them; the first run is the baseline."""
    output: Path | None = None
    """The page; default report.html in the run's directory, or in the one that all runs share."""
    videos: Literal["embed", "link", "none"] = "embed"
    """Videos inside the page, linked relative to it, or left out."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(ReportArguments, arguments, prog)
    if not options.directories:
        raise UsageError("expected at least one results directory")
    from rsd.reporting.html_report import write_report

    print(f"report: {write_report(options.directories, options.output, options.videos)}")
    return 0
