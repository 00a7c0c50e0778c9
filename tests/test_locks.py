"""Work of several processes that one of them does."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsd.locks import exclusive, first_or_after
from rsd.types import RsdError


def test_one_begins_and_those_that_come_meanwhile_go_on_together(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=10)
    inside: list[str] = []

    def enter() -> None:
        with first_or_after(tmp_path / "cache"):
            inside.append("after")
            together.wait()  # passes when both are inside

    others = [threading.Thread(target=enter) for _ in range(2)]
    with first_or_after(tmp_path / "cache"):
        for other in others:
            other.start()
        for other in others:
            other.join(0.2)
        assert inside == []
    for other in others:
        other.join()
    assert inside == ["after"] * 2
    assert not together.broken


def test_without_a_folder_to_write_to_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with first_or_after(tmp_path / "file"), first_or_after(tmp_path / "file"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from rsd.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_and_the_process_named(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    found = rf"another run is writing here \(process {holder.pid} on "
    with pytest.raises(RsdError, match=found), exclusive(tmp_path / "run"):
        raise AssertionError("entered")


def test_the_lock_of_a_killed_process_is_taken_over(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_gone_when_it_is_not_held(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    for written in ([], ["result"]):
        with exclusive(tmp_path / "new"):
            for name in written:
                (tmp_path / "new" / name).touch()
        assert (tmp_path / "new").exists() == bool(written)


def test_many_that_come_at_once_hold_it_one_after_the_other(tmp_path: Path) -> None:
    inside, most, refused = [0], [0], [0]

    def enter() -> None:
        for _ in range(200):
            try:
                with exclusive(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except RsdError:
                refused[0] += 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert 0 < refused[0] < 800


def test_a_file_system_without_locks_is_used_after_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with exclusive(tmp_path / "run"):
        pass
    assert "its file system has no locks (No locks available; NFS" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_in_the_folders_place_is_a_line(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    found = r"cannot be written .*choose another one"
    with pytest.raises(RsdError, match=found), exclusive(tmp_path / "file" / inside):
        pass
