"""README.md's table of results, from raw results.

    python -m studies.readme_table

prints it; with --write it takes the place of the one in README.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import markdown
from rsd.reporting.tables import load_run, success_cell
from rsd.types import RsdError
from studies.page_tables import latency_record, totals_of
from studies.permuted_suites_page import load

HEADER = ["`--decode`", "permuted scenes", "stock suites", "target passes a chunk", "2 CPU cores, ms"]
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """run: of both parts, "" for none; timed: the decoder whose p50 counts, "" for the mean of closed loop. notes:
    behind the cells of success in both, and of the times."""

    name: str
    run: str
    timed: str
    notes: tuple[str, str, str] = ("", "", "")


ROWS = (
    Row("`l1`: the target alone, one pass", "l1", "l1"),
    Row("`drafter-only`", "alone", "draft-first", ("", "", " (a)")),
    Row("`rsd-fused`", "fused_moving", "rsd-fused"),
    Row("`rsd-skip`", "skip_own_5", ""),
    Row("`ar`: the target alone, level by level", "", "ar"),
)


@dataclass(frozen=True)
class ReadmeTableConfig:
    """Print the table, or write it."""

    results: Path = Path("results/averaged_drafter")
    """Folder with the parts `permuted`, `stock` and `cpu`, or what its archive was made of."""
    readme: Path = Path("README.md")
    """Where the table is."""
    write: bool = False
    """Replace it there."""


def passes(run: list[EpisodeResult]) -> str:
    """Of the target, a chunk."""
    chunks = sum(episode.chunks for episode in run)
    return f"{sum(episode.prefills + episode.target_passes for episode in run) / chunks:.2g}"


def readme_table(results: Path) -> str:
    """The table, in Markdown. Raises RsdError where a raw result is not there."""
    times, rows = dict[str, Any](), list[list[str]]()
    for name in ("latency", "latency-draft-first"):
        times |= latency_record(results / f"cpu/{name}.json").milliseconds
    parts = [load(results, (part,)) for part in ("permuted", "stock")]
    for row in ROWS:
        found = [part.get(row.run, {}).values() for part in parts]
        runs = [list(episodes) for episodes in found]
        successes = [success_cell(success_rate(run)) if run else NOT_MEASURED for run in runs]
        shares = "; ".join(dict.fromkeys(passes(run) for run in runs if run)) or "8"  # a prefill and seven levels
        if row.timed:
            time = f"{percentiles(times[row.timed]['total'])[0]:.1f}{row.notes[2]}"
        else:
            time = f"mean {np.mean(totals_of(load_run(results / 'cpu' / row.run))):.1f}{row.notes[2]}"
        rows.append([row.name, successes[0] + row.notes[0], successes[1] + row.notes[1], shares, time])
    return markdown(HEADER, rows)


def replaced(readme: str, new: str) -> str:
    """README's text with another table under the same header; RsdError where there is none."""
    header = re.escape(new.splitlines()[0])
    text, count = re.subn(rf"^{header}\n(\|.*\n)+", lambda _: new, readme, flags=re.MULTILINE)
    if count != 1:
        raise RsdError(f"README: expected one table that begins with {new.splitlines()[0]}, found {count}")
    return text


def main(config: ReadmeTableConfig) -> None:
    made = readme_table(config.results)
    if config.write:
        config.readme.write_text(replaced(config.readme.read_text(), made))
    else:
        print(made, end="")


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("readme_table")
