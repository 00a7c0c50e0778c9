"""A policy behind a WebSocket, in openpi's protocol: its published client works unchanged.

On connecting the client gets a map that describes the server. Then every binary message is an observation, answered by
a map with `actions`, or by a text where something was wrong. `GET /healthz` says OK. There is no authentication.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from rsd.extras import extra
from rsd.serving.service import PolicyService, Servable, Session
from rsd.targets.remote.request import IMAGES, LIMITS
from rsd.targets.remote.wire import Welcome, pack
from rsd.types import RsdError

with extra("serve"):
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request, Response

MAX_MESSAGE = len(IMAGES) * LIMITS.array + 2 * LIMITS.text  # bytes: 25 MB


class PolicyServer:
    """A policy at a port. It predicts in a thread of its own: pings and health checks are answered meanwhile."""

    def __init__(
        self, policy: Servable, description: dict[str, Any], versions: dict[str, str], door: socket.socket
    ) -> None:
        """description, versions: `policy` and `versions` of `Welcome`; door: see `reserve`."""
        self._door = door
        self._service = PolicyService(policy)
        self._about = description, versions
        self._thread = ThreadPoolExecutor(1, "policy")

    async def run(self, stop: asyncio.Event, listening: Callable[[str], None]) -> None:
        """Serve until `stop`; calls `listening` with the address as soon as clients may connect."""
        loop = asyncio.get_running_loop()
        policy = self._service.policy
        try:
            chunk = await loop.run_in_executor(self._thread, self._service.warm_up)
            shown = policy.decode, policy.image_size, IMAGES[: policy.cameras], tuple(chunk)
            steps = getattr(policy, "num_inference_steps", 0)
            hello = pack(asdict(Welcome(*shown, *self._about, policy.execute, steps)))

            async def handle(connection: ServerConnection) -> None:
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(hello)
                    await self._converse(connection)

            await serve_until(stop, handle, self._door, listening)
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._door.close()

    async def _converse(self, connection: ServerConnection) -> None:
        loop, session = asyncio.get_running_loop(), Session()
        async for message in connection:
            arrived = time.perf_counter()
            answer = await loop.run_in_executor(self._thread, self._service.answer, session, message, arrived)
            await connection.send(answer)
            session.previous_ms = 1e3 * (time.perf_counter() - arrived)
            correction = await loop.run_in_executor(self._thread, self._service.verify, session)
            if correction is not None:
                await connection.send(correction)


def reserve(host: str, port: int) -> socket.socket:
    """A port that nobody else gets, closed until a server listens; 0 takes a free one. `RsdError` if it is taken.

    Before 15 GB are loaded, not after.
    """
    with listening_at(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as undo:
            undo.callback(door.close)
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended just now is no hindrance
            door.bind(address)
            undo.pop_all()
        return door


@contextlib.contextmanager
def listening_at(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name that cannot be one is a UnicodeError
        remedy, found = "choose another --host or --port", getattr(error, "strerror", "no name of a machine")
        raise RsdError(f"cannot listen at {host}, port {port}: {found}; {remedy}") from error


def check_health(connection: ServerConnection, request: Request) -> Response | None:
    """OK for GET /healthz; everything else goes on to the WebSocket handshake."""
    return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


async def serve_until(
    stop: asyncio.Event,
    handle: Callable[[ServerConnection], Coroutine[Any, Any, None]],
    door: socket.socket,
    listening: Callable[[str], None],
) -> None:
    """Serve at `door` until `stop`; `listening` is told the address as soon as clients may connect."""
    host, port = door.getsockname()[:2]
    # No compression: pixels do not shrink. No origins: a web page must not reach a robot through a browser.
    limits: dict[str, Any] = {"compression": None, "max_size": MAX_MESSAGE, "origins": [None]}
    limits |= {"open_timeout": 5.0, "close_timeout": 5.0}  # how long Ctrl-C may wait for clients that do not answer
    with listening_at(host, port):
        door.listen()  # another one that was loading its policy as well may have been quicker
    async with serve(handle, sock=door, process_request=check_health, **limits):
        listening(f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}")
        await stop.wait()


def until_signal(serving: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run what serves, in the main thread, until the event that Ctrl-C or SIGTERM sets."""

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serving(stop)

    asyncio.run(main())
