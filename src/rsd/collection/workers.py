"""Worker processes of collection and rendering: one thread each, one environment kept, part files of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsd.data.schema import FILE_SUFFIX, DamagedFile, open_file
from rsd.sim.libero import LiberoEnv
from rsd.types import RsdError

FILES_OF_OTHERS = ("config.json", "manifest.json", "tokenizer.json", "training_state.pt", "episodes.jsonl")


def check_place(out: Path) -> None:
    """Raises RsdError where demonstrations would come among the files of something else: of a checkpoint, a tokenizer,
    a run, or whatever the current folder holds (an empty name means that one)."""
    others = [name for name in FILES_OF_OTHERS if (out / name).exists()]
    if out.resolve() == Path.cwd():
        others += sorted(name for name in os.listdir(out) if name[0] != "." and not name.endswith(FILE_SUFFIX))
    if others:
        found = f"{others[0]} in {'the current folder' if out == Path() else out}"
        raise RsdError(f"--out: expected a folder for demonstrations alone, found {found}; choose another one")


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each; pending work is dropped if the body raises."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent, (os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        remedy = "finished work is kept: run the command again, with fewer --num-workers if memory ran out"
        raise RsdError(f"a worker process died, its messages are above; {remedy}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def progress_bar() -> Progress:
    """The bar of collection and rendering."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


_environment: tuple[tuple[Any, ...], LiberoEnv] | None = None


def worker_environment(suite: str, task_id: int, image_size: int, cameras: bool) -> LiberoEnv:
    """The environment of this worker process, reset once and kept until another task is asked for."""
    global _environment
    key = (suite, task_id, image_size, cameras)
    if _environment is None or _environment[0] != key:
        if _environment is not None:
            _environment[1].close()
        _environment = (key, LiberoEnv(suite, task_id, image_size, cameras))
        _environment[1].reset(options={"placement_seed": 0})  # hides LIBERO's marker sites
    return _environment[1]


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


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
