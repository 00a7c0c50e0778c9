"""Tests against vla-eval's published package, in LeRobot's environment: `make test-lerobot`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vla_eval") else ["test_*.py"]
