"""Independent work on several streams of a GPU, of which a compact policy's kernels leave most idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from rsd.nested import tensors_of

T = TypeVar("T")


def fork(call: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Start a call on a GPU stream of its own; the result waits for it. What it reads must live until then.

    Tensors that leave the call by another way than its result are not looked after.

    A CPU makes the call at once."""
    if device.type != "cuda":
        done = call()
        return lambda: done
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        result = call()

    def join() -> T:
        current = torch.cuda.current_stream()
        current.wait_stream(aside)
        for tensor in tensors_of(result):
            # Its memory belongs to `aside`, one of 32 streams that PyTorch gives out in turn: at times the very one on
            # which, beside `current`, a recording goes on. The tensors made there next would take this one's memory
            # as soon as Python is done with it, although kernels on `current` have yet to read it.
            tensor.record_stream(current)
        return result

    return join


def together(calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The calls' results; on a GPU all but the last run beside it. With gradients one after another."""
    if device.type != "cuda" or torch.is_grad_enabled():
        return [call() for call in calls]
    started = [fork(call, device) for call in calls[:-1]]
    last = calls[-1]()
    return [*(join() for join in started), last]
