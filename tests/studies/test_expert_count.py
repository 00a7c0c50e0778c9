"""The count of the scripted expert, without a simulator."""

import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rsd.types import RsdError
from studies import expert, expert_page
from studies.expert import CountExpertConfig, Episode, count_expert, read_episodes, run_batch, summary
from studies.expert_page import expert_table
from studies.readme_table import replaced

SOLVED = Episode("libero_goal", 0, expert.FIRST_SEED, True, 60, 1, 2.0, "")


class FakeEnv:
    """Its episodes: one that hangs, one that fails by a mistake."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def reset(self, options: dict[str, int]) -> None:
        if options["placement_seed"] == 0:
            time.sleep(5.0)
        raise ValueError("a mistake\nof two lines")

    def close(self) -> None:
        pass


def test_an_episode_that_hangs_or_breaks_is_a_failure_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert, "LiberoEnv", FakeEnv)
    config = CountExpertConfig(episode_seconds=1.0, noisy=True)
    hung, broken = run_batch("libero_goal", 0, (0, 1), config, time.time() + 60)
    assert (hung.why, broken.why) == ("took longer than 1 s", "ValueError: a mistake")
    assert hung.kind == "noisy"
    assert not hung.success
    assert not broken.success
    assert hung.seconds < 2.0
    assert run_batch("libero_goal", 0, (0, 1), config, time.time() - 1) == []  # the minutes are over


def test_a_count_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "expert.json"
    line = json.dumps(SOLVED.__dict__)
    out.with_suffix(".jsonl").write_text(f'{line}\n{{"suite": "libero_g')  # cut off in the second line
    started = list[tuple[Any, ...]]()
    monkeypatch.setattr(expert, "worker_pool", FakePool.starting(started))
    monkeypatch.setattr(expert, "refusal", lambda _, task: "beyond the expert: open x_1" if task == 3 else "")
    count_expert(CountExpertConfig(out, ("libero_goal",), (0, 3), 2))
    assert [batch[:3] for batch in started] == [("libero_goal", 0, (expert.FIRST_SEED + 1,))]
    found = json.loads(out.read_text())
    assert found["total"] == {"tasks_at_90_percent": 1, "of_tasks": 2, "solved": 1, "n": 3}
    assert "beyond the expert" in next(iter(found["suites"]["libero_goal"]["tasks"]["3"]["failures"]))
    assert read_episodes(out.with_suffix(".jsonl")) == [SOLVED]  # what it refused is asked anew
    with pytest.raises(RsdError, match="line 1: expected episodes that are noisy, found plain ones; name another"):
        count_expert(CountExpertConfig(out, ("libero_spatial",), noisy=True))
    out.with_suffix(".jsonl").write_text("[]\n")
    with pytest.raises(RsdError, match="line 1: expected an episode"):
        read_episodes(out.with_suffix(".jsonl"))


class FakePool:
    """Notes what is handed out, and runs none of it."""

    def __init__(self, started: list[tuple[Any, ...]]) -> None:
        self.started = started

    @classmethod
    def starting(cls, started: list[tuple[Any, ...]]) -> Any:
        return lambda _: cls(started)

    def __enter__(self) -> "FakePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, _: Any, *batch: Any) -> Any:
        self.started.append(batch)
        done: Future[list[Episode]] = Future()
        done.set_result([])
        return done


def test_the_page_has_the_table_of_the_committed_count() -> None:
    config = expert_page.ExpertPageConfig()
    made = expert_table(json.loads(config.results.read_text()))
    assert replaced(config.page.read_text(), made) == config.page.read_text()
    found = summary([SOLVED, Episode("libero_goal", 3, 0, False, 0, 0, 0.0, "beyond the expert: open x_1")], 1)
    assert "| libero_goal | 1 of 2 | 1/2 | not attempted 3 |" in (expert_table(json.loads(json.dumps(found))))
