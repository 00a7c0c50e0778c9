"""What any policy's answer has to be."""

from __future__ import annotations

import operator
from typing import get_type_hints

import numpy as np

from rsd.json_files import typed_value
from rsd.types import ACTION_DIM, ActionChunk, ChunkStats, RsdError, real_array


def checked_chunk(chunk: ActionChunk) -> ActionChunk:
    """The chunk itself; raises RsdError unless its actions are real, finite, [H >= 1, 7] and in [-1, 1], and its
    statistics possible."""
    if not isinstance(chunk, ActionChunk) or not isinstance(chunk.actions, np.ndarray):
        found = type(getattr(chunk, "actions", chunk)).__name__
        remedy = "return rsd.types.ActionChunk(actions, rsd.types.ChunkStats(decode='its name'))"
        raise RsdError(f"policy: expected an ActionChunk of a NumPy array, found {found}; {remedy}")
    check_stats(chunk.stats)
    actions = real_array("policy: actions", chunk.actions, "float64")
    if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != ACTION_DIM:
        raise RsdError(f"policy: expected an action chunk [H, {ACTION_DIM}], found {list(actions.shape)}")
    if np.abs(actions).max() > 1.0:
        raise RsdError(f"policy: actions are to lie in [-1, 1], found one of {np.abs(actions).max():.4g}")
    return chunk


STATS_TYPES = get_type_hints(ChunkStats)


def check_stats(stats: ChunkStats) -> None:
    """Raises RsdError for statistics that no decoder has: they come from other programs, too."""
    for name, kind in STATS_TYPES.items():
        typed_value(kind, getattr(stats, name), "policy", f"{name} of its statistics")
    drafted, accepted, levels = stats.num_draft_tokens, stats.num_accepted_tokens, len(stats.num_draft_tokens)
    share = 0.0 if stats.gripper_acceptance is None else stats.gripper_acceptance
    impossible = {
        f"{len(accepted)} levels of accepted tokens for {levels} of drafted ones": len(accepted) != levels,
        f"more accepted than drafted tokens, {accepted} of {drafted}": any(map(operator.gt, accepted, drafted)),
        f"{stats.accepted_levels} accepted levels of {levels}": stats.accepted_levels > levels,
        f"a gripper acceptance of {share:g}": not 0 <= share <= 1,
        "a negative count or time": min(
            *(stats.prefills, stats.target_passes, stats.accepted_levels),
            *(*drafted, *accepted, *stats.latency_ms.values()),
        )
        < 0,
    }
    if found := [name for name, holds in impossible.items() if holds]:
        raise RsdError(f"policy: impossible statistics: {found[0]:.200}")
