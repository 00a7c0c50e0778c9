"""Work of several processes that one of them does."""

import threading
from pathlib import Path

from rsd.locks import first_or_after


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
