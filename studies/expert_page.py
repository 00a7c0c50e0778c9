"""The table of docs/expert.md, from what `python -m studies.expert` counted.

    python -m studies.expert_page

prints it; with --write it takes the place of the one in docs/expert.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rsd.evaluation.tables import markdown
from studies.expert import GOOD
from studies.readme_table import replaced

HEADER = ["suite", "tasks at 90 %", "placements", "tasks under 90 %, and why"]


@dataclass(frozen=True)
class ExpertPageConfig:
    """Print the table, or write it."""

    results: Path = Path("results/expert.json")
    """What was counted."""
    page: Path = Path("docs/expert.md")
    """Where the table is."""
    write: bool = False
    """Replace it there."""


def weak_task(number: str, task: dict[str, Any]) -> str:
    """A task under 90 %: number, instruction, successes and the most frequent reason without instance numbers."""
    why = re.sub(r"_\d+(?=_|\b)", "", next(iter(task["failures"])))
    why = "not attempted" if why.startswith("beyond the expert") else why.split(": ")[-1]
    return f"{number} *{task['instruction']}* ({task['solved']}/{task['n']}: {why})"


def expert_table(results: dict[str, Any]) -> str:
    """The table, in Markdown."""
    rows = []
    for suite, row in results["suites"].items():
        weak = [weak_task(n, task) for n, task in row["tasks"].items() if task["solved"] < GOOD * task["n"]]
        good = f"{row['tasks_at_90_percent']} of {row['of_tasks']}"
        rows.append([suite, good, f"{row['solved']}/{row['n']}", "; ".join(weak) or "none"])
    total = results["total"]
    good = f"{total['tasks_at_90_percent']} of {total['of_tasks']}"
    return markdown(HEADER, [*rows, ["all", good, f"{total['solved']}/{total['n']}", ""]])


def main(config: ExpertPageConfig) -> None:
    made = expert_table(json.loads(config.results.read_text()))
    if config.write:
        config.page.write_text(replaced(config.page.read_text(), made))
    else:
        print(made, end="")


if __name__ == "__main__":
    main(tyro.cli(ExpertPageConfig))
