"""The snippets of README.md run as they stand, one after another."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.simulator
def test_the_snippets_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RSD_ENGINE", "eager")  # no graphs to export
    monkeypatch.chdir(README.parent)
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 1  # a policy by itself, then in a gymnasium environment
    names: dict[str, Any] = {}
    try:
        for snippet in snippets:
            exec(compile(snippet, str(README), "exec"), names)
    finally:
        if "env" in names:
            names["env"].close()
    shown, succeeded = capsys.readouterr().out.splitlines()
    assert shown.startswith("(8, 7) ")
    assert succeeded in ("True", "False")
    assert names["info"]["success"] or names["truncated"]
