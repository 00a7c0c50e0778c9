"""What any policy's answer has to be."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import between, check, check_shape, checked, dotted, shown
from rsd.types import ACTION_DIM, VERIFY_PENDING, ActionChunk, ChunkStats, RsdError, WrongOption, real_array

MOST_STAGES = 100  # of a chunk's latency
MOST_STEPS = 1000  # of a chunk
ROUNDING = 0.1  # ms
OVERSHOOT = 2.0  # a regression or a flow leaves [-1, 1] a little; what is larger is in other units


def checked_chunk(chunk: ActionChunk) -> ActionChunk:
    """The chunk itself; raises RsdError unless its actions are real, finite, in [-1, 1] and [H, 7], H from 1 to
    MOST_STEPS, some of them to be executed, and its statistics possible."""
    if not isinstance(chunk, ActionChunk) or not isinstance(chunk.actions, np.ndarray):
        found = type(getattr(chunk, "actions", chunk)).__name__
        remedy = "return rsd.types.ActionChunk(actions, rsd.types.ChunkStats(decode='its name'))"
        raise RsdError(f"policy: expected an ActionChunk of a NumPy array, found {found}; {remedy}")
    check_stats(chunk.stats)
    actions = real_array("policy: actions", chunk.actions, "float64", ("H", ACTION_DIM))
    if not 0 < len(actions) <= MOST_STEPS:
        expected = f"an action chunk [H, {ACTION_DIM}], H from 1 to {MOST_STEPS}"
        raise RsdError(f"policy: expected {expected}, found {list(actions.shape)}")
    if chunk.execute is not None:
        checked(Annotated[int, between(1, len(actions))], chunk.execute, "policy: execute")
    if np.abs(actions).max() > 1.0:
        raise RsdError(f"policy: actions are to lie in [-1, 1], found one of {np.abs(actions).max():.4g}")
    return chunk


def check_stats(stats: ChunkStats) -> None:
    """Raises RsdError for statistics that no decoder has: they come from other programs, too."""
    if not isinstance(stats, ChunkStats):
        raise RsdError(f"policy: expected its statistics to be rsd.types.ChunkStats, found {type(stats).__name__}")
    check(stats, lambda at: f"policy: field {dotted(at)} of its statistics")
    drafted, accepted, levels = stats.num_draft_tokens, stats.num_accepted_tokens, len(stats.num_draft_tokens)
    ran = [name for name in ("prefills", "target_passes", "forced") if getattr(stats, name)]
    longer = longest_stage(stats.latency_ms)
    impossible = {
        f"a chunk that skipped the target, with {' and '.join(ran)}": stats.skipped and ran,
        f"the stage {longer} of latency_ms longer than its total": longer,
        f"{len(accepted)} levels of accepted tokens for {levels} of drafted ones": len(accepted) != levels,
        f"more accepted than drafted tokens, {accepted} of {drafted}": any(map(operator.gt, accepted, drafted)),
        f"{len(stats.latency_ms)} stages": len(stats.latency_ms) > MOST_STAGES,
        f"{stats.accepted_levels} accepted levels of {levels}": stats.accepted_levels > levels,
    }
    if found := [name for name, holds in impossible.items() if holds]:
        raise RsdError(f"policy: impossible statistics: {found[0]:.200}")


def environment_ready(actions: Any, where: str, steps: int | None = None) -> NDArray[np.float32]:
    """What somebody else's policy gave, [n, 7] or one action [7] -> float32 [n, 7], clipped to [-1, 1] as
    LIBERO's controller clips; `RsdError` for other shapes, and for numbers that are in other units,
    `WrongOption` for fewer than `steps`."""
    if not isinstance(actions, np.ndarray) and (odd := no_actions(actions)):
        remedy = f"predict has to return the actions themselves, [n, {ACTION_DIM}]"
        raise RsdError(f"{where}: expected actions [n, {ACTION_DIM}], found {odd}; {remedy}")
    found = real_array(f"{where}: actions", actions)
    found = found[None] if found.ndim == 1 else found
    check_shape(f"{where}: actions", found.shape, ("n", ACTION_DIM))
    if not len(found):
        raise RsdError(f"{where}: actions: expected [n, {ACTION_DIM}] with n > 0, found {list(found.shape)}")
    if (largest := np.abs(found).max()) > OVERSHOOT:
        expected = "actions as LIBERO's controller takes them, in [-1, 1], gripper -1 = open"
        raise RsdError(f"{where}: expected {expected}, found one of {largest:.4g}; de-normalise or scale them")
    if steps is not None and len(found) < steps:
        asked = f"{where}: expected chunks of the {steps} steps that are to be executed, or of more, found {len(found)}"
        raise WrongOption(f"{asked}; --execute {len(found)} executes as many")
    return np.clip(found, -1.0, 1.0)


def no_actions(answer: Any) -> str:
    """What a policy returned in the place of numbers; "" for what may hold some."""
    if inspect.iscoroutine(answer):
        answer.close()  # or Python warns that nobody awaited it
        return "a coroutine (of an `async def`)"
    if isinstance(answer, Mapping):
        return f"a dictionary with {', '.join(map(shown, answer)) or 'nothing'}"[:200]
    if isinstance(answer, Iterator):
        return f"a {type(answer).__name__}"
    if isinstance(answer, str | bytes):
        return "text"
    return "nothing" if answer is None else "one number" if np.ndim(answer) == 0 and np.isscalar(answer) else ""


def longest_stage(latency_ms: Mapping[str, float]) -> str:
    """A stage that took longer than `total`, in which all lie but the pending verification; "" if none did."""
    total = latency_ms.get("total", math.inf) + ROUNDING
    return next((name for name, ms in latency_ms.items() if ms > total and name != VERIFY_PENDING), "")
