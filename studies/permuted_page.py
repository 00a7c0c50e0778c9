"""The table of the permuted scenes in docs/results.md, from raw results: verification where the target is worth it.

    python -m studies.permuted_page [--results results/permuted_object]

prints it, for the first, second or third policy. Successes are compared on the states that a run shares with the target
alone; *kept* is what a decoder keeps of the gap between the drafter alone and the target alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import PairedDifference
from rsd.evaluation.summary import SuccessRate, success_rate
from rsd.evaluation.tables import markdown
from rsd.reporting.archive import located
from rsd.reporting.tables import Run, load_run, paired

ROWS = {  # run -> how the table calls it
    "l1": "`l1`, the target alone",
    "l1_16": "`l1`, all 16 steps of a chunk executed",
    "single": "`l1` of its first 5 layers, trained on",
    "alone": "`drafter-only`",
    "fused_blind": "`rsd-fused`, `blind(0.95)`",
    "fused_moving": "`rsd-fused`, `blind(0.95,moving)`",
    "fused_blind98": "`rsd-fused`, `blind(0.98)`",
    "fused_residual": "`rsd-fused`, `residual`",
    "fused_margin": "`rsd-fused`, `margin`",
    "skip_reset_3": "`rsd-skip`: target at reset, at most 3 without in a row",
    "skip_own_3": "`rsd-skip`, `own`, at most 3 without in a row",
    "skip_own_5": "`rsd-skip`, `own`, at most 5 without in a row",
    "skip_forecast_100": "`rsd-skip`: forecast under 100 mm, at most 6 without in a row",
    "skip_forecast_60": "the same, under 60 mm",
    "skip_reset_1": "the same, every second chunk by the target",
    "skip_reset_99": "the same, only gripper switches call the target",
    "skip_noreset_3_mem99": "without the target at reset, memory kept",
    "skip_old": "as it was: gate of 400 mm, no target at reset, `residual`",
    "ar": "`ar`",
}
HEADER = ["", "success [Wilson 95 %]", "like training / held out", "against the target alone", "kept", "passes"]


@dataclass(frozen=True)
class PermutedPageConfig:
    """Print the table."""

    results: Path = Path("results/permuted_object")
    """Folder of the runs, or what its archive was made of."""


def shared(run: Run, states: Run) -> int:
    """Successes of a run on the states that another one has."""
    return sum(run.successes[key] for key in states.successes)


def success_cell(rate: SuccessRate) -> str:
    share = f"{rate.successes}/{rate.n} = {100 * rate.successes / rate.n:.1f} %"
    return f"{share} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def against_cell(pair: PairedDifference) -> str:
    """Points, (+ only this one solved, - only the target), exact p, interval with whole tasks drawn anew."""
    interval = pair.clustered_interval()
    assert interval is not None
    counted = f"{100 * pair.difference:+.1f} (+{pair.only_second} -{pair.only_first}), p {pair.p_value:.2g}"
    return f"{counted} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def passes(episodes: Collection[EpisodeResult]) -> float:
    """Share of chunks with a pass of the target."""
    return sum(e.prefills for e in episodes) / sum(e.chunks for e in episodes)


def row(name: str, run: Run, target: Run, drafter: Run) -> list[str]:
    rate, count = success_rate(run.episodes), len(run.episodes)
    halves = [[e.success for e in run.episodes if e.init_state % 2 == odd] for odd in (0, 1)]
    sizes = " and ".join(dict.fromkeys(str(len(half)) for half in halves))
    seen = f"{sum(halves[0])} / {sum(halves[1])} of {sizes}"
    of_target, of_drafter = shared(target, run), shared(drafter, run)
    kept = f"{(rate.successes - of_drafter) / (of_target - of_drafter):.2f}"
    against = "-"
    if run is not target:
        against = against_cell(paired(target, run))
        if count < len(target.episodes):
            against = f"of {of_target}: {against}"
    return [name, success_cell(rate), seen, against, kept, f"{passes(run.episodes):.2f}"]


def permuted_table(folder: Path) -> str:
    """The table of the runs that are there, in Markdown. Raises RsdError where target or drafter alone is not."""
    there = [name for name in ROWS if name in ("l1", "alone") or located(folder / name).is_dir()]
    runs = {name: load_run(folder / name) for name in there}
    rows = [row(ROWS[name], run, runs["l1"], runs["alone"]) for name, run in runs.items()]
    return markdown(HEADER, rows)


def agreement_at_looks(folder: Path) -> str:
    """How many drafts stood when `rsd-skip` let the target look, all looks and an episode's first two, in the episodes
    that the target alone solves: those that skipping lost and those that it kept."""
    target, skipping = load_run(folder / "l1"), load_run(folder / "skip_reset_3")
    lines = []
    for name, solved in (("lost", False), ("kept", True)):
        looks = [e.accepted_levels for e in skipping.episodes if target.successes[e.key] and e.success == solved]
        every, first = [level for e in looks for level in e], [level for e in looks for level in e[:2]]
        shares = [f"{sum(level > 0 for level in some) / len(some):.2f}" for some in (every, first)]
        lines.append(f"{len(looks)} episodes {name}: drafts stood {shares[0]}, at the first two looks {shares[1]}")
    return "\n".join(lines)


def main(config: PermutedPageConfig) -> None:
    print(permuted_table(config.results))
    print(agreement_at_looks(config.results))


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("permuted_page")
