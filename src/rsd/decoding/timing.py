"""Wall time by stage, with the device synchronised at both ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Wall time by stage in milliseconds; a stage that comes again is added up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ms = device, dict[str, float]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
