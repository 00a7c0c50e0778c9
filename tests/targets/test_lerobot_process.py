"""`lerobot:DIR`: a process of another environment; here a small one (LeRobot's own: `make test-lerobot`)."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsd.cli import dispatch
from rsd.evaluation import foreign
from rsd.evaluation.backend import LIBERO, settle
from rsd.evaluation.config import EvalConfig
from rsd.targets.black_box import Drafter
from rsd.targets.remote import lerobot
from rsd.targets.remote.lerobot import RUNNING, SERVERS, Asked, address_of
from rsd.types import Observation, RsdError

SEEN = Observation(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(8, np.float32), "pick up the bowl")
SERVER = """#!{python}
import sys, threading
from dataclasses import asdict
import numpy as np
from websockets.sync.server import serve
from rsd.targets.remote.request import IMAGES
from rsd.targets.remote.wire import Welcome, pack, unpack

known = sys.argv[1:]
execute = int(known[known.index("--execute") + 1]) if "--execute" in known else 6
welcome = Welcome("target-only", 64, IMAGES, (12, 7), {{"type": "act", "asked": known}}, {{"lerobot": "0"}}, execute)
stats = {{"decode": "target-only", "prefills": 1, "latency_ms": {{"total": 0.0}}}}
timing = {{"infer_ms": 0.0, "queue_ms": 0.0}}

def converse(connection):
    connection.send(pack(asdict(welcome)))
    for message in connection:
        begins = np.full((12, 7), float(unpack(message)["reset"]), np.float32)
        connection.send(pack({{"actions": begins, "stats": stats, "server_timing": timing}}))

with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as listening:
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    print(f"ws://127.0.0.1:{{listening.socket.getsockname()[1]}}", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a program of a text the python of LeRobot's environment; what was started is ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SERVERS, "{}")

    def make(text: str) -> None:
        program = tmp_path / "python"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("RSD_LEROBOT_PYTHON", str(program))

    yield make
    for running in RUNNING.values():
        lerobot.end(running.process)
    RUNNING.clear()


def test_it_is_started_once_and_ends_with_its_parent(python: Callable[[str], None]) -> None:
    python(SERVER.format(python=sys.executable))
    config = settle(EvalConfig(policy="lerobot:here/act", device="cuda:3", execute=4))[0]
    policy = LIBERO.make_policy(config)
    for begins in (1.0, 0.0, 1.0):
        if begins:
            policy.reset(7)
        chunk = policy.predict(SEEN)
        assert chunk.executed.tolist() == [[begins] * 7] * 4
    policy.close()  # type: ignore[attr-defined]
    known = LIBERO.describe_policy(config)
    options = ["here/act", "--device", "cuda:3", "--execute", "4", "--port", "0", "--until-stdin-ends"]
    assert known["asked"] == ["-m", "lerobot_policy_rsd.serve", *options]
    assert (config.decode, known["policy"], known["server"]["lerobot"]) == ("target-only", "lerobot:here/act", "0")
    ((asked, running),) = RUNNING.items()
    told = json.loads(os.environ[SERVERS])
    RUNNING.clear()  # as in a worker's process
    assert address_of(asked) == running.address
    assert list(told.values()) == [running.address]
    assert running.process.stdin is not None
    running.process.stdin.close()  # as the end of the parent does, whatever it died of
    assert running.process.wait(20) == 0
    RUNNING[asked] = running
    assert address_of(asked) != running.address  # one that died is started anew


def test_on_a_cpu_it_is_told_how_many_threads(python: Callable[[str], None]) -> None:
    python(SERVER.format(python=sys.executable))
    known = LIBERO.describe_policy(settle(EvalConfig(policy="lerobot:here/act", threads=3))[0])
    assert known["asked"][2:7] == ["here/act", "--device", "cpu", "--threads", "3"]


def test_a_drafter_for_it_decides_with_the_same_process(python: Callable[[str], None], drafter: Drafter) -> None:
    python(SERVER.format(python=sys.executable))
    asked = EvalConfig(policy="lerobot:here/act", drafter=drafter.where)
    named = LIBERO.describe_policy(settle(foreign.alone(asked))[0])
    replace(drafter.stored, target=named).save(Path(drafter.where))
    config = settle(asked)[0]
    policy = LIBERO.make_policy(config)
    policy.reset()
    assert policy.predict(SEEN).executed.tolist() == [[1.0] * 7] * 8
    assert config.decode == "rsd-skip"
    assert LIBERO.describe_policy(config)["drafter_sha256"]
    assert len(RUNNING) == 1


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", "expected LeRobot's own environment at .venv-lerobot/bin/python, or its python in RSD_LEROBOT_PYTHON"),
        (
            "echo 'No module named lerobot_policy_rsd' >&2; exit 1",
            "found No module named.*; make that anew: python3 -m",
        ),
        ("echo 'error: policy x: no such' >&2; echo later >&2; exit 2", "^lerobot:x: policy x: no such$"),
    ],
)
def test_why_it_does_not_start_is_one_line(python: Callable[[str], None], program: str, expected: str) -> None:
    if program:
        python(f"#!/bin/sh\n{program}\n")
    with pytest.raises(RsdError, match=expected):
        address_of(Asked("lerobot:x", "cpu", None))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["eval", "--policy", "lerobot:x", "--acceptance", "exact"], "--acceptance: not with --policy lerobot:x"),
        (["eval", "--policy", "lerobot:x", "--batch", "2"], "--batch: not with --policy lerobot:x"),
        (["eval", "--policy", "lerobot:x", "--decode", "l1"], "lerobot:x decodes its own way, target-only"),
        (["eval", "--policy", "lerobot:"], "--policy lerobot:: expected a LeRobot policy's directory or hub id behind"),
        (["inspect", "lerobot:x"], "or a hub id; LeRobot's are for rsd eval, serve, doctor"),
        (["eval", "--policy", "lerobot:--help"], "directory or hub id behind lerobot:, found '--help'"),
        (["serve", "--policy", "lerobot:x", "--engine", "onnx"], "--engine: not with --policy lerobot:x"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    python: Callable[[str], None], line: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    python("#!/bin/sh\nexit 1\n")  # refused before it is started
    assert dispatch(line) == 2
    assert expected in capsys.readouterr().err


def test_rsd_serve_becomes_it(python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    python("")
    ran: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda program, line: ran.append(line))
    dispatch(["serve", "--policy", "lerobot:x", "--port", "7", "--device", "cuda"])
    assert ran[0][1:6] == ["-m", "lerobot_policy_rsd.serve", "x", "--device", "cuda"]
    assert ran[0][6:] == ["--host", "127.0.0.1", "--port", "7"]
