"""The table of docs/expert.md, from what `python -m studies.expert` counted.

    python -m studies.expert_page

prints it; with --write it takes the place of the one in docs/expert.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsd.evaluation.tables import markdown
from studies.expert import GOOD
from studies.readme_table import replaced

HEADER = ["suite", "tasks at 90 %", "placements", "tasks under 90 %"]


@dataclass(frozen=True)
class ExpertPageConfig:
    """Print the table, or write it."""

    results: Path = Path("results/expert.json")
    """What was counted."""
    page: Path = Path("docs/expert.md")
    """Where the table is."""
    write: bool = False
    """Replace it there."""


def weak_tasks(tasks: dict[str, Any]) -> str:
    """Those under 90 %: the ones it does not attempt, then the others with their successes."""
    weak = {number: task for number, task in tasks.items() if task["solved"] < GOOD * task["n"]}
    refused = [n for n, task in weak.items() if next(iter(task["failures"])).startswith("beyond the expert")]
    others = [f"{n} ({task['solved']}/{task['n']})" for n, task in weak.items() if n not in refused]
    return "; ".join([f"not attempted {', '.join(refused)}"] * bool(refused) + [", ".join(others)] * bool(others))


def expert_table(results: dict[str, Any]) -> str:
    """The table, in Markdown."""
    rows = []
    for suite, row in results["suites"].items():
        good = f"{row['tasks_at_90_percent']} of {row['of_tasks']}"
        rows.append([suite, good, f"{row['solved']}/{row['n']}", weak_tasks(row["tasks"]) or "none"])
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
    from studies import command  # which names this module

    command.main("expert_page")
