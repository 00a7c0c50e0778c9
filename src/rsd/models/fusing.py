"""Pieces of the models and of decoding that PyTorch's compiler may make few GPU kernels of.

A piece is written as any other function. Only within `fusing()` it runs compiled, so training, exporting and decoding
operation by operation never meet the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
VARIANTS = 128  # of a piece, by shapes and sizes; PyTorch gives up after 8
Backend = str | Callable[..., Any]  # as `torch.compile` takes it
_backend: ContextVar[Backend] = ContextVar("backend", default="")


@contextmanager
def fusing(backend: Backend = "inductor") -> Iterator[None]:
    """Within, what is `fusible` runs as `torch.compile` makes it, each shape compiled when it is first met."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    before = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(before)


def fusible(function: Callable[P, T]) -> Callable[P, T]:
    """A function or method of tensors and constants that never asks the host for a tensor's content."""

    @functools.cache
    def compiled(backend: Backend) -> Callable[P, T]:
        return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not (backend := _backend.get()):
            return function(*args, **kwargs)
        return compiled(backend)(*args, **kwargs)

    return either
