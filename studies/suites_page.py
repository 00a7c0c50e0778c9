"""`runs/pages/suites.md` from committed raw results: one policy on several suites, with and without its target.

    python -m studies.suites_page

Nothing on the page but its prose is typed in by hand; the prose names no success rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rsd.decoding.calibration import SkipCalibration
from rsd.evaluation.calibrate import CalibrateConfig, fit, share_at, skipped_share
from rsd.evaluation.results import write_atomically
from rsd.evaluation.statistics import paired_difference
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import markdown
from rsd.reporting.archive import located
from rsd.reporting.tables import Run, load_run, success_cell
from studies.archive import read_json
from studies.page_tables import (
    DELTA,
    EPSILON_MM,
    against_cell,
    risk_section,
    success_table,
    task_table,
    training_of,
)

TITLE = """\
# Several suites: what a target is worth

Made by `python -m studies.suites_page` from the raw results in the folder named below.

One policy for three suites, `checkpoints/libero_object_goal_10`: the sizes of the one for libero_spatial, begun with
its weights, with a tokenizer fitted on these suites as well, target and drafts trained together on demonstrations of
the scripted expert (no DAgger). Left out are what the expert cannot do: two tasks of libero_goal, three of libero_10.
The visual drafter has no memory on three tenths of its samples (`--loss.blind 0.3`). One training of one seed; all runs
on one host, in batches of 16, on the benchmark's fixed initial states, the first of each task.

What this says of this one policy:
- In libero_object and libero_goal everything is near its ceiling: nothing can be told apart there.
- In libero_10, where two things are done one after the other, the target that corrects the draft in one pass
  (`rsd-fused`) is ahead of the draft alone, clearly, and of `draft-first`, which lets the draft act. The target alone
  (`l1`) lies between and is distinguishable from neither; most of its distance to `rsd-fused` is the last task.
- In libero_spatial it is the other way round: correcting the draft costs success there ([decoding.md](decoding.md)).
- Many pairs are compared here, and no p is corrected for that. **Training on did not keep it**: in the policy of four
  suites at the end nothing is distinguishable, libero_10 included.
"""
FOUR = """\
## One recipe for four suites

The two policies above and in [decoding.md](decoding.md) differ in more than their tasks, so neither settles what a
target is worth. This one, which does not ship, has all four suites by one recipe: the weights of the policy above,
trained on for {training}, on the expert's demonstrations of the other three suites, those of libero_spatial with its
DAgger, and 384 that the policy above drove itself and the expert labelled, 168 of them in libero_10.

Target, draft and both together are **not distinguishable, neither over all tasks nor in libero_10**: beside a draft
that learnt the same demonstrations, a target six times its size earned nothing that this many episodes can show. On the
same initial states of libero_10 its `rsd-fused` does worse than that of the policy above, by as much as decoders differ
there; `l1` and the draft alone do not. Whether the mixture, the training or chance did that is not known: the policy
above is one training whose best cell this was, and this one is not independent of it.
"""
BEFORE = """\
The same initial states in libero_10, by the policy above and by this one:
"""
PROMISES = """\
### A threshold for every suite

`rsd calibrate` over several suites fits each by itself and writes the strictest threshold (`calibration` in the same
folder; {rule} for each suite, not for all at once). Last: the share of the chunks without the target in the rollouts,
and what it would have been by the written threshold. The promise is about episodes that skip as the rollouts did, so
such a step asks for a second round at about that threshold. That, and an evaluation, were not made: this policy does
not ship.
"""
SKIPPING = """\
## Skipping in libero_10

