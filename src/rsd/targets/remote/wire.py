"""openpi's wire format: msgpack, in which a numpy array is a map whose keys are byte strings.

As openpi-client 0.1.2 (Physical Intelligence, Apache-2.0) packs and unpacks it; nothing is ever unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsd.checks import Count, Word
from rsd.extras import extra
from rsd.types import RsdError

with extra("serve"):
    import msgpack

KINDS = "biuf"  # numpy's kinds of numbers that may travel: bool, int, unsigned, float


@dataclass(frozen=True)
class Limits:
    """What one message may hold: bytes of a text, bytes of an array, and elements of all its lists and maps together.

    They hold before anything is built of a text, an array or a list.
    """

    text: int
    array: int
    elements: int


ANSWER = Limits(text=1 << 20, array=1 << 20, elements=100_000)  # of a server: a policy's provenance is the largest


def pack(content: Mapping[str, Any]) -> bytes:
    """A map of numbers, texts, lists, maps and arrays as one message."""
    packed: bytes = msgpack.packb(content, default=_encode)
    return packed


def unpack(message: bytes, limits: Limits = ANSWER, whose: str = "message") -> Any:
    """The inverse of `pack`; arrays are read-only. `RsdError`, which `whose` begins, for what is no such message."""
    elements = 0

    def counted(part: Any) -> Any:
        nonlocal elements
        elements += 1 + len(part)
        if elements > limits.elements:
            raise ValueError(f"lists and maps hold more than {limits.elements} elements")
        return part

    try:
        return msgpack.unpackb(
            message,
            object_hook=lambda part: _decode(counted(part)),
            list_hook=counted,
            max_str_len=limits.text,
            max_bin_len=limits.array,
            max_array_len=limits.elements,
            max_map_len=limits.elements,
            max_ext_len=0,
        )
    except Exception as error:  # whatever numpy and msgpack make of it: the message's fault
        found = f"{type(error).__name__}: {error!s:.160}".rstrip(": ")
        raise RsdError(f"{whose}: expected msgpack with arrays as openpi-client packs them ({found})") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in KINDS:
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"expected numbers, texts, lists, maps and arrays of numbers, found {type(value).__name__}")


def _decode(content: dict[Any, Any]) -> Any:
    if b"__ndarray__" in content:
        shape = content[b"shape"]
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"shape {shape!r:.80}: expected whole numbers >= 0")
        return np.frombuffer(content[b"data"], _number(content[b"dtype"])).reshape(shape)
    if b"__npgeneric__" in content:
        dtype, value = _number(content[b"dtype"]), content[b"data"]
        if not isinstance(value, float if dtype.kind == "f" else int):  # true and false are integers
            raise TypeError(f"data of a number {dtype}: expected one, found {type(value).__name__}")
        return dtype.type(value)
    return content


def _number(name: Any) -> np.dtype[Any]:
    # numpy would read much more than a name
    if not isinstance(name, str) or not re.fullmatch(rf"[<>=|]?[{KINDS}][0-9]{{1,2}}", name):
        raise ValueError(f"dtype {name!r:.40}: expected a kind of number such as <f4")
    return np.dtype(name)


@dataclass(frozen=True)
class Welcome:
    """What a client gets to know on connecting. images: the keys it must send; chunk: shape of an answer's actions;
    execute: how many of them before the next request, None: all.

    policy: what names the weights beyond doubt; versions: of what computes, and the device. num_inference_steps: of a
    policy that can continue from a draft its denoising steps, else 0.
    """

    decode: Word
    image_size: int
    images: tuple[str, ...]
    chunk: tuple[int, ...]
    policy: dict[str, Any]
    versions: dict[str, str]
    execute: int | None = None
    num_inference_steps: Count = 0
