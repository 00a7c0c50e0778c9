"""Success against the delay of the target's answers, in docs/results.md, from raw results.

    python -m studies.delay_page [--results results/delayed] [--plot runs/delay.png]

A part is a folder of the results (static or moving scenes) with a folder dD_MODE for each delay of D steps and each
mode. Pairs are states that a mode shares with the one it is held against at the same delay; a task is one cluster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import ABSENT, markdown
from rsd.reporting.archive import located
from rsd.reporting.tables import load_run
from rsd.types import RsdError
from studies.permuted_page import passes, success_cell
from studies.permuted_suites_page import Episodes, cell, compared, runs_in

MODES = {
    "l1": "`l1`, nothing delayed",
    "hold": "`l1`, standing still meanwhile",
    "tail": "`l1`, old tail",
    "corrected": "`l1`, old tail corrected",
    "a2c2": "`l1`, old tail by the A2C2 head",
    "rtc": "`l1`, old tail that it was told (training-time real-time chunking)",
    "alone": "`drafter-only`",
    "draft-first": "`draft-first`",
    "rsd-async-agreement": "`rsd-async` as it was: a draft only after one that stood, no waiting",
    "rsd-async-trust": "`rsd-async`, waiting after a draft that fell, too (not kept)",
    "rsd-async-waits": "`rsd-async` as it was: no step of a draft that switches the gripper",
    "rsd-async-gated": "the same, its target asked as seldom as of `rsd-skip` (not kept)",
    "rsd-async-told": "`rsd-async` as it was, unless the last answer switches, too",
    "rsd-async-until": "`rsd-async`, up to every drafted switch, whatever the last answer",
    "rsd-async-missed": "`rsd-async`, what was waited for taken for missed (not kept)",
    "rsd-async-falls": "the same, waiting after three drafts that fell, too (not kept)",
    "rsd-async": "`rsd-async`",
    "rsd-skip": "`rsd-skip`",
}
UNDELAYED = ("l1", "alone")  # are the same whatever the delay
DELAY = re.compile(r"d(\d+)_(.+)")


@dataclass(frozen=True)
class DelayPageConfig:
    """Print the tables, and draw them."""

    results: Path = Path("results/delayed")
    """Folder of the parts, or what its archive was made of."""
    against: str = "hold"
    """The mode that the others are held against."""
    plot: Path | None = None
    """A file for the figure, .png or .svg."""


def load(folder: Path) -> dict[int, dict[str, Episodes]]:
    """By delay and mode the episodes of a part. Raises RsdError if it has none."""
    found: dict[int, dict[str, Episodes]] = {}
    for path in sorted(located(folder).iterdir()):
        if (match := DELAY.fullmatch(path.name)) and match[2] in MODES:
            episodes = [e for run in runs_in(folder / path.name) for e in load_run(run).episodes]
            if episodes:
                keyed = {("", e.suite, e.task_id, e.init_state): e for e in episodes}
                found.setdefault(int(match[1]), {})[match[2]] = keyed
    if not found:
        raise RsdError(f"{folder}: expected folders such as d8_rsd-skip with runs, found none")
    return dict(sorted(found.items()))


def table(runs: dict[int, dict[str, Episodes]], delay: int, against: str) -> str:
    """Of one delay; what no delay changes is told with each."""
    modes = {name: run for name, run in runs.get(0, {}).items() if name in UNDELAYED} | runs[delay]
    suites = sorted({key[1] for run in modes.values() for key in run})
    base, rows = modes.get(against, {}), []
    for name in (name for name in MODES if name in modes):
        run, difference = modes[name], ABSENT
        if name != against and run.keys() & base.keys():
            difference = compared(base, run)
        columns = [cell(run, suite, False) for suite in suites]
        rate = success_cell(success_rate(list(run.values())))
        rows.append([MODES[name], *columns, rate, difference, f"{passes(run.values()):.2f}"])
    named = [suite.removeprefix("libero_").removesuffix("_permuted") for suite in suites]
    return markdown(["", *named, "together [Wilson 95 %]", f"against {MODES[against]}", "passes"], rows)


def solved_of(run: Episodes) -> str:
    return f"{sum(e.success for e in run.values())}/{len(run)}"


def overview(runs: dict[int, dict[str, Episodes]]) -> str:
    """Successes of every mode at every delay."""
    delays = [delay for delay in runs if delay]
    rows = []
    for name in MODES:
        found = {delay: modes[name] for delay, modes in runs.items() if name in modes}
        if found.keys() - {0}:
            rows.append([MODES[name], *(solved_of(found[delay]) if delay in found else ABSENT for delay in delays)])
    return markdown(["steps late", *(str(delay) for delay in delays)], rows)


def draw(parts: dict[str, dict[int, dict[str, Episodes]]], path: Path) -> None:
    """Success with Wilson intervals against the delay, a panel for each part."""
    figure, panels = plt.subplots(1, len(parts), figsize=(5.5 * len(parts), 4), sharex=True, sharey=True, squeeze=False)
    for panel, (name, runs) in zip(panels[0], parts.items(), strict=True):
        for index, mode in enumerate(MODES):
            style: dict[str, Any] = {"color": f"C{index % 10}", "label": MODES[mode].replace("`", "")}
            points = {delay: success_rate(list(modes[mode].values())) for delay, modes in runs.items() if mode in modes}
            if 0 in points and mode in UNDELAYED:
                panel.axhline(100 * points[0].successes / points[0].n, linestyle=":", **style)
            elif points:
                low, rate, high = (100 * np.array([[r.low, r.successes / r.n, r.high] for r in points.values()])).T
                panel.errorbar(list(points), rate, [rate - low, high - rate], marker="o", capsize=2, **style)
        panel.set(title=f"{name} scenes", xlabel="delay of the target's answer, steps of 50 ms", ylim=(0, 100))
    panels[0][0].set_ylabel("success, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(config: DelayPageConfig) -> None:
    parts = {path.name: load(config.results / path.name) for path in sorted(located(config.results).iterdir())}
    for name, runs in parts.items():
        print(f"{name} scenes\n", overview(runs), sep="\n")
        for delay in runs:
            print(f"{name} scenes, answers {delay} steps late\n", table(runs, delay, config.against), sep="\n")
    if config.plot:
        draw(parts, config.plot)
        print(config.plot)


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("delay_page")
