"""The tensors in a result made of tuples, lists, dataclasses, numbers and None: taken out, and put in again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def tensors_of(result: Any) -> Iterator[Tensor]:
    """The tensors in a result, in order; TypeError for a part of any other kind."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from tensors_of(part)
    elif is_dataclass(result) and not isinstance(result, type):
        for field in fields(result):
            yield from tensors_of(getattr(result, field.name))
    elif result is not None and not isinstance(result, int | float):
        found = type(result).__name__
        raise TypeError(f"nested result: expected tensors in tuples, lists or dataclasses, found {found}")


def with_tensors(result: Any, tensors: Iterator[Tensor]) -> Any:
    """The same result with other tensors, as many as `tensors_of` found and in that order."""
    if isinstance(result, Tensor):
        return next(tensors)
    if isinstance(result, list | tuple):
        parts = [with_tensors(part, tensors) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)  # a named tuple, or plain
    if is_dataclass(result) and not isinstance(result, type):
        return replace(result, **{f.name: with_tensors(getattr(result, f.name), tensors) for f in fields(result)})
    return result


def signature(tree: Any) -> Any:
    """What two trees have in common for which one recording does: shapes and kinds of tensors, and everything else."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, list | tuple):
        return tuple(signature(part) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return tuple(signature(getattr(tree, field.name)) for field in fields(tree))
    return tree
