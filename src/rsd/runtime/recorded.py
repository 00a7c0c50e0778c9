"""Primitives without PyTorch's cost of every single operation: recorded once as graphs, run for every observation.

On a GPU a graph is a CUDA graph, on a CPU one of ONNX Runtime. What the host has to decide lies between two graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rsd.decoding.primitives import Primitives, Step
from rsd.nested import signature, tensors_of, with_tensors

T = TypeVar("T")
Call = Callable[[Sequence[Tensor]], Any]
KEPT = 128  # recordings of other shapes, as prompts of other lengths have them; the one used longest ago gives way


class Recorder(Protocol):
    """Makes of a call on tensors of fixed shapes another one that gives the same; see `cuda_graph` and `OnnxGraphs`."""

    def __call__(self, step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor]) -> Call:
        """step: names the call among all calls with the models and the rule of these primitives."""
        ...


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
                return result, sound(ops)

            self._recordings[kind] = self.recorder(step, ops, call, tensors)
            ops.checks = earlier
            if len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(kind)
        result, finite = self._recordings[kind](tensors)
        ops.checks.append(finite)
        return result


def sound(ops: Primitives) -> Tensor:
    """A number that is finite if all outputs noted so far were; takes them off the list."""
    checks, ops.checks = ops.checks, []
    return torch.stack(checks).sum() if checks else torch.zeros((), device=ops.watch.device)
