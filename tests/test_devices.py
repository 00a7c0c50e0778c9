"""Which devices are taken, at the start of everything that computes."""

from pathlib import Path

import pytest
import torch

from rsd.devices import check_device
from rsd.policy import RsdPolicy
from rsd.training.policy import resolve_device
from rsd.types import RsdError

UNKNOWN = ("meta", "abacus", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0:1", "mps", "xla", "CPU")


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_devices_are_refused_at_the_start(name: str, checkpoint: Path) -> None:
    """torch knows of `meta`, on which nothing is computed: it went wrong at the first chunk only."""
    for call in (check_device, resolve_device, lambda name: RsdPolicy.from_pretrained(checkpoint, device=name)):
        with pytest.raises(RsdError, match=r"device '.*': expected cpu, cuda, or cuda with a number such as cuda:1"):
            call(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(RsdError, match=f"device {name}: no CUDA device is visible here; cpu always works"):
            check_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (check_device("cuda"), check_device("cuda:1")) == ("cuda", "cuda:1")
    with pytest.raises(RsdError, match=r"device cuda:2: 2 CUDA devices are visible here, the last is cuda:1"):
        check_device("cuda:2")
