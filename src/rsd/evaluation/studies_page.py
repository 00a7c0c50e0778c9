"""`docs/results/studies.md` from committed raw results: trainings that are not the shipped policy's.

    python -m rsd.evaluation.studies_page

Nothing on the page but its prose is typed in by hand; the prose names no success rate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from rsd.evaluation.decoding_page import success_section, task_section
from rsd.evaluation.report import load_run
from rsd.evaluation.results import write_atomically

TITLE = """\
# Studies: other data, another size

Made by `python -m rsd.evaluation.studies_page` from the raw results in the folder named below. None of these policies
is the shipped one; what was tried and did not help stands here as well.
"""
DAGGER = """\
598 demonstrations more, driven by the shipped policy under `rsd-skip` with up to four chunks in a row without the main,
360 of them in tasks 4, 5, 7 and 9, all labelled by the expert; trained from the shipped weights. It was to let the main
find out of where rows of skipped chunks lead. It did not: the drawer is lost as before, and the policy as a whole is
worse than the one it started from (whose `l1` and `rsd-fused` on the same initial states are the first two rows). One
training of one seed, with fewer of the expert's own demonstrations and fewer steps than the shipped one: which of these
did it is not known."""
GRASPS = """\
Demonstrations of tasks 2, 6 and 8 whose expert takes the bowl from either side, by a coin (`rsd demos collect
--grasp-mode two-sided`): 94 mm apart, a mean of both lands in the middle of the bowl. Trained from the shipped weights.
The expectation that regression averages and tokens commit is NOT borne out: `l1` does not suffer. Not looked into; a
likely reason is that a chunk is 8 steps and the side shows in the arm's own position soon after the start, and that the
median which an L1 loss asks for is itself one of the sides where one is a little likelier than the other."""
LARGE = """\
The same architecture with a trunk of 24 layers of 576; cameras and words start from the shipped policy's weights
(`--init-matching`), the trunk from nothing. Its speed is in [scaling.md](scaling.md)."""


@dataclass(frozen=True)
class Study:
    """runs: (name on the page, directory); the first two are compared against. checkpoint: its config.json."""

    title: str
    prose: str
    checkpoint: str
    runs: tuple[tuple[str, str], ...]


STUDIES = (
    Study(
        "A second round of DAgger, driven by `rsd-skip`",
        DAGGER,
        "dagger-skip",
        (
            ("shipped l1", "h200/l1"),
            ("shipped rsd-fused", "h200/rsd-fused"),
            ("rsd-fused", "studies/dagger-skip-rsd-fused"),
            ("rsd-skip", "studies/dagger-skip-rsd-skip"),
        ),
    ),
    Study("Two equally good grasps", GRASPS, "two", (("l1", "studies/two-l1"), ("rsd-fused", "studies/two-rsd-fused"))),
    Study(
        "A main of 105 M parameters", LARGE, "big", (("l1", "studies/big-l1"), ("rsd-fused", "studies/big-rsd-fused"))
    ),
)


@dataclass(frozen=True)
class StudiesPageConfig:
    """Write the page about the studies."""

    results: Path = Path("results/libero_spatial")
    """Folder of the runs."""
    output: Path = Path("docs/results/studies.md")
    """The page."""


def main(config: StudiesPageConfig) -> None:
    parts = [TITLE]
    for study in STUDIES:
        names = [name for name, _ in study.runs]
        runs = [load_run(config.results / directory) for _, directory in study.runs]
        parts.append(f"## {study.title}\n\n{study.prose}\n\n{training_of(config.results, study.checkpoint)}\n")
        parts += [success_section(names, runs).replace("## ", "### "), task_section(names, runs).replace("## ", "### ")]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, "\n".join(parts))


def training_of(results: Path, checkpoint: str) -> str:
    """What the checkpoint's own record says of its training."""
    path = results / "studies" / f"{checkpoint}-checkpoint.json"
    provenance = json.loads(path.read_text())["provenance"]
    data, loop = provenance["data"], provenance["training"]["loop"]
    return (
        f"`{path}`: {data['episodes']} demonstrations, {data['frames']} frames, {loop['minutes']:g} minutes of batches "
        f"of {loop['batch_size']} on one H200, learning rate {loop['learning_rate']:g}."
    )


if __name__ == "__main__":
    main(tyro.cli(StudiesPageConfig))
