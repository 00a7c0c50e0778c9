"""Independent work on several streams of a GPU, of which a compact policy's kernels leave most idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def fork(call: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Start a call on a GPU stream of its own; the result waits for it. What it reads must live until then.

    A CPU makes the call at once."""
    if device.type != "cuda":
        done = call()
        return lambda: done
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        result = call()

    def join() -> T:
        torch.cuda.current_stream().wait_stream(aside)
        return result

    return join


def together(calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The calls' results; on a GPU all but the last run beside it. With gradients one after another."""
    if device.type != "cuda" or torch.is_grad_enabled():
        return [call() for call in calls]
    started = [fork(call, device) for call in calls[:-1]]
    last = calls[-1]()
    return [*(join() for join in started), last]
