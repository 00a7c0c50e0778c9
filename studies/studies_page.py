"""`runs/pages/studies.md` from committed raw results: trainings that are not the shipped policy's.

    python -m studies.studies_page

Nothing on the page but its prose is typed in by hand; the prose names no success rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.evaluation.results import write_atomically
from rsd.reporting.tables import level_cell, load_run
from rsd.types import VERIFYING
from studies.archive import read_json
from studies.deviation import DeviationRecord
from studies.page_tables import ABSENT, FORMER, success_section, table, task_section

VALIDATED = ("ar", "l1", "draft", "light", "rsd margin", "rsd-fused margin", "rsd exact")
TITLE = """\
# Studies: other data, another size

Made by `python -m studies.studies_page` from the raw results in the folder named below. None of these policies
ships; what was tried and did not help stands here as well. "Shipped" is on this page a policy of 18 M, which
shipped when these were trained; its raw results are in the same archive.
"""
DAGGER = """\
598 demonstrations more, driven by the shipped policy under `rsd-skip` with up to four chunks in a row without the
target, 360 of them in tasks 4, 5, 7 and 9, all labelled by the expert; trained from the shipped weights. It was to let
the target find out of where rows of skipped chunks lead. It did not: the drawer is lost as before, and the policy as a
whole is worse than the one it started from (whose `l1` and `rsd-fused` on the same initial states are the first two
rows). One training of one seed, with fewer of the expert's own demonstrations and fewer steps than the shipped one:
which of these did it is not known."""
GRASPS = """\
Demonstrations of tasks 2, 6 and 8 whose expert takes the bowl from either side, by a coin (`rsd demos collect
--grasp-mode two-sided`): 94 mm apart, a mean of both lands in the middle of the bowl. Trained from the shipped weights.
The expectation that regression averages and tokens commit is NOT borne out: `l1` does not suffer, and nothing that
decodes tokens is above it. Not looked into; a likely reason is that a chunk is 8 steps and the side shows in the arm's
own position soon after the start, and that the median which an L1 loss asks for is itself one of the sides where one is
a little likelier than the other. Where the side is chosen late it is otherwise: [decoding.md](decoding.md). (`ar` and
`rsd` ran later than the other two, on another host, in batches.)"""
LARGE = """\
The same architecture with a trunk of 24 layers of 576; cameras and words start from the shipped policy's weights
(`--init-matching`), the trunk from nothing: one of three targets trained alike, 1,500 steps of 512 with everything of
the target but cameras and words afresh; the smaller two were not run in closed loop. `early` is a longer training of
that size of before DAgger, on twice the demonstrations: its `rsd-fused` was better. The `rsd-fused` and `l1` of this
one are not distinguishable. On held-out frames `l1` of the largest target is the best by a little (`ar` is not), and
at every size what corrects the visual drafter's prefix in one pass is ahead of `l1`. It starts from a visual drafter
that had its whole training before and that no target reaches in so short a one, and that draft itself is better beside
the largest target: how much of it all is the target's is not known. How long a chunk takes is in
[scaling.md](scaling.md)."""
SIZES = (("10 M", "s10M"), ("18 M", "s18M"), ("105 M", "s104M"))


CODES = """\
Does the redundancy of the code help, and do finer levels take a draft's error out? Trained from the shipped cameras
and trunk, alike but for the code; everything that reads or writes tokens starts afresh (`--init-matching
--init-fresh`). The codes end at about the same precision; a level of rho = 2 halves the step, so it needs the most
levels. The drafts propose levels up to about the same step: three at rho = 2, two at 3, one at 7. rho = 4 with four
levels and six levels of rho = 2 were trained as well, but their episodes were not run: offline they are near the others
(the next two studies).

- `ar` did better with five and with three levels than with eight, the first beyond chance: each level is one more
  chance to leave the data. A reader who needs level-by-level decoding should try rho = 3 with five levels.
- That what corrects a draft in one pass depends on the code is not shown: between codes, `rsd` and `rsd-fused` are not
  distinguishable at this n. The target's regression after a drafted prefix takes the coarse error out (deviation from
  `ar` below, `coarse-only` against `rsd`), for the non-redundant rho = 7 as well: it works on the continuous value.
  What redundancy buys is acceptance (margin 2 digits at rho = 2, none from 3 on), not success.
