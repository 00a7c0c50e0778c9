"""What `pip install` of a built wheel gives: the package with its data, and the command."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_CODE = ("py.typed", "*.jinja", "*.npz")


def output_of(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_a_wheel_installs_in_an_empty_environment(tmp_path: Path) -> None:
    source, empty, pip = tmp_path / "source", tmp_path / "empty", (sys.executable, "-m", "pip", "--quiet")
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    output_of(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    output_of(sys.executable, "-m", "venv", "--without-pip", empty)
    output_of(*pip, "--python", empty / "bin" / "python", "install", "--no-deps", wheel)
    (site,) = empty.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # searched after what is installed

    assert "rsd eval" in output_of(empty / "bin" / "rsd", "--help")
    where = output_of(empty / "bin" / "python", "-I", "-c", "import rsd.cli.eval; print(rsd.__file__)").strip()
    assert where == str(site / "rsd" / "__init__.py")
    data = {path.relative_to(ROOT / "src") for pattern in NO_CODE for path in (ROOT / "src").rglob(pattern)}
    assert len(data) > 2
    assert {path.relative_to(site) for pattern in NO_CODE for path in (site / "rsd").rglob(pattern)} == data
