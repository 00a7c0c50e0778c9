"""Two processes on the CPU train one model: the same weights in both, from different batches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from rsd.training import parallel
from rsd.training.loop import LoopConfig, train
from rsd.types import RsdError

STEPS = 80


def work(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29_000 + os.getppid() % 2_000))
    torch.set_num_threads(1)
    parallel.join()
    torch.manual_seed(rank)  # different weights to begin with: the first process's must win
    model = nn.Linear(4, 1)
    batches = []

    def losses() -> dict[str, Tensor]:
        x = torch.randn(8, 4)
        batches.append(x)
        return {"total": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    loop = LoopConfig(steps=STEPS, warmup=1, learning_rate=0.2, log_every=20)
    average = train(model, losses, loop, folder / "run", torch.device("cpu"), {})
    torch.save([model.state_dict(), average.state_dict(), batches[0]], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "none"),
        ({"RANK": "0"}, "RANK=0"),
        ({"RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}, "RANK=2, MASTER_ADDR=127.0.0.1, MASTER"),
    ],
)
def test_a_group_that_nobody_launched_is_not_waited_for(
    given: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in parallel.TORCHRUNS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RsdError, match=f"WORLD_SIZE=2: expected RANK and .*, RANK below 2, found {found}"):
        parallel.join()


def test_two_processes_keep_one_model(tmp_path: Path) -> None:
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    (model, average, batch), (other_model, other_average, other_batch) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert not torch.equal(batch, other_batch)
    for mine, theirs in ((model, other_model), (average, other_average)):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (model["weight"] - 1.0).abs().max() < 0.5  # it learns the sum


def test_alone_nothing_is_shared() -> None:
    parameter = torch.ones(3, requires_grad=True)
    parameter.sum().backward()
    parallel.average_gradients([parameter])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1.0, 1.0, 1.0]
    assert (parallel.rank(), parallel.world_size(), parallel.launched()) == (0, 1, False)
    assert parallel.from_first(2.5, torch.device("cpu")) == 2.5
