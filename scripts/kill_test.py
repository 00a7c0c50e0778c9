#!/usr/bin/env python
"""SIGKILL a LIBERO evaluation at random moments, resume, and compare with an undisturbed run, episode by episode.

Each kill hits, with equal odds, one simulator worker or the evaluation itself, which is then started again by the same
command. Exit status 1 unless every episode is there once with the undisturbed outcome.

    python scripts/kill_test.py --kills 20 --tasks 0,6 --num-trials 3
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rsd.checks import Checked, Rules, Some, Time, listed
from rsd.cli import Command, dispatch
from rsd.evaluation.results import EPISODES_FILE, EpisodeKey, read_episodes


@dataclass(frozen=True)
class KillTest(Checked):
    kills: Some = 20
    tasks: str = "0,6"
    num_trials: Some = 3
    policy: str = "checkpoints/libero"
    num_workers: Some = 2
    shortest: Time = 3.0
    """Seconds from a start, or from the last kill, to the next kill: at least this."""
    longest: Time = 45.0
    """At most this."""
    undisturbed: Path | None = None
    """An undisturbed run of the same policy and options that holds these episodes; default: made first."""
    seed: int = 0

    def rules(self) -> Rules:
        found = f"{self.shortest:g} and {self.longest:g}"
        yield self.shortest <= self.longest, "--shortest of at most --longest", found


def running_workers(pid: int) -> list[int]:
    """The workers of the evaluation that runs as process `pid`, by Linux's /proc: its spawned children.

    multiprocessing's own resource tracker, which is a child, too, is none of them.
    """
    found = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, entry.read_text().split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found


def outcomes(directory: Path) -> dict[EpisodeKey, tuple[object, ...]]:
    """What must not change: all of an episode but times, attempts and the note on a failure."""
    left_out = ("wall_s", "latency_ms", "attempts", "failure_detail")
    found = read_episodes(directory / EPISODES_FILE)
    return {k: tuple(v for name, v in asdict(e).items() if name not in left_out) for k, e in found.items()}


def command(config: KillTest, output: Path) -> list[str]:
    options = {
        "--tasks": config.tasks,
        "--num-trials": str(config.num_trials),
        "--policy": config.policy,
        "--num-workers": str(config.num_workers),
        "--output": str(output),
    }
    return [sys.executable, "-m", "rsd", "eval", *(text for pair in options.items() for text in pair)]


def run(config: KillTest) -> int:
    choose = random.Random(config.seed)
    killed = {"worker": 0, "evaluation": 0}
    runs = differing = episodes = 0
    with tempfile.TemporaryDirectory() as folder:
        expected_dir = config.undisturbed or Path(folder) / "undisturbed"
        if config.undisturbed is None:
            made = subprocess.run(command(config, expected_dir), stdout=subprocess.DEVNULL)
            if made.returncode:  # it said why
                return made.returncode
        expected = outcomes(expected_dir)
        output = Path(folder) / "killed"
        start = time.monotonic()
        while sum(killed.values()) < config.kills or output.exists():
            with (Path(folder) / "log").open("a") as log:
                process = subprocess.Popen(command(config, output), stdout=log, stderr=log)
            disturb(process, config, killed, choose)
            if process.wait() == 0:  # done in spite of it all: compare, and begin a new one
                runs += 1
                found = outcomes(output)
                wanted = {key: value for key, value in expected.items() if key in found}
                tasks = len(listed(config.tasks))
                episodes += len(found)
                differing += len(found) != tasks * config.num_trials or found != wanted
                shutil.rmtree(output)
            elif process.returncode != -signal.SIGKILL:
                print((Path(folder) / "log").read_text()[-2000:], file=sys.stderr)
                return 1
            print(f"kills {killed}, evaluations finished {runs}", file=sys.stderr, flush=True)
    print(json.dumps({"kills": killed, "evaluations": runs, "episodes": episodes, "differing evaluations": differing,
                      "seconds": round(time.monotonic() - start)}))
    return int(differing > 0)


def disturb(process: subprocess.Popen[bytes], config: KillTest, killed: dict[str, int], choose: random.Random) -> None:
    """Kill workers until the evaluation ends, or end it by a kill of its own."""
    while sum(killed.values()) < config.kills:
        deadline = time.monotonic() + choose.uniform(config.shortest, config.longest)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return
            time.sleep(0.1)
        alive = running_workers(process.pid)
        if alive and choose.random() < 0.5:
            os.kill(choose.choice(alive), signal.SIGKILL)
            killed["worker"] += 1
        else:
            process.kill()
            killed["evaluation"] += 1
            return


if __name__ == "__main__":
    sys.exit(dispatch(sys.argv[1:], Command("", "kill_test:run", "KillTest"), "kill_test.py"))
