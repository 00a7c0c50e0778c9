"""Collecting, rendering and rolling out, stopped at any time; without a simulator."""

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rsd.collection import target_rollouts, workers
from rsd.collection.collect import CollectConfig, collect
from rsd.collection.render import RenderConfig, render
from rsd.collection.target_rollouts import RolloutConfig, roll_out
from rsd.data.demonstrations import load_demonstrations
from rsd.data.schema import FILE_SUFFIX, Episode, merge
from rsd.sim.suites import suite_task
from rsd.types import RsdError

collecting, rendering = sys.modules["rsd.collection.collect"], sys.modules["rsd.collection.render"]
NAMES = [suite_task("libero_spatial", task).name for task in (0, 1)]
EACH = 6  # demonstrations of a task; batches hold 5, 4 and 2
STOPPED = 7  # so many are finished before a run is stopped: of both tasks, in every command


def episode(index: int, steps: int = 3) -> Episode:
    rng = np.random.default_rng(index)
    widths = {"actions": 7, "expert_actions": 7, "states": 9, "eef_pos": 3, "eef_quat": 4, "eef_axis_angle": 3}
    rows: dict[str, Any] = {key: rng.uniform(-1, 1, (steps, n)) for key, n in {**widths, "joints": 7}.items()}
    poses = {"gripper": np.zeros((steps, 2)), "body_pos": np.zeros((2, 3)), "body_quat": np.zeros((2, 4))}
    return Episode(index=index, success_step=steps - 1, attributes={"placement_seed": index}, **rows, **poses)


class Pool:
    """Of workers in this process, which work as soon as they are waited for."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        job: Future[Any] = Future()
        job.work = functools.partial(work, *arguments)  # type: ignore[attr-defined]
        return job

    @staticmethod
    def as_completed(jobs: Iterable[Any]) -> Iterator[Any]:
        for job in list(jobs):
            job.set_result(job.work())
            yield job


class Run:
    """A command, EACH demonstrations of both tasks; `before[n]` is called as the n-th, from 0, is about to be made."""

    def __init__(self, out: Path, parts: str, command: Callable[[], dict[str, int]]) -> None:
        self.out, self.parts, self.command = out, out / parts, command
        self.before, self.made = dict[int, Callable[[], object]](), 0

    def one(self) -> None:
        self.before.pop(self.made, lambda: None)()
        self.made += 1

    def there(self) -> Counter[str]:
        """Which can be used, by task."""
        if not any(self.out.glob(f"*{FILE_SUFFIX}")):
            return Counter()
        return Counter(demo.task for demo in load_demonstrations(self.out))

    def left(self) -> list[str]:
        return sorted(part.name for part in self.parts.glob("*/*") if part.suffix != ".damaged")

    def finish(self) -> None:
        """The same command goes on: each one is made once, and nothing is left over."""
        assert self.command() == dict.fromkeys(NAMES, EACH) == self.there()
        assert self.made == 2 * EACH
        assert self.left() == []


@pytest.fixture(params=["collect", "render", "rollouts"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    out, source = tmp_path / "out", tmp_path / "source"

    class Environment:
        image_size = 8

        def __init__(self, suite: str, task: int, *_: object, **__: object) -> None:
            self.task = suite_task(suite, task)

        def look_as(self, *_: object) -> None:
            run.one()

        def restore(self, *_: object) -> None:
            pass

        def draw(self) -> np.ndarray:
            return np.zeros((2, 8, 8, 3), np.uint8)

        def spots(self, things: object) -> np.ndarray:
            return np.zeros((0, 2), np.float32)

    class Rollout:
        def __init__(self, *_: object) -> None:
            pass

        def episode(self, index: int) -> Episode:
            run.one()
            return episode(index)

    def recorded(env: object, config: object, index: int, policy: object) -> Episode:
        run.one()
        return episode(index)

    monkeypatch.setattr(workers, "worker_pool", lambda _: nullcontext(Pool()))
    monkeypatch.setattr(workers, "as_completed", Pool.as_completed)
    for module in (workers, rendering):
        monkeypatch.setattr(module, "worker_environment", Environment)
    monkeypatch.setattr(collecting, "make_demonstration", recorded)
    monkeypatch.setattr(rendering, "check_gl", lambda: None)
    monkeypatch.setattr(target_rollouts, "worker_target", lambda *_: (SimpleNamespace(image_size=8), None))
    monkeypatch.setattr(target_rollouts, "Rollout", Rollout)
    if request.param == "collect":
        collected = CollectConfig(out, tasks=(0, 1), num_demos=EACH, states_only=True)
        run = Run(out, ".parts", lambda: collect(collected))
    elif request.param == "rollouts":
        rolled = RolloutConfig(out, "libero_spatial", (0, 1), EACH, "target", {}, 8)
        run = Run(out, ".parts", lambda: roll_out(rolled, lambda: SimpleNamespace()))  # type: ignore[arg-type,return-value]
    else:
        source.mkdir()
        attributes, provenance = {"env_args": '{"env_kwargs": {}}'}, {"settings": {"suite": "libero_spatial"}}
        for name in NAMES:
            workers.make_parts(tmp_path / name, list(range(EACH)), episode)
            merge(source / f"{name}{FILE_SUFFIX}", workers.part_files(tmp_path / name), attributes, provenance)
        run = Run(out, ".rendered", lambda: render(RenderConfig(source, out, image_size=8)))
    return run


def interrupt() -> None:
    raise KeyboardInterrupt


class WorkerFails(Exception):
    pass


def fail() -> None:
    raise WorkerFails


@pytest.mark.parametrize(
    ("stop", "raised"),
    [
        (interrupt, KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), KeyboardInterrupt),
        (fail, WorkerFails),
    ],
    ids=["Ctrl-C", "SIGTERM", "a worker"],
)
def test_what_a_stopped_run_has_finished_can_be_used(
    run: Run, stop: Callable[[], object], raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    run.before[STOPPED] = stop
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(raised):
            run.command()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopping: what is finished is merged" in capsys.readouterr().err
    assert sum(run.there().values()) == STOPPED
    assert len(run.there()) == 2
    assert run.left() == []
    run.finish()


def stop_merging(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> list[str]:
    """The next file of a task that is written, named in the list, is interrupted: as it is in place, or just before."""
    replace, stopped = os.replace, list[str]()

    def interrupted(there: Path, path: Path) -> None:
        if not str(path).endswith(FILE_SUFFIX) or stopped:
            return replace(there, path)
        if in_place:
            replace(there, path)
        stopped.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    return stopped


@pytest.mark.parametrize("in_place", [False, True])
def test_an_interruption_of_the_merging_does_not_end_it(
    run: Run, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = stop_merging(monkeypatch, in_place)
    with pytest.raises(KeyboardInterrupt):
        run.command()
    assert stopped
    assert run.there() == dict.fromkeys(NAMES, EACH)
    run.finish()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_second_interruption_during_the_merging_loses_and_repeats_nothing(
    run: Run, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.before[STOPPED] = interrupt
    stopped = stop_merging(monkeypatch, in_place)
    with pytest.raises(KeyboardInterrupt):
        run.command()
    assert stopped == [f"{NAMES[0]}{FILE_SUFFIX}"]
    assert run.there().keys() == ({NAMES[0]} if in_place else set())
    assert len(run.left()) == STOPPED  # until the file is known to be whole
    run.finish()


def test_parts_are_merged_while_others_are_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed leaves most of what it has finished."""
    monkeypatch.setattr(workers, "MERGED_AT", 2)
    there = list[int]()
    run.before[STOPPED] = lambda: there.append(sum(run.there().values()))
    run.finish()
    assert 0 < there[0] < STOPPED


