"""scripts/check_limits.py on a small repository: what is beyond a ceiling is named and ends with status 1."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_limits.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, lines in {"a/one": 4, "b/two": 4, "c/three": 3, "d/four": 4, "e/five": 4, "f/six": 4}.items():
        path = tmp_path / "src" / "rsd" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text("x = 1\n" * lines)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("two words\n")
    (tmp_path / "docs" / "page.md").write_text("three words here\n")
    return tmp_path


def check(root: Path, *arguments: str) -> tuple[int, dict[str, str]]:
    ceilings = ("source=23", "package=20", *arguments)
    done = subprocess.run([sys.executable, str(SCRIPT), str(root), *ceilings], capture_output=True, text=True)
    return done.returncode, dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_what_is_measured(root: Path) -> None:
    status, found = check(root)
    assert status == 0
    assert [line.split()[0].rstrip(",") for line in found.values()] == ["1", "5", "23", "18", "4"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("README.md", "line\n" * 131, "README"),
        ("docs/page.md", "word " * 12_000, "words"),
        ("CONTRIBUTING.md", "word " * 12_000, "words"),
        ("src/rsd/new.py", "x = 1\n", "Python"),
        ("src/rsd/a/one.py", "x = 1\n" * 5, "largest package"),
        ("scripts/long.py", "x = 1\n" * 501, "longest file"),
        ("tests/test_long.py", "x = 1\n" * 501, "longest file"),
    ],
    ids=["readme", "docs", "contributing", "source", "package", "file", "test"],
)
def test_what_is_too_much_is_named(root: Path, name: str, content: str, what: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(content)
    extra = ("source=24",) if "one" in name else ()
    status, found = check(root, *extra)
    assert status == 1
    (beyond,) = [limit for limit, verdict in found.items() if "TOO MUCH" in verdict]
    assert what in beyond


def test_a_ceiling_above_its_goal_goes_down_with_what_is_measured(root: Path) -> None:
    (root / "src" / "rsd" / "a" / "one.py").write_text("x = 1\n" * 60)
    status, found = check(root, "source=79", "package=76")
    assert status == 0, found
    status, found = check(root, "source=79", "package=90")
    assert status == 1
    assert "lower that to 76" in next(verdict for verdict in found.values() if "LESS" in verdict)


def test_what_is_no_limit_is_refused(root: Path) -> None:
    assert check(root, "lines=3")[0] == 2
    assert check(root / "docs")[0] == 2