- So there is no reason here to leave the shipped code, and none to believe that redundancy is what makes it work."""
DRAFT_ALONE = """\
Is `drafter-only` so good, or so bad, because its draft was trained to have a memory? The shipped visual drafter trained
further, 2,500 steps of 512 at a learning rate of 4e-4 on 1,142 of the demonstrations, beside the shipped target, which
stays (`rsd train drafter --kind visual --resume-weights`): once without ever a memory (`--loss.blind 1`), once as
before (0.1). Without a memory neither acts better than the other, so the practice in being alone is not what was
missing. Both act worse than the draft they started from, which had seen twice the demonstrations: whether it is that or
the learning rate begun anew is not known. `draft-first` with the second was cut off. One H200 host, batches of 13."""
ABLATION = """\
Half of the training prefixes are a draft's own (`--loss.draft-share 0.5`). Without them (0) the errors on held-out
frames say what it is for: the target then corrects its draft's prefix two thirds of the way to what `l1` says instead
of nearly all of it, the visual drafter's less than half instead of nine tenths, and accepts more of both. `ar`, which
never sees a draft, is the better for it. Offline only: no episodes were run. The code with six levels of rho = 2 beside
the eight, likewise. Mean absolute error in normalised units; acceptance of the drafted levels under `margin`."""
JITTER = """\
Of the other half of the prefixes a part of the digits is jittered within the code's margin (`--loss.jitter 0.4`).
Without that (0) `rsd` gets a little worse on held-out frames and `ar` better by more; what half of the prefixes, a
draft's own, teach already may be why it does so little. rho = 4 with four levels has drafts (of two levels) that are a
little worse and accepted less often, and after the target's correction is near the others. Alike but for that: 1,000
steps of 512 from the shipped cameras and trunk; other demonstrations are held out than above, so only the columns of
one table compare. Offline only, one training each."""


@dataclass(frozen=True)
class Study:
    """runs: (name on the page, directory); the first two are compared against. checkpoint: its config.json.
    deviations: (name on the page, file of `python -m studies.deviation`). validations: (name, config.json of a
    checkpoint)."""

    title: str
    prose: str
    checkpoint: str = ""
    runs: tuple[tuple[str, str], ...] = ()
    deviations: tuple[tuple[str, str], ...] = ()
    validations: tuple[tuple[str, str], ...] = ()


CODE_NAMES = (("rho 2, 8 levels", "r2L8"), ("rho 3, 5 levels", "r3L5"), ("rho 7, 3 levels", "r7L3"))


STUDIES = (
    Study(
        "A second round of DAgger, driven by `rsd-skip`",
        DAGGER,
        "dagger-skip",
        (
            ("shipped l1", "h200-fp16/l1"),
            ("shipped rsd-fused", "h200-fp16/rsd-fused"),
            ("rsd-fused", "studies/dagger-skip-rsd-fused"),
            ("rsd-skip", "studies/dagger-skip-rsd-skip"),
        ),
    ),
    Study(
        "The code: rho and levels",
        CODES,
        "r2L8",
        tuple(
            (f"{decode}, {title}", f"studies/{name}-{decode}")
            for decode in ("ar", "rsd", "rsd-fused")
            for title, name in CODE_NAMES
        ),
        deviations=tuple((title, f"studies/{name}-deviation.json") for title, name in CODE_NAMES),
    ),
    Study(
        "Training on a draft's prefixes; six levels",
        ABLATION,
        "nodraft",
        validations=(("as shipped", "r2L8"), ("no draft's prefixes", "nodraft"), ("six levels", "r2L6")),
    ),
    Study(
        "Jittered digits; rho = 4",
        JITTER,
        "nojitter",
        validations=(("with jitter, rho 2", "r2L8-again"), ("no jitter", "nojitter"), ("rho 4, 4 levels", "r4L4")),
    ),
    Study(
        "A draft trained alone",
        DRAFT_ALONE,
        runs=(
            ("shipped drafter-only", "h200/drafter-only"),
            ("l1", "h200/l1"),
            ("trained on, never a memory", "studies/alone-drafter-only"),
            ("trained on, as before", "studies/with-drafter-only"),
        ),
    ),
    Study(
        "Two equally good grasps",
        GRASPS,
        "two",
        tuple((decode, f"studies/two-{decode}") for decode in ("l1", "rsd-fused", "ar", "rsd")),
    ),
    Study(
        "Targets of other sizes",
        LARGE,
        "s104M",
        (
            ("l1", "studies/s104M-l1"),
            ("rsd-fused", "studies/s104M-rsd-fused"),
            ("early l1", "studies/big-l1"),
            ("early rsd-fused", "studies/big-rsd-fused"),
        ),
        validations=SIZES,
    ),
)


@dataclass(frozen=True)
class StudiesPageConfig:
    """Write the page about the studies."""

    results: Path = Path("results/libero_spatial")
    """Folder of the runs."""
    output: Path = Path("runs/pages/studies.md")
    """The page."""


def main(config: StudiesPageConfig) -> None:
    parts = [TITLE]
    for study in STUDIES:
        parts.append(f"## {study.title}\n\n{study.prose}\n")
        if study.checkpoint:
            parts.append(training_of(config.results / "studies" / f"{study.checkpoint}-checkpoint.json") + "\n")
        if study.runs:
            names = [name for name, _ in study.runs]
            runs = [load_run(config.results / directory) for _, directory in study.runs]
            sections = (success_section(names, runs), task_section(names, runs))
            parts += [section.replace("## ", "### ") for section in sections]
        if study.deviations:
            parts.append(deviations_table([(name, config.results / path) for name, path in study.deviations]))
        if study.validations:
            parts.append(validation_table(config.results, study.validations))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, "\n".join(parts))


def training_of(path: Path) -> str:
    """What a checkpoint's own record, its config.json, says of its training."""
    provenance = read_json(path)["provenance"]
    data, loop = provenance["data"], provenance["training"]["loop"]
    length = f"{loop['minutes']:g} minutes" if loop["minutes"] else f"{loop['steps']} steps"
    processes = f" x {provenance['processes']}" if "processes" in provenance else ""
    return (
        f"`{path}`: {data['episodes']} demonstrations, {data['frames']} frames, {length} of batches "
        f"of {loop['batch_size']}{processes}, learning rate {loop['learning_rate']:g}."
    )


