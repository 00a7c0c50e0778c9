"""What a strategy runs on: PyTorch operation by operation, CUDA graphs, compiled or not, or ONNX graphs on a CPU."""

from __future__ import annotations

import logging
import os

import torch

from rsd.decoding.cuda_graph import CompiledGraph, CudaGraph
from rsd.decoding.onnx_graph import OnnxGraph, missing_packages
from rsd.decoding.recorded import RecordedStrategy, Recorder
from rsd.decoding.strategies import STRATEGIES, Strategy
from rsd.types import AUTO, COMPILED, CUDA_GRAPHS, EAGER, ENGINES, ONNX, RsdError

RECORDERS: dict[str, tuple[str, Recorder]] = {
    CUDA_GRAPHS: ("cuda", CudaGraph),
    COMPILED: ("cuda", CompiledGraph),
    ONNX: ("cpu", OnnxGraph),
}
VARIABLE = "RSD_ENGINE"  # what `auto` takes on a CPU, if it is set
LOG = logging.getLogger(__name__)


def choose_engine(asked: str, device: str, recordable: bool, compact: bool = True) -> str:
    """The engine for a device such as cpu or cuda:1; recordable: whether the strategy can become a graph there;
    compact: whether the models are the compact ones, and not OpenVLA's.

    `auto` takes graphs where they can be had and `eager` elsewhere; what is asked for by name and cannot be had is
    an `RsdError`.
    """
    if asked not in ENGINES:
        raise RsdError(f"engine {asked!r}: expected one of {', '.join(ENGINES)}")
    kind = torch.device(device).type
    if asked in RECORDERS:
        if kind != (expected := RECORDERS[asked][0]):
            raise RsdError(f"engine {asked!r}: expected device {expected}, found {device}; take auto or eager")
        if not recordable:
            why = "not for drawn tokens, acceptance 'exact' (fine='sequential'), or OpenVLA on a CPU"
            raise RsdError(f"engine {asked!r}: {why}; take auto or eager")
        if asked == COMPILED and not compact:
            raise RsdError("engine 'compiled': not for OpenVLA, which `rsd bench openvla` times compiled; take auto")
        if asked == ONNX and (missing := missing_packages()):
            raise RsdError(f"engine 'onnx': expected {', '.join(missing)}; pip install {' '.join(missing)}")
    if asked != AUTO:
        return asked
    if not recordable:
        return EAGER
    if kind == "cuda":
        return CUDA_GRAPHS
    if kind != "cpu":
        return EAGER
    wanted = os.environ.get(VARIABLE, AUTO)
    if wanted not in (AUTO, EAGER, ONNX):
        raise RsdError(f"{VARIABLE}={wanted}: expected {AUTO}, {EAGER} or {ONNX}; set it anew, or unset it")
    if wanted != AUTO:
        return choose_engine(wanted, device, recordable)
    if missing := missing_packages():
        LOG.warning("%s not installed: engine eager, about half as fast on a CPU", ", ".join(missing))
        return EAGER
    return ONNX


def strategy_on(engine: str, name: str) -> Strategy:
    """A strategy of `STRATEGIES` on an engine that `choose_engine` chose."""
    return STRATEGIES[name] if engine == EAGER else RecordedStrategy(name, RECORDERS[engine][1])
