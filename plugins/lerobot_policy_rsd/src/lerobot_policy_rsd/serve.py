"""`python -m lerobot_policy_rsd.serve DIR_OR_ID`: any LeRobot policy behind a port, as `rsd serve` puts its own.

`rsd eval --policy lerobot:DIR_OR_ID` starts it in the environment that it is told of, and ends it.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from functools import partial
from importlib.metadata import version

from rsd.types import RsdError


def main() -> int:
    parser = argparse.ArgumentParser("python -m lerobot_policy_rsd.serve", description=__doc__)
    parser.add_argument("policy", help="a LeRobot policy's directory or hub id")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=int, help="torch's on a CPU; default: its own, about one a core")
    parser.add_argument("--execute", type=int, help="actions of a chunk to execute; default: its n_action_steps")
    parser.add_argument("--host", default="127.0.0.1", help="who reaches the port drives the robot")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--until-stdin-ends", action="store_true", help="end with the program that started it")
    given = parser.parse_args()
    if given.until_stdin_ends:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        if given.execute is not None and given.execute < 1:
            raise RsdError(f"--execute {given.execute}: expected a number of actions, 1 or more")
        if given.threads is not None and given.threads < 1:
            raise RsdError(f"--threads {given.threads}: expected a number of threads, 1 or more")
        serve(given)
    except RsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def serve(given: argparse.Namespace) -> None:
    # after --help and the thread that ends it: seconds
    import torch

    from lerobot_policy_rsd.hosted import HostedPolicy
    from rsd.serving.server import PolicyServer, reserve, until_signal
    from rsd.serving.service import versions_on

    print_address = partial(print, file=sys.stdout, flush=True)
    with contextlib.redirect_stdout(sys.stderr):  # what LeRobot prints is not the address
        door = reserve(given.host, given.port)
        if given.threads:
            torch.set_num_threads(given.threads)
        policy = HostedPolicy(given.policy, given.device, given.execute)
        versions = {**versions_on(given.device), "lerobot": version("lerobot")}
        server = PolicyServer(policy, policy.identity, versions, door)
        until_signal(lambda stop: server.run(stop, print_address))


def end_with_stdin() -> None:
    """Whatever ends the parent, even SIGKILL, closes its end."""
    while os.read(sys.stdin.fileno(), 1 << 16):  # a thread in sys.stdin aborts a Python that ends: why is lost
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
