"""Messages as openpi's LIBERO client sends them, and a server in a thread."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from rsd.serving.server import PolicyServer
from rsd.types import Observation


def content_of(observation: Observation, **more: Any) -> dict[str, Any]:
    image, wrist = observation.images
    return {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": observation.state.astype(np.float64),
        "prompt": observation.instruction,
        **more,
    }


@contextlib.contextmanager
def serving(server: PolicyServer) -> Iterator[str]:
    """Serve in a thread of this process while the context lasts; gives the address."""
    news: queue.Queue[str | BaseException] = queue.Queue()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        try:
            loop.run_until_complete(server.run(stop, news.put))
        except BaseException as error:
            news.put(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    address = news.get()
    if isinstance(address, BaseException):
        raise address
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
