"""`python -m studies.serving --proxy`: what the speculating proxy adds to a request, in front of a server that takes so
many milliseconds and computes nothing.

Server, proxy and client are a process each. Every observation is sent to the server itself, then twice through the
proxy: as an episode's first, where the target is asked whatever is drafted, and again, where the gate sees the draft
first and trusts none.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from rsd.decoding.gate import SkipRule
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import print_table
from rsd.models.bundle import code_sizes
from rsd.models.config import StandaloneDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.output import shown
from rsd.serving.proxy import SpeculatingProxy
from rsd.serving.server import reserve, until_signal
from rsd.targets.black_box import load_drafter
from rsd.targets.drafter_files import StoredDrafter, save_models
from rsd.targets.remote.openpi import SENT_SIZE, SPECULATION
from rsd.targets.remote.request import IMAGES, PROMPT, STATE
from rsd.targets.remote.wire import pack, unpack
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import STATE_DIM, RsdError
from studies.config import ServingBenchConfig
from studies.processes import process_of

DIRECT, ASKED, JUDGED = "the server alone", "the target is asked at once", "the gate sees the draft first"
ADDED = "added, where "
LONGEST = 64  # actions that a drafter may draft
METADATA: dict[str, Any] = {"name": "a server that waits"}


def measure_proxy(config: ServingBenchConfig, threads: int) -> dict[str, list[float]]:
    """Milliseconds by what they are of, one number a round; prints the table."""
    times: dict[str, list[float]] = {name: [] for name in (DIRECT, ASKED, JUDGED)}
    with tempfile.TemporaryDirectory() as folder:
        drafter = Path(config.drafter or random_drafter(config, Path(folder)))
        with ExitStack() as stack:
            behind, _ = stack.enter_context(process_of(target_main, config.target_ms))
            front, _ = stack.enter_context(process_of(proxy_main, behind, drafter, config.device, threads))
            server, proxy = (stack.enter_context(connect(at, compression=None)) for at in (behind, front))
            for client in (server, proxy):
                client.recv()
            for turn in shown(range(config.warmup + config.rounds), "proxy, rounds", config.warmup + config.rounds):
                for name, ms in one_round(server, proxy, turn).items():
                    times[name] += [ms] * (turn >= config.warmup)
    for name in (ASKED, JUDGED):
        times[ADDED + name] = [through - alone for through, alone in zip(times[name], times[DIRECT], strict=True)]
    rows = [[name, "{:.2f} / {:.2f}".format(*percentiles(found))] for name, found in times.items()]
    print_table(Console(), f"a server of {config.target_ms:g} ms: milliseconds, p50 / p95", ["", "proxy"], rows)
    return times


def one_round(server: ClientConnection, proxy: ClientConnection, turn: int) -> dict[str, float]:
    """Milliseconds from the packed request to the packed answer."""
    rng = np.random.default_rng(turn)
    views = {key: rng.integers(0, 256, (SENT_SIZE, SENT_SIZE, 3), np.uint8) for key in IMAGES}
    message = pack({**views, STATE: rng.normal(0.0, 0.3, STATE_DIM), PROMPT: f"pick up the black bowl {turn % 2}"})
    found = {}
    for name, client in ((DIRECT, server), (ASKED, proxy), (JUDGED, proxy)):
        started = time.perf_counter()
        client.send(message)
        answer = client.recv()
        found[name] = 1e3 * (time.perf_counter() - started)
        if not isinstance(answer, bytes):
            raise RsdError(f"{name}: {answer}")
        if client is proxy and unpack(answer)[SPECULATION]["skipped"]:
            raise RsdError(f"{name}: expected an answer of the target, found a draft")
    return found


def random_drafter(config: ServingBenchConfig, folder: Path) -> Path:
    """A drafter of the size that `rsd drafter distil` trains, of random weights: as fast as a trained one."""
    tokenizer, sizes = ActionTokenizer.load(Path(config.policy)), StandaloneDrafterConfig()
    torch.manual_seed(0)
    model = StandaloneDrafter(sizes, *code_sizes(tokenizer))
    save_models(model, tokenizer, StoredDrafter(sizes, {"metadata": METADATA}, 75.0), folder / "drafter")
    return folder / "drafter"


def target_main(told: Connection, target_ms: float) -> None:
    """A server in openpi's protocol that answers after so long, and leaves the cores alone meanwhile."""
    answer = pack({"actions": np.zeros((LONGEST, 7), np.float32), "server_timing": {"infer_ms": target_ms}})

    def converse(client: ServerConnection) -> None:
        client.send(pack(METADATA))
        for _ in client:
            time.sleep(target_ms / 1e3)
            client.send(answer)

    with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as listening:
        told.send(f"ws://127.0.0.1:{listening.socket.getsockname()[1]}")
        listening.serve_forever()


def proxy_main(told: Connection, behind: str, drafter: Path, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    proposes, door = load_drafter(drafter, device), reserve("127.0.0.1", 0)
    proxy = SpeculatingProxy(behind, METADATA, proposes, SkipRule(0.0), door)
    until_signal(lambda stop: proxy.serve(stop, told.send))
