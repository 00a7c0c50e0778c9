"""From episodes to the numbers of a run: success with its interval, latency, acceptance, passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsd.evaluation.acceptance import Acceptance, acceptance
from rsd.evaluation.results import EpisodeResult, RunRecord, by_task, scored
from rsd.evaluation.rollout import sum_per_level
from rsd.evaluation.statistics import percentiles, wilson


@dataclass(frozen=True)
class SuccessRate:
    """successes of n episodes; low and high: Wilson 95 % interval, in [0, 1]."""

    successes: int
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class TaskSummary:
    """mean_success_steps: environment steps of the successful episodes; None without one."""

    suite: str
    task_id: int
    instruction: str
    success: SuccessRate
    errors: int
    mean_success_steps: float | None

    @property
    def task(self) -> tuple[str, int]:
        return self.suite, self.task_id


@dataclass(frozen=True)
class DecodingSummary(Acceptance):
    """How the chunks of a run were decoded, and what became of drafts.

    latency_ms: stage -> {"p50", "p95"} over all chunks (ms).
    chunk_stats: further statistic -> {"mean", "p50", "p95", "n"} over the chunks that have it.
    """

    chunks: int = 0
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    prefills_per_chunk: float = 0.0
    target_passes_per_chunk: float = 0.0
    chunk_stats: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSummary:
    """`summary.json`. wall_time_s: of the last invocation; episode_time_s: summed over episodes.

    errors: episodes that ended in an exception; they are in none of the other numbers.
    """

    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    policy: dict[str, Any]
    episodes: int
    errors: int
    success: SuccessRate
    tasks: list[TaskSummary]
    decoding: DecodingSummary
    num_workers: int
    wall_time_s: float
    episode_time_s: float


def success_rate(episodes: Sequence[EpisodeResult]) -> SuccessRate:
    successes = sum(episode.success for episode in episodes)
    return SuccessRate(successes, len(episodes), *wilson(successes, len(episodes)))


def summarize_tasks(episodes: Iterable[EpisodeResult]) -> list[TaskSummary]:
    return [
        TaskSummary(
            suite=suite,
            task_id=task_id,
            instruction=group[0].instruction,
            success=success_rate(scored(group)),
            errors=sum(episode.is_error for episode in group),
            mean_success_steps=mean_success_steps(group),
        )
        for (suite, task_id), group in by_task(episodes).items()
    ]


def mean_success_steps(episodes: Iterable[EpisodeResult]) -> float | None:
    steps = [episode.steps for episode in episodes if episode.success]
    return sum(steps) / len(steps) if steps else None


def summarize_decoding(episodes: Sequence[EpisodeResult]) -> DecodingSummary:
    """episodes: those that count (`results.scored`)."""
    latencies = pooled(episode.latency_ms for episode in episodes)
    further = pooled(episode.chunk_stats for episode in episodes)
    chunks = sum(episode.chunks for episode in episodes)
    found = acceptance(
        episodes[0].acceptance if episodes else "",
        sum_per_level(episode.num_draft_tokens for episode in episodes),
        sum_per_level(episode.num_accepted_tokens for episode in episodes),
        [levels for episode in episodes for levels in episode.accepted_levels],
    )
    return DecodingSummary(
        **vars(found),
        chunks=chunks,
        latency_ms={
            stage: dict(zip(("p50", "p95"), percentiles(values), strict=True))
            for stage, values in latencies.items()
            if values
        },
        prefills_per_chunk=sum(e.prefills for e in episodes) / chunks if chunks else 0.0,
        target_passes_per_chunk=sum(e.target_passes for e in episodes) / chunks if chunks else 0.0,
        chunk_stats={name: describe(numbers) for name, numbers in further.items() if numbers},
    )


def pooled(series: Iterable[Mapping[str, Sequence[float | None]]]) -> dict[str, list[float]]:
    """What the chunks of each episode had of something, by its name -> what all chunks that have it had."""
    found: dict[str, list[float]] = {}
    for episode in series:
        for name, values in episode.items():
            found.setdefault(name, []).extend(value for value in values if value is not None)
    return found


def describe(numbers: Sequence[float]) -> dict[str, float]:
    p50, p95 = percentiles(numbers)
    return {"mean": sum(numbers) / len(numbers), "p50": p50, "p95": p95, "n": len(numbers)}


def summarize(record: RunRecord, episodes: Sequence[EpisodeResult], num_workers: int, wall_time_s: float) -> RunSummary:
    counted = scored(episodes)
    return RunSummary(
        config=record.config, config_hash=record.config_hash, versions=record.versions, policy=record.policy,
        episodes=len(episodes), errors=len(episodes) - len(counted), success=success_rate(counted),
        tasks=summarize_tasks(episodes), decoding=summarize_decoding(counted), num_workers=num_workers,
        wall_time_s=wall_time_s, episode_time_s=sum(episode.wall_s for episode in episodes)
    )
