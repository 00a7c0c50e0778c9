"""A policy of one's own: any class with `reset()` and `predict(observation)`, named as `module:Class` or
`path/to/file.py:Class`, seen from the current directory.

`predict` takes an `Observation` and returns actions [n, 7] to be executed, in [-1, 1], gripper -1 = open; what else the
class may have is in docs/your_policy.md. Every worker process makes one of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Count, ImageSize, checked, shown
from rsd.chunks import environment_ready
from rsd.manifest import file_sha256
from rsd.types import TARGET_ONLY, ActionChunk, ChunkStats, Observation, RsdError, Steps, check_observation

SPEC = re.compile(r"(?P<where>(?:.*\.py)|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
RENDER_SIZE = 256  # pixels a side, what LIBERO's published evaluations render
CPU = "cpu"
OWN_NAME = "_rsd_policy_"  # in front of a file's, where another module has that


class CustomPolicy:
    """One instance of the user's class as a policy. What it raises in an episode is that episode's error."""

    decode = TARGET_ONLY

    def __init__(self, spec: str, device: str = CPU, steps: int | None = None) -> None:
        """steps: of each chunk so many are executed, None: all."""
        self.spec, self._steps = spec, checked(Steps | None, steps, "steps")
        kind = find_class(spec)
        takes_device = "device" in inspect.signature(kind).parameters
        if device != CPU and not takes_device:
            raise RsdError(f"--device {device}: {spec} takes none; give its __init__ a parameter `device`")
        try:
            self.policy = kind(device=device) if takes_device else kind()
        except RsdError:
            raise
        except (Exception, SystemExit) as error:
            raise RsdError(f"{spec}: cannot be made ({type(error).__name__}: {error!s:.300})") from error
        size = getattr(self.policy, "image_size", RENDER_SIZE)
        self.image_size: int = checked(ImageSize, size, f"{spec}: image_size")
        steps = getattr(self.policy, "num_inference_steps", 0) if hasattr(kind, "continue_from") else 0
        self.num_inference_steps: int = checked(Count, steps, f"{spec}: num_inference_steps")
        self._seeded = "seed" in inspect.signature(self.policy.reset).parameters

    def reset(self, seed: int | None = None) -> None:
        self.policy.reset(seed=seed) if self._seeded else self.policy.reset()

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `total` is what the class took."""
        return self._asked(self.policy.predict, observation)

    def continue_from(self, observation: Observation, draft: NDArray[np.float32], steps: int) -> ActionChunk:
        """As `rsd.types.Continues` has it, of a class that has the method."""
        return self._asked(self.policy.continue_from, observation, draft, steps)

    def _asked(self, method: Callable[..., Any], observation: Observation, *more: Any) -> ActionChunk:
        observation = check_observation(observation)
        start = time.perf_counter()
        answer = method(observation, *more)
        stats = ChunkStats(self.decode, prefills=1, latency_ms={"total": 1e3 * (time.perf_counter() - start)})
        actions = answer.actions if isinstance(answer, ActionChunk) else answer
        return ActionChunk(environment_ready(actions, self.spec, self._steps), stats, self._steps)


def find_class(spec: str) -> Any:
    """The class that a spec names; `RsdError` for what cannot be imported or lacks a method."""
    matched = SPEC.fullmatch(checked(str, spec, "policy"))
    if matched is None:
        raise RsdError(f"policy {shown(spec)}: expected module:Class or path/to/file.py:Class")
    where, name = matched["where"], matched["name"]
    kind = getattr(_module(where), name, None)
    if not inspect.isclass(kind):
        found = "no such name" if kind is None else f"one that is {type(kind).__name__}"
        raise RsdError(f"policy {spec}: expected a class {name} in {where}, found {found}")
    if missing := [method for method in ("reset", "predict") if not callable(getattr(kind, method, None))]:
        raise RsdError(f"policy {spec}: expected the methods reset() and predict(observation), found no {missing[0]}")
    for method, given in (("reset", ()), ("predict", (None,))):
        function = inspect.getattr_static(kind, method)
        if isinstance(function, FunctionType):
            try:
                inspect.signature(function).bind(kind, *given)
            except TypeError as error:
                found = f"{method}{inspect.signature(function)}"
                raise RsdError(f"policy {spec}: expected reset() and predict(observation), found {found}") from error
    if (size := getattr(kind, "image_size", None)) is not None and not hasattr(size, "__get__"):  # else its instance's
        checked(ImageSize, size, f"{spec}: image_size")
    return kind


def identity(spec: str) -> dict[str, Any]:
    """What names the policy beyond doubt, as far as its source tells: a run is never continued with another."""
    kind = find_class(spec)
    source = inspect.getsourcefile(kind)
    known = {"policy": spec, "source_sha256": file_sha256(Path(source)) if source else ""}
    version = getattr(kind, "version", None)
    return known if version is None else {**known, "version": str(version)}


def _module(where: str) -> ModuleType:
    """Of a file, or by name from the current folder. What it imports comes from its folder before any that was
    installed, but nothing of Python's own: the worker processes import from there, too."""
    path = Path(where)
    if where.endswith(".py") and not path.is_file():
        raise RsdError(f"policy {where}: expected a file, found none in {Path.cwd()}")
    folder = str(path.resolve().parent if where.endswith(".py") else Path.cwd())
    installed = [place for place in sys.path if place.endswith("-packages")]
    hidden = PathFinder.find_spec(path.stem, installed) if where.endswith(".py") else None
    if path.name == "rsd.py" or (hidden is not None and hidden.origin not in (None, str(path.resolve()))):
        raise RsdError(f"policy {where}: would hide the package {path.stem} from whatever imports it; rename the file")
    if folder not in sys.path:
        sys.path.insert(sys.path.index(installed[0]) if installed else len(sys.path), folder)
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        return _of_file(path.resolve())
    except (Exception, SystemExit) as error:  # a script that ends itself, without `if __name__ == "__main__"`
        found = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RsdError(f"policy {where}: cannot be imported ({found}); RSD_DEBUG=1 shows where") from error


def _of_file(path: Path) -> ModuleType:
    """A module is made once, under its file's name, so that what it pickles or defines stays one and the same."""
    known = sys.modules.get(path.stem)
    for module in (known, sys.modules.get(OWN_NAME + path.stem)):
        if module is not None and getattr(module, "__file__", None) == str(path):
            return module
    name = path.stem if known is None and path.stem not in sys.stdlib_module_names else OWN_NAME + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RsdError("not a file that Python imports")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
