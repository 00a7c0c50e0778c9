"""`runs/pages/decoding.md` from committed raw results: what every decoder does with the files that ship.

    python -m studies.shipped_page

Nothing on the page but its prose is typed in by hand; the prose names no measured number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsd.evaluation.latency import LatencyRecord
from rsd.evaluation.results import write_atomically
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.summary import success_rate
from rsd.evaluation.tables import markdown
from rsd.reporting.tables import Run, load_run, paired
from studies.archive import read_json
from studies.deviation import DeviationRecord
from studies.modes import shares
from studies.page_tables import (
    DELTA,
    EPSILON_MM,
    against_cell,
    deviation_section,
    latency_record,
    latency_section,
    risk_of,
    risk_section,
    success_section,
    task_section,
    timed_section,
    totals_of,
    training_of,
)

PROSE = """\
# Decoders compared in closed loop: the policy that ships

Made by `python -m studies.shipped_page` from the raw results named below; run it again after replacing them.

`ar` decodes level by level and is the baseline; `l1` regresses the chunk in one pass (the OpenVLA-OFT way) and is the
bar. `rsd-fused` lets a visual drafter propose the coarse levels before the target looks; one block of the target's
prefill, in the place of the one that `l1` reads, is told that draft and says what it misses: one pass, no wider.
`rsd-skip` executes the draft's chunk without the target where the draft expects to stay close to it. `draft-first`
executes the draft's chunk always, at once, and the target looks at the same observation while the robot moves.
`drafter-only` is the visual drafter as a policy of its own, `coarse-only` the coarse levels of the feature drafter,
uncorrected. 
The target has 57 M parameters, 12 layers of 576, and sees each camera as 4 x 4 positions (`--policy.target.merge 2 2`),
so that its prefill is 45 positions long. The visual drafter has 2.7 M. {training} Cameras and words began as those of
the policy before it. The weights are the files that ship, large matrices int8. In the records the folders' names were
made relative after the runs.
"""
HOST = """\
One H100 host, one process that serves 16 simulators in batches of 16; other trainings used the GPU during the first
ones, so nothing in this table is about time. `parallel` ran on 20 of the 50 initial states of each task.
"""
ASKED = """\
## What was asked of it

Ratios of p50 within one run of `rsd bench latency`; of means in closed loop for `rsd-skip`. Points are paired, on the
initial states above.

"""
GRASPS = """\
## Two equally good grasps, chosen late

The shipped policy trained further on {demonstrations} demonstrations of tasks 2, 6 and 8 in which the hand first goes
over the bowl's middle and there, by a coin, takes the rim's left or right side (`rsd demos collect --grasp-mode
two-sided-late`): both begin alike and part within a chunk, so that nothing before tells which it will be, and a mean of
both goes down in the middle of the bowl. `rsd`, whose draft chooses tokens and whose target corrects them, is above
`l1`; `rsd-fused` is not. One training of one seed.

"""
MODES = """\
### At the moment of the choice

{placements} random placements with the hand over the middle: where each decoder's next chunk leads, between the
expert's own two ways (`python -m studies.modes`); on {left_out} more one side was not free. Averaged: within the
middle third; committed: at least two thirds of the way to a side. `parallel`, `ar` and `rsd` never go down the middle
there, `l1` and `rsd-fused` seldom: the two modes alone do not explain the table of successes. The visual drafter
hesitates.

"""
SMALLER = """\
## A smaller target of the same kind

32 M parameters, 10 layers of 448 and 93 positions, judged by one block as well, trained before the one that ships, on
1,268 demonstrations. Its weights are not in the repository. The promise of its calibration and its share of skipped
chunks are in the table of risks.

"""


@dataclass(frozen=True)
class ShippedPageConfig:
    """Write the page about the policy that ships."""

    results: Path = Path("results/libero_spatial_57M")
    """Folder of its runs."""
    order: tuple[str, ...] = (
        *("ar", "l1", "parallel", "rsd", "rsd-fused", "rsd-skip", "draft-first", "drafter-only", "coarse-only"),
    )
    """Directories in h100/, in the order of the rows; the first two are compared against."""
    timed: tuple[str, ...] = ("timed-l1", "timed-rsd-fused", "timed-rsd-skip", "timed-draft-first")
    """Directories in cpu/ of runs of one worker, for times in closed loop."""
    latencies: tuple[str, ...] = ("h100/latency-compiled.json", "h100/latency.json", "cpu/latency.json")
    """Raw latencies of `rsd bench latency`."""
    grasps: tuple[str, ...] = ("ar", "l1", "rsd", "rsd-fused")
    """Directories in two_sided_late/; the first two are compared against."""
    smaller: Path = Path("results/whole_block/32M")
    """Folder of the smaller target's runs."""
    checkpoint: Path = Path("results/libero_spatial_57M.checkpoint.json")
    """The policy's own record."""
    output: Path = Path("runs/pages/decoding.md")
    """The page."""


