"""Environment variables of ours, and of torch, OSMesa and numba, which would fail on theirs in every worker or say
nothing: what each has to be."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping

from rsd.checks import RsdError, Where, one_of, shown

ENGINE, DEBUG, LEROBOT_PYTHON = OURS = "RSD_ENGINE", "RSD_DEBUG", "RSD_LEROBOT_PYTHON"
WHOLE = Where(re.compile("[0-9]{1,9}").fullmatch, "a number such as 0 or 1")
THREADS = Where(re.compile(r"0*[1-9][0-9]{0,5}(,0*[1-9][0-9]{0,5})*").fullmatch, "a number of threads such as 4")
VARIABLES: dict[str, Where] = {
    ENGINE: one_of(("auto", "eager", "onnx", "onnx-int8")),  # what `auto` takes on a CPU
    DEBUG: one_of(("0", "1")),  # 1 shows tracebacks
    LEROBOT_PYTHON: Where(os.path.isfile, "the python of an environment with LeRobot"),
    "WORLD_SIZE": Where(re.compile("0*[1-9][0-9]{0,5}").fullmatch, "a number of processes such as 1"),
    "MASTER_PORT": Where(lambda text: text.isdecimal() and 0 < int(text[:9]) < 65536, "a port such as 29500"),
    **dict.fromkeys(("RANK", "LOCAL_RANK", "LP_NUM_THREADS", "NUMBA_DISABLE_JIT", "NUMBA_DEBUG_CACHE"), WHOLE),
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), THREADS),
}


def check_environment(given: Mapping[str, str] = os.environ) -> None:
    """`RsdError` for a variable whose value cannot be meant, and for a slip in a name of ours. Empty is as unset."""
    for name in given:
        near = difflib.get_close_matches(name, OURS, 1, 0.8) if name.startswith("RSD_") else []
        if near and near[0] != name:
            raise RsdError(f"{name}: no variable of this name is read; expected {near[0]}; rename it, or unset it")
    for name in VARIABLES:
        variable(name, "", given)


def variable(name: str, default: str, given: Mapping[str, str] = os.environ) -> str:
    """Its value, or the default where it is unset or empty; `RsdError` as of `check_environment`."""
    value, allowed = given.get(name, ""), VARIABLES[name]
    if value and not allowed.holds(value):
        words = allowed.words.removeprefix("that is ")
        raise RsdError(f"{name}={shown(value)}: expected {words}; set it anew, or unset it")
    return value or default
