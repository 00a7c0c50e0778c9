"""What became of drafts, in the words of vLLM's speculative decoding metrics: its positions are the levels here.

What stands or falls together differs by the rule, and with it what a draft is: the chunk (`blind`, `residual`), each
level of it (`exact`, `agreement`, drawn tokens), or each scalar's digits (`margin`, `distance`, `typical`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsd.evaluation.tables import ABSENT, level_cell, percent
from rsd.types import unit_of


@dataclass(frozen=True)
class Acceptance:
    """num_drafts: chunks that drafted. num_draft_tokens, num_accepted_tokens: over all levels; acceptance_rate:
    accepted / drafted. chunks_accepted: share of the drafts of which every drafted level stands.

    acceptance_per_level: share of the drafts, as the rule has them, that stand down to each level; empty where it knows
    only whole chunks. mean_acceptance_length: 1 + accepted levels / drafts, so 1 + the sum of those shares.
    accepted_levels: how many chunks had their first 0, 1, 2, ... levels accepted whole.
    All but the counts are None or empty where nothing was drafted."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_rate: float | None
    acceptance_per_level: list[float]
    mean_acceptance_length: float | None
    accepted_levels: list[int]
    chunks_accepted: float | None = None


def acceptance(rule: str, drafted: Sequence[int], accepted: Sequence[int], lengths: Sequence[int]) -> Acceptance:
    """drafted, accepted: tokens by level, over all chunks; lengths: leading levels that were accepted whole, of every
    chunk that drafted."""
    drafts, levels = len(lengths), len(drafted)
    histogram = [lengths.count(length) for length in range(max(lengths, default=-1) + 1)]
    if not drafts or not sum(drafted):
        return Acceptance(drafts, sum(drafted), sum(accepted), None, [], None, histogram)
    shares = [sum(length > level for length in lengths) / drafts for level in range(levels)]
    if unit_of(rule) == "scalar":
        shares = [kept / all_ if all_ else 0.0 for kept, all_ in zip(accepted, drafted, strict=True)]
    return Acceptance(
        num_drafts=drafts,
        num_draft_tokens=sum(drafted),
        num_accepted_tokens=sum(accepted),
        acceptance_rate=sum(accepted) / sum(drafted),
        acceptance_per_level=[] if unit_of(rule) == "chunk" else shares,
        mean_acceptance_length=1 + sum(shares),
        accepted_levels=histogram,
        chunks_accepted=lengths.count(levels) / drafts,
    )


def accepted_cell(one: Acceptance) -> str:
    """In a few words; "" without a draft."""
    if one.chunks_accepted is None:
        return ""
    if not one.acceptance_per_level:
        return f"{percent(one.chunks_accepted)} of chunks"
    return f"{percent(one.acceptance_rate)} of tokens"


def acceptance_rows(found: Sequence[Acceptance]) -> list[tuple[str, list[str]]]:
    """(quantity, one cell each). Where a chunk stands or falls as one, its length is 0 or all and is left out."""
    lengths = [one.mean_acceptance_length if one.acceptance_per_level else None for one in found]
    return [
        ("chunks accepted", [percent(one.chunks_accepted) for one in found]),
        ("draft tokens accepted", [percent(one.acceptance_rate) for one in found]),
        ("accepted per level", [level_cell(one.acceptance_per_level) for one in found]),
        ("mean acceptance length", [ABSENT if length is None else f"{length:.2f}" for length in lengths]),
    ]
