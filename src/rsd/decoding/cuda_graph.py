"""A call on CUDA tensors as one graph, of PyTorch's own kernels or of those that its compiler makes.

A compact policy is a thousand small kernels; launching them one by one takes longer than computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsd.decoding.steps import Decoder
from rsd.models.fusing import fusing
from rsd.types import RsdError


class CudaGraph:
    """A call of which the results are the same tensors every time, with new contents."""

    def __init__(
        self, key: str, decoder: Decoder, call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> None:
        """key and decoder name the call to recorders that keep what they record; this one keeps nothing."""
        self.inputs = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose algorithms and allocate workspaces
                call(self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call(self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result


class CompiledGraph(CudaGraph):
    """A `CudaGraph` in which everything `fusible` is compiled: seconds for every new shape, then fewer kernels.

    `RsdError` if PyTorch cannot compile here (it needs a C compiler and Triton)."""

    def __init__(
        self, key: str, decoder: Decoder, call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> None:
        try:
            with fusing():
                super().__init__(key, decoder, call, inputs)
        except RuntimeError as error:  # the compiler's own are of this kind
            raise RsdError(f"engine 'compiled': {key} not compiled ({error}); take the engine 'cuda-graphs'") from error
