"""openpi's wire format: msgpack, in which a numpy array is a map whose keys are byte strings.

As openpi-client 0.1.2 (Physical Intelligence, Apache-2.0) packs and unpacks it; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rsd.types import RsdError

try:
    import msgpack
except ImportError as error:
    raise RsdError("serving needs msgpack and websockets, found no msgpack: pip install 'rsd-vla[serve]'") from error

KINDS = "biuf"  # numpy's kinds of numbers that may travel: bool, int, unsigned, float


def pack(content: Mapping[str, Any]) -> bytes:
    """A map of numbers, texts, lists, maps and arrays as one message."""
    packed: bytes = msgpack.packb(content, default=_encode)
    return packed


def unpack(message: bytes) -> Any:
    """The inverse of `pack`; arrays are read-only. `RsdError` for anything that is no such message."""
    try:
        return msgpack.unpackb(message, object_hook=_decode)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise RsdError(f"message: expected msgpack with arrays as openpi-client packs them ({error!r})") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in KINDS:
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"expected numbers, texts, lists, maps and arrays of numbers, found {type(value).__name__}")


def _decode(content: dict[Any, Any]) -> Any:
    if b"__ndarray__" in content:
        return np.frombuffer(content[b"data"], _number(content[b"dtype"])).reshape(content[b"shape"])
    if b"__npgeneric__" in content:
        return _number(content[b"dtype"]).type(content[b"data"])
    return content


def _number(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in KINDS:
        raise ValueError(f"dtype {name}: expected a kind of number")
    return dtype
