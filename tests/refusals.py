"""What a bad input has to lead to, whatever the command: one line, exit status 2, nothing written."""

import re
from pathlib import Path

import pytest

from rsd.cli import dispatch
from studies.command import run_study


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: files with their content."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def check(arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails in one line with exit status 2, and leaves the folder as it was."""
    before = tree(folder)
    words = [str(word) for word in arguments]
    status = run_study(words[1], words[2:]) if words[0] == "study" else dispatch(words)
    printed = capsys.readouterr()
    assert status == 2, printed.out + printed.err
    assert "Traceback" not in printed.err
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, printed.err
    assert re.match(r"(rsd|python -m) [a-z_. -]+: error: ", lines[0])
    assert expected in lines[0]
    assert len(lines[0]) < 1500
    assert tree(folder) == before
