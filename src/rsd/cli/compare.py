"""`rsd compare`: one table from several results directories, paired on their initial states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from rsd.cli.parsing import UsageError, parse


@dataclass(frozen=True)
class CompareArguments:
    """Runs side by side; each is held against the first, on the initial states both have."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Directories written by `rsd eval`, or folders of them; the first run is the baseline."""
    markdown: bool = False
    """Print the table as Markdown."""


def run(arguments: Sequence[str], prog: str) -> int:
    options = parse(CompareArguments, arguments, prog)
    if not options.directories:
        raise UsageError("expected at least one results directory")
    from rsd.reporting.tables import load_runs, markdown_table, print_runs

    runs = load_runs(options.directories)
    if options.markdown:
        print(markdown_table(runs), end="")
    else:
        print_runs(Console(), runs)
    return 0
