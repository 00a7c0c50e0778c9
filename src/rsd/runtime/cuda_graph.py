"""Capturing a call on CUDA tensors as one graph, of PyTorch's own kernels or of those that its compiler makes.

A compact policy is a thousand small kernels, and half of an eager 7B pass at batch 1 is launches: launching them one by
one takes longer than computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from rsd.checks import told
from rsd.models.fusing import fusing
from rsd.types import RsdError

if TYPE_CHECKING:
    from rsd.decoding.primitives import Primitives, Step

T = TypeVar("T")
Call = Callable[[Sequence[Tensor]], Any]


def capture(call: Callable[[], T], warm_up: int = 2, between: Callable[[], None] | None = None) -> Callable[[], T]:
    """The call as one CUDA graph: replays give the same tensors, with new contents; random numbers are drawn anew.

    warm_up: calls before, in which libraries choose algorithms and allocate workspaces; between: done after each."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm_up):
            call()
            if between is not None:
                between()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> T:
        graph.replay()
        return result

    return replay


class Captured(Generic[T]):
    """A call with inputs of these shapes as a graph. It copies its inputs in, replays, and returns the SAME tensors
    every time: what is returned is overwritten by the next call. Without inputs on a GPU the call is made as it is."""

    def __init__(self, call: Callable[..., T], inputs: Sequence[Tensor]) -> None:
        self.call, self.inputs = call, [value.clone() for value in inputs]
        self.replay: Callable[[], T] | None = None
        if inputs and inputs[0].is_cuda:
            self.replay = capture(lambda: call(*self.inputs))

    def __call__(self, *inputs: Tensor) -> T:
        if self.replay is None:
            return self.call(*inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.replay()


def cuda_graph(step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor]) -> Call:
    """A `Recorder`: primitives as CUDA graphs."""
    captured = Captured(lambda *values: call(values), inputs)
    return lambda given: captured(*given)


def compiled_graph(step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor]) -> Call:
    """A `cuda_graph` in which everything `fusible` is compiled: seconds for every new shape, then fewer kernels.

    `RsdError` if PyTorch cannot compile here (it needs a C compiler and Triton)."""
    try:
        with fusing():
            return cuda_graph(step, ops, call, inputs)
    except RuntimeError as error:  # the compiler's own are of this kind
        found = f"{step.name} not compiled ({told(error)})"
        raise RsdError(f"engine 'compiled': {found}; take the engine 'cuda-graphs'") from error
