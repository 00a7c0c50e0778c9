"""The plugin for LeRobot runs in an environment of its own, whose tests (`make test-lerobot`) are seldom run: what it
takes from `rsd` has to be there."""

import ast
import importlib.util
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[1] / "plugins"
TAKEN = sorted(
    {
        (str(path.relative_to(PLUGINS)), node.module, alias.name)
        for path in PLUGINS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rsd"
        for alias in node.names
    }
)


def test_the_plugin_takes_something_from_rsd():
    assert len({path for path, _, _ in TAKEN}) >= 3


@pytest.mark.parametrize(("path", "module", "name"), TAKEN)
def test_what_the_plugin_takes_from_rsd_is_there(path, module, name):
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{path}: {module} has no {name}"