def test_half_written_parts_are_made_again(run: Run) -> None:
    parts = run.parts / NAMES[1]

    def stop() -> None:
        for name in ("demo_5.hdf5", ".demo_5.hdf5.tmp"):
            (parts / name).write_bytes(b"\x89HDF\r\n\x1a\n and no more")
        raise KeyboardInterrupt

    run.before[STOPPED] = stop
    with pytest.raises(KeyboardInterrupt):
        run.command()
    assert sum(run.there().values()) == STOPPED
    run.finish()
    assert (parts / "demo_5.damaged").exists()


def test_a_file_that_cannot_be_written_costs_itself_only(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    place = run.out / f"{NAMES[0]}{FILE_SUFFIX}"

    def stop() -> None:
        place.mkdir()
        raise KeyboardInterrupt

    run.before[STOPPED] = stop
    with pytest.raises(KeyboardInterrupt):
        run.command()
    assert f"{place}: expected a file, found a folder" in capsys.readouterr().err
    place.rmdir()
    assert list(run.there()) == [NAMES[1]]
    run.finish()


@pytest.mark.parametrize("run", ["render"], indirect=True)
def test_a_rendering_in_place_that_is_stopped_keeps_every_demonstration(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run.before[STOPPED] = interrupt
    with pytest.raises(KeyboardInterrupt):
        render(RenderConfig(source, image_size=8))
    assert [demo.images is not None for demo in load_demonstrations(source)] == [True] * STOPPED + [False] * 5
    assert render(RenderConfig(source, image_size=8)) == dict.fromkeys(NAMES, EACH)
    assert [demo.images is not None for demo in load_demonstrations(source)] == [True] * 2 * EACH
    assert run.made == 2 * EACH


@pytest.mark.parametrize("run", ["render"], indirect=True)
def test_parts_with_other_images_are_refused_and_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be merged into the files of this run."""
    run.before[STOPPED] = interrupt
    stop_merging(monkeypatch, in_place=False)
    with pytest.raises(KeyboardInterrupt):
        run.command()
    with pytest.raises(RsdError, match=r"demo_0.hdf5 holds images of 8 px of every 1. step.* of every 2. step"):
        render(RenderConfig(tmp_path / "source", run.out, image_size=8, every=2))
    assert len(run.left()) == STOPPED
    run.finish()


def test_work_at_hand_is_dropped_as_a_run_is_interrupted() -> None:
    others, start = multiprocessing.active_children(), time.monotonic()

    def interrupted() -> None:
        with workers.worker_pool(1) as pool:
            job = pool.submit(time.sleep, 30)
            while not job.running():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 20
    assert multiprocessing.active_children() == others
