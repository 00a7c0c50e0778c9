"""What a command says of disks that fail, of pieces that cannot be done, and of how far it is."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rsd import output
from rsd.data.schema import atomic_file
from rsd.evaluation.results import write_atomically
from rsd.output import Faults, Unfinished, attempt, refuse_to_replace, shown, writing
from rsd.types import RsdError


def write_text(path: Path) -> None:
    path.write_text("x" * 10**7)


def write_torch(path: Path) -> None:
    torch.save(torch.zeros(10**7), path)


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(10**7)}, path)


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"] = np.zeros(10**7)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond a megabyte: what a full disk or a quota is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [write_text, write_torch, write_safetensors, write_hdf5])
def test_a_full_disk_is_a_line_whoever_writes(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(RsdError) as raised, writing(tmp_path / "file", SafetensorError):
        write(tmp_path / "file")
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'file'}: cannot be written (")
    assert "what was written before is kept" in message


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room, then run the command again"),
        (errno.EROFS, "Read-only file system.*choose another folder"),
        (errno.EACCES, "Permission denied.*choose another folder"),
        (errno.ENOENT, "its folder is not there, or not any more"),
    ],
)
def test_the_remedy_follows_the_fault(number: int, remedy: str) -> None:
    with pytest.raises(RsdError, match=remedy), writing(Path("x")):
        raise OSError(number, os.strerror(number))


def test_torchs_words_for_a_full_disk_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(RsdError, match=r"No space left on device.*make room"), writing(tmp_path / "x" / "y.pt"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2887488 vs 2887376")


def test_what_is_no_fault_of_the_disk_passes() -> None:
    with pytest.raises(KeyError), writing(Path("x")):
        raise KeyError("a bug")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text, data = tmp_path / "a.json", tmp_path / "a.hdf5"
    write_atomically(text, "old")
    with atomic_file(data) as file:
        file["a"] = 1
    before = data.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RsdError, match=r"a.json: cannot be written .No space left"):
        write_atomically(text, "new")
    with pytest.raises(RsdError, match=r"a.hdf5: cannot be written .No space left"), atomic_file(data) as file:
        file["a"] = 2
    assert (text.read_text(), data.read_bytes()) == ("old", before)


def test_nothing_is_replaced_unless_asked_for(tmp_path: Path) -> None:
    refuse_to_replace(tmp_path / "new", overwrite=False)
    (tmp_path / "old").touch()
    with pytest.raises(RsdError, match="exists already; choose another --output, or --overwrite"):
        refuse_to_replace(tmp_path / "old", overwrite=False)
    refuse_to_replace(tmp_path / "old", overwrite=True)
    with pytest.raises(RsdError, match="expected a file, or nothing yet, found a folder"):
        refuse_to_replace(tmp_path, overwrite=True)


MAX_EQUAL_FAULTS = 5


def half(number: int) -> int:
    if number % 2:
        raise RsdError(f"{number} is odd")
    return number // 2


def test_a_piece_that_fails_costs_itself() -> None:
    kept = dict[int, int]()
    done, failed = attempt(range(5), half, kept.__setitem__)
    assert (done, failed) == (3, [(1, "1 is odd"), (3, "3 is odd")])
    assert kept == {0: 0, 2: 1, 4: 2}
    faults = Faults("the others are kept")
    for piece, fault in failed:
        faults.failed(piece, fault)
    with pytest.raises(Unfinished, match=r"^2 of 5 halves failed, the first of them 1 \(1 is odd\); the others"):
        faults.raise_any("of 5 halves", done)
    with pytest.raises(RsdError) as nothing:
        faults.raise_any("of 2 halves", 0)
    assert not isinstance(nothing.value, Unfinished)
    Faults("").raise_any("of none", 0)

    def full(*_: int) -> None:
        raise RsdError("the disk is full")

    with pytest.raises(RsdError, match="the disk is full"):  # for all pieces alike
        attempt(range(5), half, full)


def test_a_fault_that_lasts_ends_the_job_and_others_do_not() -> None:
    faults = Faults("run again", MAX_EQUAL_FAULTS)
    for piece in range(100):  # the same one tried again and again, others that work in between, others' errors
        faults.failed("one", "connection to port 80 refused")
        if piece % 3 == 0:
            faults.failed(piece, "connection to port 81 refused")
        if piece % 3 == 1:
            faults.worked()
    faults.worked()
    for piece in range(MAX_EQUAL_FAULTS - 1):
        faults.failed(piece, f"connection to port {piece} refused")
    faults.failed("another", "no such file")
    for piece in range(MAX_EQUAL_FAULTS - 1):
        faults.failed(piece, f"connection to port {piece} refused")
    with pytest.raises(RsdError, match=r"port 7 refused \(5 times in a row, so the run stops here\); run again"):
        faults.failed("last", "connection to port 7 refused")


def test_what_takes_long_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter(np.arange(0, 100, 0.9))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(times))

    def items() -> Iterator[int]:
        yield from range(8)

    assert list(shown(items(), "frames", 8)) == list(range(8))
    assert capsys.readouterr().err.splitlines() == ["frames: 2 of 8, 3 s", "frames: 5 of 8, 5 s"]
