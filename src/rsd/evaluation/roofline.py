"""What a prediction costs here at the least: its arithmetic at the device's best rate, or reading its weights.

Rates are measured, not read off a data sheet: what a large product and a large copy reach here, now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Ceiling:
    """flops: of a large matrix product, FLOP/s; bandwidth: of a large copy, bytes/s read plus written."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Of one call: floating-point operations of products, convolutions and attention; bytes of weights it reads, once
    for every operation that uses them."""

    flops: float
    weight_bytes: float

    def ideal_ms(self, ceiling: Ceiling) -> float:
        """The longer of the two, as if both overlapped perfectly."""
        return 1e3 * max(self.flops / ceiling.flops, self.weight_bytes / ceiling.bandwidth)


class WeightReads(TorchDispatchMode):
    """Adds up the bytes of a module's parameters that operations are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self._storages = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._storages:
                    self.bytes += value.numel() * value.element_size()
        return func(*args, **(kwargs or {}))


def work_of(call: Callable[[], object], module: nn.Module) -> Work:
    """Count one call, run eagerly, that uses the module's parameters."""
    with FlopCounterMode(display=False) as counter, WeightReads(module) as reads:
        call()
    return Work(float(counter.get_total_flops()), float(reads.bytes))


@torch.inference_mode()
def measure_ceiling(device: torch.device, dtype: torch.dtype = torch.float32) -> Ceiling:
    """About two seconds on a CPU, less on a GPU."""
    side, length = (8192, 2**30) if device.type == "cuda" else (1536, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.matmul(a, b), device)
    copy = _fastest(lambda: target.copy_(source), device)
    return Ceiling(2 * side**3 / product, 2 * length / copy)


def _fastest(call: Callable[[], object], device: torch.device, tries: int = 6, calls: int = 3) -> float:
    """Seconds of one call in the fastest of several rows of calls; the first row warms up."""
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds[1:])
