"""A call on CUDA tensors as one graph.

A compact policy is a thousand small kernels; launching them one by one takes longer than computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsd.decoding.steps import Decoder


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
