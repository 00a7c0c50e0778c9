"""One closed-loop episode: observe, predict a chunk, execute it, until success or the step limit."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import told
from rsd.evaluation.realtime import Meanwhile, Motion, Pace
from rsd.evaluation.results import ERROR_PREFIX, STEP_LIMIT, EpisodeResult
from rsd.types import ChunkStats, Policy, WrongOption

if TYPE_CHECKING:  # start-up time: MuJoCo. What an episode needs of a simulator is what it has
    from rsd.sim.failures import WatchedLibero as Environment

WARMUP_PREDICTIONS = 2  # first predictions pay for lazy initialisation, allocation and compilation


@dataclass(frozen=True)
class Rollout:
    """An episode's result, and to replay it the actions executed in each chunk, each float32 [<= H, 7], with the images
    seen before each, where the step before drew them."""

    result: EpisodeResult
    actions: tuple[NDArray[np.float32], ...]
    traceback: str = ""
    seen: tuple[NDArray[np.uint8], ...] = ()


def run_episode(
    env: Environment,
    policy: Policy,
    *,
    suite: str,
    task_id: int,
    task_name: str,
    init_state: int,
    seed: int,
    decode: str,
    warmup: int = 0,
    pace: Pace | None = None,
) -> Rollout:
    """Run one episode from a fixed initial state; its outcome depends on nothing that ran before it.

    warmup: predictions made and thrown away before the first step, so that they are in no latency.
    pace: how policy and simulator take turns, as fast as possible by default; a new one for each episode.
    An exception of policy or simulator ends the episode and is recorded as an error, which is not a failure
    of the policy: no other action is ever executed in place of a prediction. Raises WrongOption: no episode can be run.
    """
    start = time.perf_counter()
    success, failure, trace = False, "", ""
    pace = pace or Pace()
    try:
        env.reset(options={"init_state": init_state})
        with pace:
            if warmup:  # a policy of one's own may need that before anything else
                policy.reset(episode_seed(seed, task_id, init_state))
            for _ in range(warmup):
                pace.warm_up(policy, env.observation())
            policy.reset(episode_seed(seed, task_id, init_state))
            done = False
            while not done:
                _, _, terminated, truncated, _ = pace.turn(policy, env)
                success, done = bool(terminated), bool(terminated or truncated)
        failure = "" if success else STEP_LIMIT
    except WrongOption:
        raise
    except Exception as error:
        success, trace = False, traceback.format_exc()
        failure = f"{ERROR_PREFIX}{type(error).__name__}: {told(error, 1000)}"
    result = EpisodeResult(
        suite=suite,
        task_id=task_id,
        task_name=task_name,
        instruction=env.instruction,
        init_state=init_state,
        seed=seed,
        decode=decode,
        success=success,
        steps=sum(len(actions) for actions in pace.executed),
        failure=failure,
        failure_detail="" if success or trace else env.failure_detail(),
        wall_s=time.perf_counter() - start,
        sources=pace.sources,
        **decoded(pace.stats, pace.motions),
    )
    return Rollout(result, tuple(pace.executed), trace, tuple(pace.seen))


def episode_seed(seed: int, task_id: int, init_state: int) -> int:
    """A policy's own seed for one episode: independent of the worker and of the order of the episodes."""
    return int(np.random.SeedSequence([seed, task_id, init_state]).generate_state(1)[0])


def decoded(stats: Sequence[ChunkStats], motions: Sequence[Motion | Meanwhile] = ()) -> dict[str, Any]:
    """The fields of an episode's result that say how its chunks were decoded; a stage that a chunk did without took it
    0 ms."""
    stages = dict.fromkeys(stage for chunk in stats for stage in chunk.latency_ms)
    return {
        "acceptance": stats[0].acceptance if stats else "",
        "chunks": len(stats),
        "latency_ms": {stage: [float(chunk.latency_ms.get(stage, 0.0)) for chunk in stats] for stage in stages},
        "num_drafts": sum(bool(chunk.num_draft_tokens) for chunk in stats),
        "num_draft_tokens": sum_per_level(chunk.num_draft_tokens for chunk in stats),
        "num_accepted_tokens": sum_per_level(chunk.num_accepted_tokens for chunk in stats),
        "accepted_levels": [chunk.accepted_levels for chunk in stats if chunk.num_draft_tokens],
        "prefills": sum(chunk.prefills for chunk in stats),
        "target_passes": sum(chunk.target_passes for chunk in stats),
        "chunk_stats": {**further_stats(stats), **further_stats(motions)},
    }


def further_stats(stats: Sequence[ChunkStats | Motion | Meanwhile]) -> dict[str, list[float | None]]:
    """Every number or flag of the chunks that has no field of its own in `EpisodeResult`, of whatever any chunk knows
    one: name -> one value a chunk."""
    found: dict[str, list[float | None]] = {}
    own = {field.name for field in fields(EpisodeResult)}
    for name in [field.name for field in fields(stats[0]) if field.name not in own] if stats else []:
        values = [getattr(chunk, name) for chunk in stats]
        if all(value is None or isinstance(value, int | float) for value in values):
            found[name] = [None if value is None else float(value) for value in values]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def sum_per_level(counts: Iterable[list[int]]) -> list[int]:
    """Sum count lists level by level; a chunk that stopped at a coarser level counts 0 below it."""
    return [int(sum(level)) for level in zip_longest(*counts, fillvalue=0)]
