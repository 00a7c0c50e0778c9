import json
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import SCRIPTED, CountingEnv

from rsd.evaluation.throughput import Measured, ThroughputConfig, measure_throughput
from rsd.types import RsdError


class LaterEnv(CountingEnv):
    """Takes a step more than the other for task 2: the outcomes are not all the same."""

    def reset(self, **options: dict) -> tuple:  # type: ignore[override]
        result = super().reset(**options)  # type: ignore[arg-type]
        self.needed += self.task_id == 2
        return result


def later_env(suite: str, task_id: int, image_size: int) -> LaterEnv:
    return LaterEnv(suite, task_id, image_size)


def test_both_run_the_same_episodes_and_outcomes_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ThroughputConfig(
        tasks="0,2", num_trials=2, policy="good", num_workers="1", output=tmp_path / "deep" / "throughput.json"
    )
    plain = replace(SCRIPTED, make_env=later_env)
    measure_throughput(config, fast=SCRIPTED, plain=plain)
    record = json.loads(config.output.read_text())
    assert record["same"] == {"episodes": 4, "success": 4, "steps": 2}
    assert record["measured"]["plain loop"]["steps"] == record["measured"]["rsd eval"]["steps"] + 2
    assert "4, 2 of 4" in capsys.readouterr().out


def test_a_comparison_with_errors_is_none(tmp_path: Path) -> None:
    config = ThroughputConfig(tasks="0", policy="raises", num_workers="1", output=tmp_path / "throughput.json")
    with pytest.raises(RsdError, match="1 of 1 episodes ended in an error"):
        measure_throughput(config, fast=SCRIPTED, plain=SCRIPTED)
    assert not config.output.exists()


def test_rates_count_what_they_say() -> None:
    measured = Measured(wall_s=120.0, episode_s=160.0, workers=2, episodes=8, steps=640)
    assert measured.per_minute == 4.0
    assert measured.steady_per_minute == 6.0
