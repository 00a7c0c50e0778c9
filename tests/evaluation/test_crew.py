"""Workers that go on with the next run of a comparison, on the scripted backend."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import outcomes, run

from rsd.evaluation.config import EvalConfig
from rsd.evaluation.pools import Crew, ProcessPool
from rsd.types import RsdError

CONFIG = EvalConfig(num_trials=3, tasks="0,2", policy="good", num_workers="1")


def test_workers_go_on_with_the_next_run_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of runs of their own; who dies in the second one is replaced by a worker for that one."""
    spawn, spawned = ProcessPool._spawn, list[EvalConfig]()

    def counted(pool: ProcessPool, *arguments: Any) -> Any:
        spawned.append(pool.config)
        return spawn(pool, *arguments)

    monkeypatch.setattr(ProcessPool, "_spawn", counted)
    dies = f"once:{tmp_path / 'dead'}:dies:2.1"
    first = replace(CONFIG, num_workers="2", decode="ar", output=str(tmp_path / "crew" / "ar"))
    second = replace(first, decode="rsd", policy=dies, videos="all", output=str(tmp_path / "crew" / "rsd"))
    third = replace(first, decode="rsd-async", output=str(tmp_path / "crew" / "rsd-async"))
    planned = [first, second, third]
    with Crew(planned) as crew:
        summaries = [run(each, crew=crew)[0] for each in planned]
    assert [summary.episodes for summary in summaries] == [6, 6, 6]
    assert spawned == [first, first, second]
    for each in (first, third):
        alone = replace(each, output=str(tmp_path / "alone" / each.decode))
        run(alone)
        assert outcomes(alone) == outcomes(each)
    assert sum(result.attempts for result in outcomes(second).values()) == 7
    assert len(list((second.output_dir / "videos").glob("*.mp4"))) == 6
    assert not (third.output_dir / "videos").exists()


def test_a_run_of_a_comparison_that_cannot_begin_ends_the_workers(tmp_path: Path) -> None:
    done, missing = (replace(CONFIG, policy=policy, output=str(tmp_path / policy)) for policy in ("good", "missing"))
    with Crew([done, missing]) as crew:
        assert run(done, crew=crew)[0].episodes == 6
        with pytest.raises(RsdError, match="missing: expected a checkpoint"):
            run(missing, crew=crew)
        assert not multiprocessing.active_children()
