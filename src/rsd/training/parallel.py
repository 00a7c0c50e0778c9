"""Several training processes, one a GPU, started by `torchrun`: same weights, different batches, averaged gradients.

Not `DistributedDataParallel`: the losses call parts of the model one by one, which its wrapper does not see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rsd.environment import variable
from rsd.types import RsdError

TORCHRUNS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def join() -> None:
    """Join the process group that `torchrun` describes in the environment; without one, do nothing."""
    if launched() and not dist.is_initialized():
        size, given = int(variable("WORLD_SIZE", "1")), [name for name in TORCHRUNS if os.environ.get(name)]
        if len(given) < len(TORCHRUNS) or not int(variable("RANK", "0")) < size:
            found = ", ".join(f"{name}={os.environ[name]}" for name in given) or "none"
            expected = f"expected {' and '.join(TORCHRUNS)}, RANK below {size}, found {found}"
            raise RsdError(f"WORLD_SIZE={size}: {expected}; begin it by torchrun, or unset WORLD_SIZE")
        dist.init_process_group()


def launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return int(variable("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one transfer."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def from_first(value: float, device: torch.device) -> float:
    """The first process's value, in every process."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], device=device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def broadcast_parameters(model: torch.nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
