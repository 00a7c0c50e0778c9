"""What a worker process begins with."""

import os
import subprocess
import sys
import time

import pytest

CHILD = """
import multiprocessing, os, time
from rsd.processes import begin_worker

def work(connection):
    begin_worker()
    connection.send(os.getpid())
    time.sleep(1000)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=work, args=(theirs,)).start()
    print(ours.recv(), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_worker_ends_with_a_parent_that_was_killed() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60)
    process = int(done.stdout)
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{process}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{process}")