def main(config: ShippedPageConfig) -> None:
    runs = [load_run(config.results / "h100" / name) for name in config.order]
    timed = [load_run(config.results / "cpu" / name) for name in config.timed]
    records = {name: latency_record(config.results / name) for name in config.latencies}
    grasps = [load_run(config.results / "two_sided_late" / name) for name in config.grasps]
    by_name = dict(zip(config.order, runs, strict=True))
    skipping = by_name["rsd-skip"]
    training = training_of(config.checkpoint)
    two = read_json(config.results / "two_sided_late" / "checkpoint.json")
    deviation = config.results / "deviation.json"
    parts = [PROSE.format(training=training), success_section(config.order, runs), HOST]
    parts.append(ASKED + asked_table(by_name, dict(zip(config.timed, timed, strict=True)), records))
    parts.append(task_section(config.order, runs))
    small = {name: load_run(config.smaller / name) for name in ("l1", "rsd-fused", "rsd-skip")}
    risks = ["rsd-skip", "rsd-skip, 32 M"], [skipping, small["rsd-skip"]]
    parts.append(risk_section(*risks, EPSILON_MM, DELTA))
    parts.append(timed_section(config.timed, timed))
    parts += [latency_section(record, config.results / name) for name, record in records.items()]
    parts.append(deviation_section(DeviationRecord.from_json(read_json(deviation)), deviation))
    demonstrations = two["provenance"]["data"]["episodes"]
    parts.append(GRASPS.format(demonstrations=demonstrations) + nested(success_section(config.grasps, grasps)))
    parts.append(nested(task_section(config.grasps, grasps)))
    parts.append(modes_section(config.results / "two_sided_late" / "modes.json"))
    parts.append(SMALLER + nested(success_section(list(small), list(small.values()))))
    parts.append(nested(timed_section(config.timed, [load_run(config.smaller / name) for name in config.timed])))
    for name in ("latency-h200.json", "latency-cpu.json"):
        parts.append(nested(latency_section(latency_record(config.smaller / name), config.smaller / name)))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, "\n".join(parts))


def nested(section: str) -> str:
    """A section one heading level further down."""
    return section.replace("## ", "### ")


def modes_section(path: Path) -> str:
    measured = read_json(path)
    places, left_out = measured["places"], measured["config"]["left_out"]
    rows = [
        [f"`{decode}`", *(f"{share:.0%}" for share in shares(found).values())]
        for decode, found in places.items()
    ]
    placements = len(next(iter(places.values())))
    return MODES.format(placements=placements, left_out=left_out) + markdown(["decoder", "averaged", "committed"], rows)


def asked_table(runs: dict[str, Run], timed: dict[str, Run], records: dict[str, LatencyRecord]) -> str:
    rows = []
    for name, record in records.items():
        p50 = {decode: percentiles(stages["total"])[0] for decode, stages in record.milliseconds.items()}
        rows.append([f"`rsd-fused` over `l1`, {name}", "<= 1.15", f"{p50['rsd-fused'] / p50['l1']:.3f}"])
        rows.append([f"`ar` over `rsd-fused`, {name}", ">= 2.5", f"{p50['ar'] / p50['rsd-fused']:.2f}"])
    best = max(("ar", "l1", "parallel"), key=lambda name: share(runs[name]))
    title = f"`rsd-fused` against `{best}`, the best of `ar`, `l1`, `parallel`"
    rows.append([title, ">= -1", points(runs, best, "rsd-fused")])
    rows.append(["`rsd-fused` against `coarse-only`", "> 0", points(runs, "coarse-only", "rsd-fused")])
    rows.append(["`rsd-fused` against `drafter-only`", "> 0", points(runs, "drafter-only", "rsd-fused")])
    means, worst = dict[str, float](), dict[str, float]()
    for decode in ("l1", "rsd-skip", "draft-first"):
        totals = totals_of(timed[f"timed-{decode}"])
        means[decode], worst[decode] = float(np.mean(totals)), max(totals)
    ratio = f"{means['l1'] / means['rsd-skip']:.2f}"
    rows.append(["mean of `l1` over mean of `rsd-skip`, 2 CPU cores", ">= 2.5", ratio])
    limit = f"<= {worst['l1'] + means['draft-first']:.1f}: the longest `l1` and a draft"
    rows.append(["longest `rsd-skip`, ms, 2 CPU cores", limit, f"{worst['rsd-skip']:.1f}"])
    rows.append(["`rsd-skip` against `l1`", ">= -0.5", points(runs, "l1", "rsd-skip")])
    calibration = runs["rsd-skip"].record.policy["skip_calibration"]
    risk = risk_of(runs["rsd-skip"], calibration["epsilon_mm"], DELTA)
    rows.append(["realised risk of `rsd-skip`", f"<= {calibration['alpha']:g}", f"{risk.share:.3f}"])
    return markdown(["", "asked", "measured"], rows)


def share(run: Run) -> float:
    """Of the episodes that succeeded."""
    rate = success_rate(run.episodes)
    return rate.successes / rate.n


def points(runs: dict[str, Run], before: str, after: str) -> str:
    return against_cell(paired(runs[before], runs[after]))


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("shipped_page")
