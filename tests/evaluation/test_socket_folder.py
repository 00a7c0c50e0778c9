"""A pool's folder is gone with it; what a kill left goes with the next start, and nothing else does."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsd.evaluation.socket_folder import LOCK, PREFIX, socket_folder

HOLD = """
from rsd.evaluation.socket_folder import socket_folder
import time
with socket_folder() as folder:
    (folder / "policy-1").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_is_gone_with_its_pool(place: Path) -> None:
    with socket_folder() as one, socket_folder() as other:
        assert one != other
        assert {one, other} == set(place.iterdir())
        assert one.stat().st_mode & 0o077 == 0
    assert list(place.iterdir()) == []


def test_a_killed_process_leaves_a_folder_to_the_next_start_and_a_living_one_keeps_its_own(place: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    try:
        with socket_folder():
            assert (held / "policy-1").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert held.exists()
    with socket_folder() as mine:
        assert list(place.iterdir()) == [mine]


def test_what_is_no_stale_folder_stays(place: Path) -> None:
    (place / f"{PREFIX}no-lock").mkdir()
    (place / "rsd-other").mkdir()
    (place / "kept").mkdir()
    (place / "kept" / LOCK).touch()
    os.symlink(place / "kept", place / f"{PREFIX}link")
    before = set(place.rglob("*"))
    with socket_folder():
        pass
    assert set(place.rglob("*")) == before
