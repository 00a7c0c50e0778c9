import json
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.scripted import SCRIPTED, CountingEnv
from rsd.types import RsdError
from studies.throughput import Measured, ThroughputConfig, measure_throughput, ratios


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
    output = tmp_path / "deep" / "throughput.json"
    config = ThroughputConfig(
        tasks="0,2", init_states="1,9", num_trials=2, policy="good", num_workers="1", output=output
    )
    plain = replace(SCRIPTED, make_env=later_env)
    measure_throughput(config, fast=SCRIPTED, plain=plain)
    record = json.loads(config.output.read_text())
    # task 2 takes a step more there, which from state 9 the limit does not allow
    assert record["same"] == {"episodes": 4, "success": 3, "steps": 3, "different": [["libero_spatial", 2, 9]]}
    assert record["measured"]["plain loop"]["steps"] == record["measured"]["rsd eval"]["steps"] + 1
    assert record["measured"]["plain loop"]["cpu_s"] > 0
    assert "3, 3 of 4" in capsys.readouterr().out


def test_a_plain_loop_that_takes_too_long_is_extrapolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ThroughputConfig(
        tasks="0,2", num_trials=3, policy="slow", num_workers="2", plain_limit_s=0.001, output=tmp_path / "t.json"
    )
    record = measure_throughput(config, fast=SCRIPTED, plain=SCRIPTED)
    assert record["measured"]["rsd eval"]["episodes"] == 6
    assert record["measured"]["plain loop"]["episodes"] == 2  # each worker's first
    assert record["same"]["episodes"] == record["same"]["steps"] == 2
    assert record == json.loads(config.output.read_text())
    assert "the rest extrapolated" in capsys.readouterr().out


def test_what_is_done_is_kept_where_the_plain_loop_breaks(tmp_path: Path) -> None:
    config = ThroughputConfig(tasks="0", policy="good", num_workers="1", output=tmp_path / "throughput.json")
    broken = replace(SCRIPTED, make_env=None)  # type: ignore[arg-type]
    with pytest.raises(RsdError):
        measure_throughput(config, fast=SCRIPTED, plain=broken)
    assert set(json.loads(config.output.read_text())["measured"]) == {"rsd eval"}


def test_a_comparison_with_errors_is_none(tmp_path: Path) -> None:
    config = ThroughputConfig(tasks="0", policy="raises", num_workers="1", output=tmp_path / "throughput.json")
    with pytest.raises(RsdError, match="1 of 1 episode ended in an error"):
        measure_throughput(config, fast=SCRIPTED, plain=SCRIPTED)
    assert not config.output.exists()


def test_rates_count_what_they_say() -> None:
    fast = Measured(wall_s=30.0, episode_s=40.0, cpu_s=50.0, workers=2, episodes=8, steps=800)
    plain = Measured(wall_s=120.0, episode_s=200.0, cpu_s=210.0, workers=2, episodes=4, steps=400)
    assert fast.steps_per_second == 40.0
    # 400 more steps at 0.5 s each, two at a time; the 20 s of start-up only once
    assert plain.wall_for(800) == 220.0
    found = ratios({"rsd eval": fast, "plain loop": plain})
    assert found == pytest.approx({"wall": 220 / 30, "running": 40 / 4, "cpu": (210 / 400) / (50 / 800)})
