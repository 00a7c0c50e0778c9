"""Tests against LeRobot's published package, in an environment of its own: `make test-lerobot`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("lerobot") else ["test_*.py"]
