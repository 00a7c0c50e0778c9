"""Devices that a model can run on: cpu, cuda, cuda:1."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from rsd.types import RsdError


def check_device(name: str) -> str:
    """The name itself; `RsdError` for a device that is not here or that no model computes on, such as torch's meta."""
    import torch

    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", str(name))
    if found is None:
        raise RsdError(f"device {str(name)[:60]!r}: expected cpu, cuda, or cuda with a number such as cuda:1")
    if name != "cpu":
        if not torch.cuda.is_available():
            raise RsdError(f"device {name}: no CUDA device is visible here; cpu always works")
        if (count := torch.cuda.device_count()) <= int(found[1] or 0):
            raise RsdError(f"device {name}: {count} CUDA devices are visible here, the last is cuda:{count - 1}")
    return name


def visible_gpus(name: str) -> list[str | None]:
    """Of the device `cuda`, which is every GPU of this host, what CUDA_VISIBLE_DEVICES is for each; else [None]."""
    if name != "cuda":
        return [None]
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [*given.split(",")[:count]] if count > 1 else [None]


def multiplies_int8() -> bool:
    """Whether this CPU adds up products of 8-bit integers in 32 bits at once; others are slower so, or overflow."""
    return any(re.search(r"\b(avx512_vnni|avx_vnni|amx_int8|asimddp)\b", line) for line in _cpu_lines())


def _cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []


def cpu_model() -> str:
    lines = _cpu_lines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
