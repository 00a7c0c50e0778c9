"""`docs/results/suites.md` from committed raw results: one policy on several suites, with and without its main.

    python -m rsd.evaluation.suites_page

Nothing on the page but its prose is typed in by hand; the prose names no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from rsd.evaluation.decoding_page import DELTA, EPSILON_MM, risk_section, success_table, table, task_table
from rsd.evaluation.report import Run, load_run, success_cell
from rsd.evaluation.results import write_atomically
from rsd.evaluation.studies_page import training_of
from rsd.evaluation.summary import success_rate

TITLE = """\
# Several suites: what a main is worth

Made by `python -m rsd.evaluation.suites_page` from the raw results in the folder named below.

One policy for three suites, `checkpoints/libero_object_goal_10`: the sizes of the one for libero_spatial, begun with
its weights, with a tokenizer fitted on these suites as well, main and drafts trained together on demonstrations of the
scripted expert (no DAgger). Left out are what the expert cannot do: two tasks of libero_goal, three of libero_10. The
light draft has no memory on three tenths of its samples (`--loss.blind 0.3`). One training of one seed; all runs on one
host, in batches of 16, on the benchmark's fixed initial states, the first of each task.

What this says of this one policy:
- In libero_object and libero_goal everything is near its ceiling: nothing can be told apart there.
- In libero_10, where two things are done one after the other, the main that corrects the draft in one pass
  (`rsd-fused`) is ahead of the draft alone, clearly, and of `rsd-ahead`, which lets the draft act. The main alone
  (`l1`) lies between and is distinguishable from neither; most of its distance to `rsd-fused` is the last task.
- In libero_spatial it is the other way round: correcting the draft costs success there ([decoding.md](decoding.md)).
  The two policies differ in more than their tasks: this one has no DAgger, a quarter to a third of the demonstrations
  per task, a draft that practised being alone more often, and a shorter training. That the length of the task decides
  is a guess.
- Many pairs are compared here, and no p is corrected for that.
"""
SKIPPING = """\
## Skipping in libero_10

`rsd-skip` on 2 CPU cores with OSMesa, beside the runs on the GPU: another renderer. It was calibrated on three random
placements of each of the 25 tasks (`calibration` in the same folder), and its promise is broken here: it is one about
that mixture, in which the easy suites vouch for this one. A policy of several suites needs a calibration of the tasks
that it is to do (`rsd calibrate --task-suite libero_10 --tasks ...`); this one does not ship. In success it stands
where its passes of the main do, between the draft alone and `rsd-fused`.
"""


@dataclass(frozen=True)
class SuitesPageConfig:
    """Write the page about a policy of several suites."""

    results: Path = Path("results/suites")
    """Folder with one results directory per row."""
    order: tuple[str, ...] = ("l1", "light-alone", "rsd-fused", "rsd-ahead")
    """Directories in it, in the order of the rows; the first two are compared against."""
    skipping: str = "libero_10-rsd-skip"
    """Directory in it of a run of one suite by rsd-skip."""
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
    skipping = load_run(config.results / config.skipping)
    own = [*(of_suite(run, skipping.episodes[0].suite) for run in runs), skipping]
    names = [*config.order, "rsd-skip, CPU"]
    risk = risk_section(names[-1:], [skipping], EPSILON_MM, DELTA).replace("## Skipping", "### Risk")
    parts += [SKIPPING, success_table(names, own), task_table(names, own), risk]
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
