"""`lerobot:DIR_OR_ID`: a LeRobot policy, in a process of LeRobot's own environment behind the port of an `rsd serve`.

The first process of a run that needs it starts it, and ends it; those that it starts itself find it by a variable.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from rsd.environment import LEROBOT_PYTHON, variable
from rsd.types import LEROBOT, RsdError

USUAL_PYTHON = Path(".venv-lerobot/bin/python")
HOW_TO_MAKE = (
    "python3 -m venv .venv-lerobot && .venv-lerobot/bin/pip install lerobot==0.4.4 '.[serve]' "
    "./plugins/lerobot_policy_rsd, in a clone of this package"
)
SERVERS = "RSD_LEROBOT_SERVERS"  # servers that a parent process has started, by what was asked for
ENDS_WITHIN = 10  # seconds, before it is killed


class Asked(NamedTuple):
    """spec: lerobot:DIR_OR_ID; execute: actions of a chunk, None: what the policy says; threads: on a CPU, 0: torch's
    own default."""

    spec: str
    device: str
    execute: int | None
    threads: int = 0

    @property
    def name(self) -> str:
        return self.spec.removeprefix(LEROBOT)

    @property
    def options(self) -> list[str]:
        more = [] if self.execute is None else ["--execute", str(self.execute)]
        more += ["--threads", str(self.threads)] if self.threads and self.device == "cpu" else []
        return [self.name, "--device", self.device, *more]


class Running(NamedTuple):
    process: subprocess.Popen[str]
    address: str


RUNNING: dict[Asked, Running] = {}


def address_of(asked: Asked) -> str:
    """ws://HOST:PORT of its server, which is started unless it runs. `RsdError` where it cannot be."""
    known = json.loads(os.environ.get(SERVERS, "{}"))
    key = json.dumps(asked)
    mine = RUNNING.get(asked)
    if key in known and (mine is None or mine.process.poll() is None):
        return str(known[key])
    RUNNING[asked] = running = start(asked)
    os.environ[SERVERS] = json.dumps({**known, key: running.address})
    return running.address


def command(asked: Asked) -> list[str]:
    """What starts the server, in LeRobot's environment; `RsdError` where there is none."""
    if not asked.name or asked.name.startswith("-"):
        expected = f"a LeRobot policy's directory or hub id behind {LEROBOT}"
        found = repr(asked.name) if asked.name else "nothing"
        raise RsdError(f"--policy {asked.spec}: expected {expected}, found {found}")
    python = Path(variable(LEROBOT_PYTHON, str(USUAL_PYTHON)))
    if not python.is_file():
        expected = f"LeRobot's own environment at {USUAL_PYTHON}, or its python in {LEROBOT_PYTHON}"
        raise RsdError(f"{asked.spec}: expected {expected}, found none; make it: {HOW_TO_MAKE}")
    return [str(python), "-m", "lerobot_policy_rsd.serve", *asked.options]


def start(asked: Asked) -> Running:
    """Start the server and wait until it listens; it ends with this process, however that ends."""
    line = [*command(asked), "--port", "0", "--until-stdin-ends"]
    print(f"{asked.spec}: LeRobot loads it in {line[0]}", file=sys.stderr)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        atexit.register(end, process)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if address.startswith("ws://"):
            return Running(process, address)
        end(process)
        raise RsdError(f"{asked.spec}: {last_words(log)}")


def last_words(log: IO[str]) -> str:
    """Why the server did not start, from what it wrote."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
    if told:
        return f"{told:.1000}"
    found = lines[-1] if lines else "nothing"
    return f"expected a server of LeRobot's environment, found {found:.300}; make that anew: {HOW_TO_MAKE}"


def end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    process.terminate()
    try:
        process.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
