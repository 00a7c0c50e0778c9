"""What primitives run on: PyTorch operation by operation, CUDA graphs, compiled or not, or ONNX graphs on a CPU, with
float numbers or 8-bit ones."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rsd.decoding.primitives import Primitives, Step
from rsd.devices import cpu_model, multiplies_int8
from rsd.environment import ENGINE, variable
from rsd.nested import signature, tensors_of, with_tensors
from rsd.runtime.cuda_graph import compiled_graph, cuda_graph
from rsd.runtime.onnx_graph import OnnxGraphs, missing_packages
from rsd.types import AUTO, COMPILED, CUDA_GRAPHS, EAGER, ENGINE_DEVICES, ENGINES, ONNX, ONNX_INT8, RsdError

CUDA = {CUDA_GRAPHS: cuda_graph, COMPILED: compiled_graph}
LOG = logging.getLogger(__name__)
T = TypeVar("T")
Call = Callable[[Sequence[Tensor]], Any]
# makes of a call on tensors of fixed shapes another one that gives the same; the step names it among all calls with the
# models and the rule of these primitives
Recorder = Callable[[Step, Primitives, Call, Sequence[Tensor]], Call]
KEPT = 128  # recordings of other shapes, as prompts of other lengths have them; the one used longest ago gives way


class Recordings:
    """An `Engine` that records what it is given once for every kind of input. whole: compositions as one recording."""

    def __init__(self, recorder: Recorder, whole: bool) -> None:
        self.recorder, self.whole = recorder, whole
        self._recordings: OrderedDict[Any, Call] = OrderedDict()

    def __call__(self, ops: Primitives, step: Step, body: Callable[..., T], args: tuple[Any, ...]) -> T:
        tensors, kind = list(tensors_of(args)), (step, signature(args))
        if kind not in self._recordings:
            earlier, ops.checks = ops.checks, []  # of calls before this one: not part of the recording

            def call(given: Sequence[Tensor]) -> tuple[T, Tensor]:
                result = body(ops, *with_tensors(args, iter(given)))
                checks, ops.checks = ops.checks, []
                # finite if all outputs noted so far were
                return result, torch.stack(checks).sum() if checks else torch.zeros((), device=ops.watch.device)

            self._recordings[kind] = self.recorder(step, ops, call, tensors)
            ops.checks = earlier
            if len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(kind)
        result, finite = self._recordings[kind](tensors)
        ops.checks.append(finite)
        return result


def choose_engine(asked: str, device: str, recordable: bool, compact: bool = True) -> str:
    """The engine for a device such as cpu or cuda:1; recordable: whether what is decoded can become a graph there;
    compact: whether the models are the compact ones, and not OpenVLA's.

    `auto` takes graphs where they can be had and `eager` elsewhere; what is asked for by name and cannot be had is
    an `RsdError`."""
    if asked not in ENGINES:
        raise RsdError(f"engine {asked!r}: expected one of {', '.join(ENGINES)}")
    kind = torch.device(device).type
    if asked in ENGINE_DEVICES:
        if kind != (expected := ENGINE_DEVICES[asked]):
            raise RsdError(f"engine {asked!r}: expected device {expected}, found {device}; take auto or eager")
        if not recordable:
            why = "not for drawn tokens, acceptance 'exact' (fine='sequential'), or OpenVLA on a CPU"
            raise RsdError(f"engine {asked!r}: {why}; take auto or eager")
        if asked == COMPILED and not compact:
            raise RsdError("engine 'compiled': not for OpenVLA, which `studies.openvla` times so; take auto")
        if kind == "cpu" and (missing := missing_packages()):
            raise RsdError(f"engine {asked!r}: expected {', '.join(missing)}; pip install {' '.join(missing)}")
        if asked == ONNX_INT8 and not multiplies_int8():
            expected = "a CPU with AVX-512 VNNI, AVX-VNNI, AMX or Arm's dot product"
            raise RsdError(f"engine 'onnx-int8': expected {expected}, found {cpu_model()}; take onnx")
    if asked != AUTO:
        return asked
    if not recordable or kind not in ("cpu", "cuda"):
        return EAGER
    if kind == "cuda":
        return CUDA_GRAPHS
    if (wanted := variable(ENGINE, AUTO)) != AUTO:
        return choose_engine(wanted, device, recordable)
    if missing := missing_packages():
        LOG.warning("%s not installed: engine eager, about half as fast on a CPU", ", ".join(missing))
        return EAGER
    return ONNX


def make_engine(engine: str) -> Recordings | None:
    """What `Primitives` take for an engine that `choose_engine` chose. A GPU gains by whole compositions, whose parts
    overlap there; on a CPU the primitives are shared between decoders and rules, and lose nothing."""
    if engine == EAGER:
        return None
    if engine in CUDA:
        return Recordings(CUDA[engine], whole=True)
    return Recordings(OnnxGraphs(int8=engine == ONNX_INT8), whole=False)
