"""A run in the format of `lerobot-eval`, `eval_info.json`, for tools that read that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsd.evaluation.results import EpisodeResult, by_task, scored, write_atomically
from rsd.evaluation.video import VIDEOS_DIR, video_name

EVAL_INFO_FILE = "eval_info.json"


def write_eval_info(directory: Path, episodes: Sequence[EpisodeResult]) -> None:
    write_atomically(directory / EVAL_INFO_FILE, json.dumps(eval_info(directory, episodes), indent=2) + "\n")


def eval_info(directory: Path, episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Per task, per suite and overall, as LeRobot 0.6 groups them. Errors are left out; the reward is success.

    eval_s: time of the episodes added up, whatever ran side by side.
    """
    tasks, suites = by_task(scored(episodes)), dict[str, list[EpisodeResult]]()
    for (suite, _), group in tasks.items():
        suites.setdefault(suite, []).extend(group)
    counted = [episode for group in tasks.values() for episode in group]
    seconds = sum(episode.wall_s for episode in counted)
    return {
        "per_task": [
            {
                "task_group": suite,
                "task_id": task_id,
                "metrics": {
                    "sum_rewards": [float(e.success) for e in group],
                    "max_rewards": [float(e.success) for e in group],
                    "successes": [e.success for e in group],
                    "video_paths": video_paths(directory, group),
                },
            }
            for (suite, task_id), group in tasks.items()
        ],
        "per_group": {suite: aggregate(directory, group) for suite, group in suites.items()},
        "overall": {
            **aggregate(directory, counted),
            "eval_s": seconds,
            "eval_ep_s": seconds / len(counted) if counted else 0.0,
        },
    }


def aggregate(directory: Path, episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    rate = sum(e.success for e in episodes) / len(episodes) if episodes else 0.0
    return {
        "avg_sum_reward": rate,
        "avg_max_reward": rate,
        "pc_success": 100 * rate,
        "n_episodes": len(episodes),
        "video_paths": video_paths(directory, episodes),
    }


def video_paths(directory: Path, episodes: Sequence[EpisodeResult]) -> list[str]:
    paths = [directory / VIDEOS_DIR / video_name(episode) for episode in episodes]
    return [str(path) for path in paths if path.is_file()]
