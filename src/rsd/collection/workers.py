"""Worker processes of collection and rendering: one thread each, one environment kept, part files of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsd.checks import between
from rsd.data.schema import FILE_SUFFIX, DamagedFile, Episode, atomic_file, open_file, stored_names, write_episode
from rsd.output import Faults, attempt, terminal, writing
from rsd.processes import begin_worker
from rsd.sim.libero import LiberoEnv
from rsd.types import RsdError

Workers = Annotated[int, between(1, 4096)]
PARTS = ".parts"  # folder of part files, in the one of the demonstrations
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
    """Fresh processes of one thread each; pending work is dropped if the body raises."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        remedy = "finished work is kept: run the command again, with fewer --num-workers if memory ran out"
        raise RsdError(f"a worker process died, its messages are above; {remedy}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def progress_bar(visible: bool = True) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=terminal(stderr=True), disable=not visible)


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


def make_parts(folder: Path, indices: list[int], make: Callable[[int], Episode]) -> tuple[int, list[tuple[int, str]]]:
    """Makes episodes, each a part file of its own -> how many, and the others with their errors."""

    def keep(index: int, episode: Episode) -> None:
        with atomic_file(folder / f"demo_{index}.hdf5") as file:
            write_episode(file.create_group(f"demo_{index}"), episode)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return attempt(indices, make, keep)


def finished(out: Path, name: str) -> set[int]:
    """Indices of a task's episodes that exist, merged or as parts."""
    parts = [part.stem for part in part_files(out / PARTS / name)]
    return {int(demo[5:]) for demo in [*parts, *stored_names(out / f"{name}{FILE_SUFFIX}")]}


def finished_by_task(
    out: Path, names: Mapping[int, str], faults: Faults, check: Callable[[Path], object] = Path.exists
) -> dict[int, set[int]]:
    """`finished` of every task; one whose file cannot be read is a fault and left out. check: raises for another's."""
    have = {}
    for task, name in names.items():
        try:
            check(out / f"{name}{FILE_SUFFIX}")
            have[task] = finished(out, name)
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
