"""A policy server in openpi's protocol that is none of this package's, and the speculating proxy in front of one."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from websockets.sync.server import ServerConnection, serve

from rsd.serving.proxy import SpeculatingProxy
from rsd.serving.server import reserve
from rsd.targets.black_box import Drafter
from rsd.targets.remote.wire import pack, unpack

CHUNK = np.zeros((10, 7), np.float32)


@contextmanager
def foreign(
    metadata: Any, port: int = 0, answer: Callable[[Any], np.ndarray] = lambda _: CHUNK
) -> Iterator[tuple[str, list[Any]]]:
    """A server in openpi's protocol, and what it was sent. answer: a message -> actions [n, 7]."""
    asked: list[Any] = []

    def converse(connection: ServerConnection) -> None:
        connection.send(pack(metadata))
        for message in connection:
            asked.append(unpack(message) if isinstance(message, bytes) else message)
            connection.send(pack({"actions": answer(asked[-1]), "policy_timing": {"infer_ms": 0.0}}))

    with running(converse, port) as address:
        yield address, asked


@contextmanager
def running(converse: Callable[[ServerConnection], None], port: int = 0) -> Iterator[str]:
    """A server with that to say to each connection; its address."""
    with serve(converse, "127.0.0.1", port, compression=None, max_size=None) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{listening.socket.getsockname()[1]}"
        listening.shutdown()
        thread.join()


@contextmanager
def proxied(address: str, drafter: Drafter, metadata: dict[str, Any] | None = None) -> Iterator[str]:
    door = reserve("127.0.0.1", 0)
    place, ready, loop = f"ws://127.0.0.1:{door.getsockname()[1]}", threading.Event(), asyncio.new_event_loop()
    proxy, stop = SpeculatingProxy(address, metadata or {}, drafter, drafter.skip_rule(), door), asyncio.Event()
    serving = proxy.serve(stop, lambda _: ready.set())
    thread = threading.Thread(target=lambda: loop.run_until_complete(serving), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield place
    loop.call_soon_threadsafe(stop.set)
    thread.join()
