"""The gate of `rsd-skip`: may this draft be executed without asking the target? See `calibration` for its threshold."""

from __future__ import annotations

from dataclasses import dataclass

from rsd.checks import Checked, Count, Millimetres, Rules
from rsd.decoding.calibration import may_skip, most_skips
from rsd.decoding.state import Draft, EpisodeState, Forecast
from rsd.models.config import held_rule
from rsd.types import MAX_SKIPS, MEMORY_CHUNKS, Chunks

ANY_MM = 1e9  # a threshold that whatever is forecast lies below


@dataclass(frozen=True)
class SkipRule(Checked):
    """The target is skipped while the draft is expected to deviate less than threshold_mm (0 = never), at most
    max_skips chunks in a row, and never where the gripper switches. The drafter attends to what the target left behind
    for memory_chunks chunks; after that it acts on what it sees, as at an episode's start: what has moved meanwhile
    would mislead it. target_at_reset: the target always runs on an episode's first observation, where it is decided
    *which thing* to go for: without that a gate keeps nothing of what the target knows (docs/results.md).
    max_skips_held: as max_skips, while the gripper is closed, when *where to* is decided; None: no fewer.
    skips_per_agreement: trust is earned. After the target's last k runs in a row found that the draft stood, it is
    skipped at most k times this often in a row, so not at all after a draft that it rejected; None: no such limit."""

    threshold_mm: Millimetres = 0.0
    max_skips: Chunks = MAX_SKIPS
    memory_chunks: Chunks = MEMORY_CHUNKS
    target_at_reset: bool = True
    skips_per_agreement: Chunks | None = None
    max_skips_held: Count | None = None

    def rules(self) -> Rules:
        yield held_rule(self.max_skips_held, self.max_skips)

    @classmethod
    def schedule(cls, max_skips: int, held: int | None = None) -> SkipRule:
        """No gate: the target runs after every max_skips chunks, at resets and where the gripper switches."""
        return cls(ANY_MM, max_skips, memory_chunks=max_skips, max_skips_held=held)

    def most(self, state: EpisodeState) -> tuple[int, ...]:
        """Chunks in a row that may go without the target now, by row."""
        held = self.max_skips if self.max_skips_held is None else self.max_skips_held
        rows = zip(state.gripper, state.stood, strict=True)
        return tuple(most_skips(held if last else self.max_skips, self.skips_per_agreement, n) for last, n in rows)

    def forces(self, draft: Draft, state: EpisodeState) -> tuple[bool, ...]:
        """Rows for which the target has to run whatever is forecast."""
        rows = zip(draft.gripper.tolist(), state.gripper, state.seen, strict=True)
        return tuple(set(drafted) != {last} or (self.target_at_reset and not seen) for drafted, last, seen in rows)

    def trusts(self, forecast: Forecast, state: EpisodeState, forced: tuple[bool, ...]) -> tuple[bool, ...]:
        """Rows whose draft may be executed as it is. A NaN never may."""
        # as double precision numbers: the calibration compares these very values
        scores: list[float] = forecast.deviation_mm.tolist()
        rows = zip(scores, state.skipped, self.most(state), forced, strict=True)
        return tuple(may_skip(score, self.threshold_mm, skipped, n, must) for score, skipped, n, must in rows)
