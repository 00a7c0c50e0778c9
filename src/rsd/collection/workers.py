"""Worker processes of collection, rendering and rollouts: one thread each, part files of their own, merged here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsd.checks import between
from rsd.data.schema import FILE_SUFFIX, DamagedFile, Episode, atomic_file, open_file, stored_names, write_episode
from rsd.output import Faults, attempt, terminal, writing
from rsd.processes import begin_worker, on_signals
from rsd.sim.libero import LiberoEnv
from rsd.types import RsdError

Task = TypeVar("Task")
Workers = Annotated[int, between(1, 4096)]
Made = tuple[int, list[tuple[str, str]]]  # how many pieces of a batch, and the others with their errors
PARTS = ".parts"  # folder of part files, in the one of the demonstrations
MERGED_AT = 10  # parts of a task, or as many as its file has: each byte is copied twice at most
FILES_OF_OTHERS = ("config.json", "manifest.json", "tokenizer.json", "training_state.pt", "episodes.jsonl", "meta")


class OtherSettings(RsdError):
    """Of a file that was made otherwise: a folder holds demonstrations of one kind."""


def check_place(out: Path) -> None:
    """Raises RsdError where the first demonstrations would come among the files of something else: of a checkpoint, a
    tokenizer, a run, or whatever the current folder holds (an empty name means that one)."""
    names = sorted(os.listdir(out)) if out.is_dir() else []
    here = os.path.realpath(out) == os.getcwd()  # `resolve` raises where links lead in a circle
    others = [name for name in names if name in FILES_OF_OTHERS or (here and not name.startswith("."))]
    if others and not any(name.endswith(FILE_SUFFIX) for name in names):
        found = f"{others[0]} in {'the current folder' if here else out}"
        raise RsdError(f"--out: expected a folder for demonstrations alone, found {found}; choose another one")


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each; work that is pending or at hand is dropped if the body raises."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        remedy = "finished work is kept: run the command again, with fewer --num-workers if memory ran out"
        raise RsdError(f"a worker process died, its messages are above; {remedy}") from error
    except BaseException:  # two batches take longer than a cluster waits after SIGTERM
        for process in set(multiprocessing.active_children()).difference(others):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def make_all(
    what: str,
    names: Mapping[Task, str],
    have: Mapping[Task, Collection[object]],
    batches: Sequence[tuple[Task, Sequence[object]]],
    make: Callable[..., Made],
    merge: Callable[[Task], int],
    faults: Faults,
    num_workers: int,
) -> dict[str, int]:
    """`make(task, pieces)` of every batch in a worker, and `merge(task)` of the parts -> how many each task of `have`
    has then, by name. Parts are merged as they double and in the end, also where Ctrl-C, SIGTERM or an error ends the
    run; a further signal leaves the rest to the next run. A file that cannot be merged costs itself only."""
    merged, fresh = {task: len(done) for task, done in have.items()}, dict.fromkeys(have, 0)
    count = sum(merged.values())
    total = count + sum(len(pieces) for _, pieces in batches)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=terminal(stderr=True), disable=not have)
    shown = bar.add_task(what, total=total, completed=count)

    def merge_of(task: Task) -> None:
        fresh[task] = 0
        try:
            merged[task] = merge(task)
        except RsdError as error:
            print(f"warning: {names[task]}: {error}", file=sys.stderr)
            faults.failed(f"{names[task]}{FILE_SUFFIX}", str(error))

    with on_signals(signal.default_int_handler, signal.SIGTERM):
        try:
            with worker_pool(num_workers) as pool, bar:
                jobs = {pool.submit(make, *batch): batch[0] for batch in batches}
                for job in as_completed(jobs):
                    task = jobs[job]
                    done, failed = job.result()
                    if done:
                        faults.worked()
                    for piece, fault in failed:
                        faults.failed(f"{names[task]} {piece}", fault)
                    count, fresh[task] = count + done, fresh[task] + done
                    bar.update(shown, completed=count)
                    if not bar.console.is_terminal:
                        print(f"{count}/{total} {what}, last: {names[task]}", file=sys.stderr)
                    if fresh[task] >= max(MERGED_AT, merged[task]):
                        merge_of(task)
            for task in have:
                merge_of(task)
        except BaseException:
            print("stopping: what is finished is merged; once more leaves that to the next run", file=sys.stderr)
            for task in have:
                merge_of(task)
            raise
    return {names[task]: number for task, number in merged.items()}


_kept: dict[tuple[str, int, int, bool], LiberoEnv] = {}  # one at most


def worker_environment(suite: str, task_id: int, image_size: int, cameras: bool) -> LiberoEnv:
    """The environment of this worker process, reset once and kept until another task is asked for."""
    key = (suite, task_id, image_size, cameras)
    if key not in _kept:
        for other in list(_kept):
            _kept.pop(other).close()
        env = LiberoEnv(*key)
        env.reset(options={"placement_seed": 0})  # hides LIBERO's marker sites
        _kept[key] = env
    return _kept[key]


def batched(count: int, have: Mapping[int, set[int]], size: int) -> list[tuple[int, list[int]]]:
    """By task: indices below `count` that it does not have yet, `size` of each task before more of the next."""
    missing = {task: [i for i in range(count) if i not in done] for task, done in have.items()}
    starts = range(0, count, size)
    return [(task, rest[s : s + size]) for s in starts for task, rest in missing.items() if rest[s : s + size]]


def make_parts(folder: Path, indices: list[int], make: Callable[[int], Episode]) -> Made:
    """Makes episodes, each a part file of its own."""

    def keep(name: str, episode: Episode) -> None:
        with atomic_file(folder / f"{name}.hdf5") as file:
            write_episode(file.create_group(name), episode)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return attempt([f"demo_{index}" for index in indices], lambda name: make(int(name[5:])), keep)


def finished_by_task(
    out: Path, names: Mapping[int, str], faults: Faults, check: Callable[[Path], object] = Path.exists
) -> dict[int, set[int]]:
    """By task: indices of its episodes, merged or in parts; one whose file cannot be read is a fault and left out.
    check: raises for another's."""
    have = {}
    for task, name in names.items():
        try:
            check(path := out / f"{name}{FILE_SUFFIX}")
            demos = [*(part.stem for part in part_files(out / PARTS / name)), *stored_names(path)]
            have[task] = {int(demo[5:]) for demo in demos}
        except OtherSettings:
            raise
        except RsdError as error:
            faults.failed(f"{name}{FILE_SUFFIX}", str(error))
    return have


def part_files(folder: Path) -> list[Path]:
    """Finished part files of one task, each a `demo_<i>` group. Damaged ones are put aside, to be made again; one that
    is only locked or not readable is an error."""
    found = []
    for part in sorted(folder.glob("demo_*.hdf5")):
        try:
            with open_file(part):
                found.append(part)
        except DamagedFile:
            part.replace(part.with_suffix(".damaged"))
    return found