def deviations_table(records: Sequence[tuple[str, Path]]) -> str:
    """What a draft's chunk and what is made of it deviate from `ar` under the same code."""
    rows, header = [], ["decoder", "acceptance", "fine", *(f"{name}, mm" for name, _ in records)]
    loaded = [DeviationRecord.from_json(read_json(path)) for _, path in records]
    for own in zip(*(record.rows for record in loaded), strict=True):
        speculates = own[0].decode in VERIFYING
        name = FORMER.get(own[0].decode, own[0].decode)
        kind = [f"`{name}`", *([own[0].acceptance, own[0].fine] if speculates else [ABSENT, ABSENT])]
        rows.append([*kind, *(" / ".join(f"{x:.2f}" for x in row.from_ar["mm"]) for row in own)])
    return (
        "### Deviation of a step's command from `ar` of the same code, p50 / p99 / max\n\n"
        f"{loaded[0].frames} frames of {loaded[0].episodes} held-out episodes.\n\n"
    ) + table(header, rows)


def validation_table(results: Path, checkpoints: Sequence[tuple[str, str]]) -> str:
    """The offline validation that a training ends with, of several trainings."""
    reports = []
    for _, name in checkpoints:
        path = results / "studies" / f"{name}-checkpoint.json"
        reports.append(read_json(path)["provenance"]["validation"])
    rows = [
        [f"`{FORMER.get(decode, decode)}`", *(f"{report[decode]['l1_error']:.4f}" for report in reports)]
        for decode in VALIDATED
    ]
    for decode in ("rsd margin", "rsd-fused margin"):
        shares = [report[decode]["tokens_accepted_by_level"] for report in reports]
        rows.append([f"accepted, `{decode}`", *(level_cell(share) for share in shares)])
    frames = f"{reports[0]['frames']} frames of {reports[0]['episodes']} held-out episodes.\n\n"
    return frames + table(["decoder", *(name for name, _ in checkpoints)], rows)


if __name__ == "__main__":
    main(tyro.cli(StudiesPageConfig))