`rsd-skip` on 2 CPU cores with OSMesa, beside the runs on the GPU: another renderer. It was calibrated on three random
placements of each of the 25 tasks (`calibration` in the same folder), and its promise is broken here: it is one about
that mixture, in which the easy suites vouch for this one. A policy of several suites needs a calibration of the tasks
that it is to do (`rsd calibrate --task-suite libero_10 --tasks ...`); this one does not ship. In success it stands
where its passes of the target do, between the draft alone and `rsd-fused`.
"""


@dataclass(frozen=True)
class SuitesPageConfig:
    """Write the page about a policy of several suites."""

    results: Path = Path("results/suites")
    """Folder with one results directory per row."""
    order: tuple[str, ...] = ("l1", "drafter-only", "rsd-fused", "draft-first")
    """Directories in it, in the order of the rows; the first two are compared against."""
    four: str = "four"
    """Folder in it of the policy of four suites."""
    four_order: tuple[str, ...] = ("l1", "drafter-only", "rsd-fused")
    """Directories in that, in the order of the rows."""
    skipping: str = "libero_10-rsd-skip"
    """Directory in it of a run of one suite by rsd-skip."""
    output: Path = Path("runs/pages/suites.md")
    """The page."""


def main(config: SuitesPageConfig) -> None:
    runs = [load_run(config.results / name) for name in config.order]
    suites = suites_of(runs)
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
    parts += four_suites(config.results, config.four, config.four_order)
    write_atomically(config.output, "\n".join(parts))


def four_suites(results: Path, name: str, order: Sequence[str]) -> list[str]:
    """The section about the policy of four suites, in a folder of that name beside its predecessor's runs."""
    folder = results / name
    runs = [load_run(folder / decode) for decode in order]
    suites = suites_of(runs)
    loop = read_json(folder / "checkpoint.json")["provenance"]["training"]["loop"]
    parts = [FOUR.format(training=f"{loop['minutes']:g} minutes of batches of {loop['batch_size']}")]
    parts += [training_of(folder / "checkpoint.json") + "\n", success_table(order, runs), by_suite(order, runs, suites)]
    own = [of_suite(run, "libero_10") for run in runs]
    parts += ["libero_10 alone:\n", success_table(order, own), task_table(order, own)]
    changes = []
    for decode, run in zip(order, own, strict=True):
        former = load_run(results / decode).successes
        both = former.keys() & run.successes.keys()
        solved = (f"{sum(one[key] for key in both)}/{len(both)}" for one in (former, run.successes))
        changes.append([f"`{decode}`", *solved, against_cell(paired_difference(former, run.successes))])
    parts += [BEFORE, markdown(["decoder", "before", "this one", "difference"], changes)]
    return [*parts, *thresholds(folder, suites)]


def thresholds(folder: Path, suites: Sequence[str]) -> list[str]:
    """What the calibration in the folder would have been for each suite alone."""
    rollouts, rows = load_run(folder / "calibration").episodes, []
    written = SkipCalibration.load(located(folder))
    names = ("alpha", "delta", "epsilon_mm", "max_skips", "memory_chunks", "test")
    promise = CalibrateConfig(**{name: getattr(written, name) for name in names})
    for suite in suites:
        mine = [episode for episode in rollouts if episode.suite == suite]
        found = fit(mine, promise, written.weights_sha256)
        fitted = [f"{found.threshold:.1f} mm", f"{found.skip_share:.1%}", f"{found.empirical_risk:.3f}"]
        shares = f"{skipped_share(mine):.1%}", f"{share_at(mine, written):.1%}"
        rows.append([suite, str(found.episodes), *fitted, *shares])
    rule = f"epsilon {promise.epsilon_mm:g} mm, risk <= {promise.alpha:g} at {1 - promise.delta:g}"
    header = ["suite", "rollouts", "threshold of its own", "chunks without the target by that", "risk in the rollouts"]
    header += ["the rollouts had", f"by the written {written.threshold:.1f} mm"]
    return [PROMISES.format(rule=rule), markdown(header, rows)]


def suites_of(runs: Sequence[Run]) -> list[str]:
    """In the order of the episodes."""
    return list(dict.fromkeys(episode.suite for run in runs for episode in run.episodes))


def of_suite(run: Run, suite: str) -> Run:
    """The run's episodes of one suite."""
    return replace(run, episodes=[episode for episode in run.episodes if episode.suite == suite])


def by_suite(names: Sequence[str], runs: Sequence[Run], suites: Sequence[str]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        rows.append([f"`{name}`", *(success_cell(success_rate(of_suite(run, suite).episodes)) for suite in suites)])
    return markdown(["decoder", *suites], rows)


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("suites_page")
