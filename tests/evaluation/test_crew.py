"""Workers that go on with the next run of a comparison, and that share several GPUs, on the scripted backend."""

import io
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scripted import SCRIPTED, make_prepared_batch_policy
from test_evaluate import outcomes, run

from rsd.devices import visible_gpus
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
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


@pytest.mark.parametrize("dies", [False, True])
def test_cuda_is_every_gpu_of_the_host(dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy each, the workers shared out; where one dies, its workers alone begin anew. Episodes are the same."""
    alone = replace(CONFIG, output=str(tmp_path / "alone"))
    run(alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    (prepared := tmp_path / "prepared").mkdir()
    monkeypatch.setenv("SCRIPTED_PREPARED", str(prepared))
    policy = f"once:{tmp_path / 'dead'}:dies:2.1" if dies else "good"
    shared = replace(CONFIG, device="cuda", policy=policy, batch=2, num_workers="4", output=str(tmp_path / "shared"))
    backend = replace(SCRIPTED, make_batch_policy=make_prepared_batch_policy)
    assert evaluate(shared, backend=backend, console=Console(file=io.StringIO())).errors == 0
    assert {k: replace(e, chunk_stats={}, attempts=1) for k, e in outcomes(shared).items()} == outcomes(alone)
    policies = Counter(path.name.split()[3] for path in prepared.glob("policy *"))
    workers = Counter(path.name.split()[3] for path in prepared.glob("libero_spatial *"))
    assert sorted(policies.values()) == ([1, 2] if dies else [1, 1])
    assert set(policies) == set(workers) == {"5", "7"}
    assert dies or set(workers.values()) == {2}
    assert min(workers.values()) == 2  # those of the other GPU's policy have gone on


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert visible_gpus("cuda") == ["0", "1", "2"]
    assert visible_gpus("cuda:1") == visible_gpus("cpu") == [None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_gpus("cuda") == [None]
