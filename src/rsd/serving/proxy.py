"""A speculating proxy: somebody else's policy server behind, an unchanged client in front, a distilled drafter between.

What the client sends goes on as it is, byte for byte, unless the gate trusts the draft; then the draft is the answer.
An answer has one key more, `speculation`: its statistics. Where the target is asked whatever is drafted, the drafter
works while it does. When the server behind is lost, the client is told by a text, and its next request connects anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from rsd.chunks import environment_ready
from rsd.conventions import shrunk
from rsd.decoding.gate import SkipRule
from rsd.decoding.state import EpisodeState
from rsd.extras import extra
from rsd.serving.server import serve_until
from rsd.serving.service import blank, in_words
from rsd.targets.black_box import Drafter, Proposal
from rsd.targets.remote.connection import TWICE
from rsd.targets.remote.openpi import SPECULATION, is_rsd, read_metadata, same
from rsd.targets.remote.request import IMAGES, LIMITS, PROMPT, RESET, STATE, square, words_of
from rsd.targets.remote.wire import pack, unpack
from rsd.types import ChunkStats, Observation, RsdError, real_array

with extra("serve"):
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.asyncio.server import ServerConnection
    from websockets.exceptions import ConnectionClosed, WebSocketException

DECODE = "rsd-skip"
WARMUP = 2
TIMEOUT_S, AT_ONCE = 60.0, 1e-9  # for an answer; for what has arrived already


class Upstream:
    """One session's connection to the server behind; it insists on the metadata that the proxy began with."""

    def __init__(self, address: str, metadata: dict[str, Any]) -> None:
        self.address, self.metadata = address, metadata
        self._connection: ClientConnection | None = None

    async def ask(self, message: bytes, sent: asyncio.Event | None = None) -> bytes:
        """A new connection where there is none. `RsdError` for one that is lost, late or another's, and for a text.

        sent: set once the message is out, or never will be."""
        sent = sent or asyncio.Event()
        try:
            answer = await asyncio.wait_for(self._exchange(message, sent), TIMEOUT_S)
        except (OSError, TimeoutError, asyncio.TimeoutError, WebSocketException) as error:
            await self.close()
            reason = str(error) or f"no answer for {TIMEOUT_S:g} s"
            raise RsdError(f"{self.address}: the target's server is lost ({reason}); ask again") from error
        finally:
            sent.set()
        if isinstance(answer, str):
            await self.close()  # as openpi's server does after it
            raise RsdError(f"{self.address}: {answer}")
        return answer

    async def _exchange(self, message: bytes, sent: asyncio.Event) -> bytes | str:
        if self._connection is None:
            self._connection = await self._open()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._connection.recv(), AT_ONCE)  # it would be taken for this one's answer
            raise WebSocketException(TWICE)
        await self._connection.send(message)
        sent.set()
        return await self._connection.recv()

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError, WebSocketException):
                await connection.close()

    async def _open(self) -> ClientConnection:
        connection = await connect(self.address, compression=None, max_size=None, proxy=None)
        found = read_metadata(self.address, await connection.recv())
        if not same(found, self.metadata):
            await connection.close()
            raise RsdError(f"{self.address}: another policy is served there now; start the proxy anew")
        return connection


class Session:
    """A client's connection: its episode, and its own connection to the server behind."""

    def __init__(self, proxy: SpeculatingProxy) -> None:
        self.proxy, self.upstream = proxy, Upstream(proxy.address, proxy.metadata)
        self.state = EpisodeState()
        self.instruction = ""

    async def answer(self, message: bytes | str) -> bytes | str:
        """A text says what was wrong, as in openpi's protocol; the session lives on and the target is asked next."""
        begin = time.perf_counter()
        try:
            if isinstance(message, str):
                raise RsdError("message: expected msgpack in a binary frame, found a text frame")
            return await self._answer(message, begin)
        except Exception as error:  # of the drafter: the others' connections must not end with it
            if not isinstance(error, RsdError):
                traceback.print_exc()
            self.state = EpisodeState()
            return in_words(error, "proxy")

    async def _answer(self, message: bytes, begin: float) -> bytes:
        proxy, content = self.proxy, unpack(message, LIMITS)
        if not isinstance(content, Mapping):
            raise RsdError(f"message: expected a map, found {type(content).__name__}")
        instruction, reset, _ = words_of(content)
        if reset or instruction != self.instruction:
            self.state, self.instruction = EpisodeState(), instruction
        if reset and len(content) == 1:
            return await self.upstream.ask(message) if is_rsd(proxy.metadata) else pack({RESET: True})
        if missing := [key for key in (*IMAGES, STATE, PROMPT) if key not in content]:  # before the target is asked
            found = f"{', '.join(map(str, content)):.200}"
            raise RsdError(f"message: the drafter needs {', '.join(missing)}; found {found}")
        draft = partial(proxy.run, proxy.propose, content, self.state)
        if proxy.drafter.must_look(self.state, proxy.skip):
            answer, proposal = await both(partial(self.upstream.ask, message), draft)
        else:
            proposal = await draft()
            if proposal.trusted:
                return self._drafted(proposal, begin)
            answer = await self.upstream.ask(message)
        return await self._asked(answer, proposal)

    def _drafted(self, proposal: Proposal, begin: float) -> bytes:
        self.state = self.proxy.drafter.after(self.state, proposal.actions, None)
        stats = ChunkStats(DECODE, skipped=True, forced=False, expected_deviation_mm=proposal.expected_mm)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
        return pack({"actions": proposal.actions, "server_timing": timing, SPECULATION: plain_stats(stats)})

    async def _asked(self, answer: bytes, proposal: Proposal) -> bytes:
        content, drafter = unpack(answer, whose=self.upstream.address), self.proxy.drafter
        if not isinstance(content, dict) or "actions" not in content:
            raise RsdError(f"{self.upstream.address}: expected an answer with the key actions")
        actions = environment_ready(content["actions"], self.upstream.address)
        known = ChunkStats(DECODE, prefills=1, skipped=False, forced=proposal.forced)
        known = replace(known, expected_deviation_mm=proposal.expected_mm)
        stats = drafter.judged(proposal, actions, known)
        self.state = drafter.after(self.state, actions, stats.stood)
        return pack({**content, SPECULATION: plain_stats(stats)})


class SpeculatingProxy:
    """Serves at a port as `PolicyServer` does; address, metadata: of the server behind. The drafter has a thread."""

    def __init__(
        self, address: str, metadata: dict[str, Any], drafter: Drafter, skip: SkipRule, door: socket.socket
    ) -> None:
        self.address, self.metadata, self.drafter, self.skip = address, metadata, drafter, skip
        self._door, self._thread = door, ThreadPoolExecutor(1, "drafter")

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the drafter's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def propose(self, content: Mapping[Any, Any], state: EpisodeState) -> Proposal:
        size = self.drafter.stored.config.image_size
        views = [shrunk(square(key, content[key])[None], size)[0] for key in IMAGES]
        seen = Observation(np.stack(views), real_array(STATE, content[STATE]), content[PROMPT])
        return self.drafter.propose(seen, state, self.skip)

    async def serve(self, stop: asyncio.Event, listening: Callable[[str], None]) -> None:
        """Until `stop`; calls `listening` with the address as soon as clients may connect."""
        hello = pack({**self.metadata, SPECULATION: {"horizon": self.drafter.horizon, **asdict(self.skip)}})

        async def handle(client: ServerConnection) -> None:
            session = Session(self)
            try:
                with contextlib.suppress(ConnectionClosed):
                    await client.send(hello)
                    async for message in client:
                        await client.send(await session.answer(message))
            finally:
                await session.upstream.close()

        try:
            for _ in range(WARMUP):
                await self.run(self.propose, blank(self.drafter.stored.config.image_size), EpisodeState())
            await serve_until(stop, handle, self._door, listening)
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._door.close()


async def both(
    ask: Callable[[asyncio.Event], Coroutine[Any, Any, bytes]], draft: Callable[[], Coroutine[Any, Any, Proposal]]
) -> tuple[bytes, Proposal]:
    """The target's answer and the draft that is made meanwhile; a failure of either waits for the other.

    The question leaves first: the drafter's thread would hold it up for its own 5 ms."""
    sent = asyncio.Event()
    asked = asyncio.ensure_future(ask(sent))
    await sent.wait()
    drafted = asyncio.ensure_future(draft())
    await asyncio.wait((asked, drafted))
    for failed in filter(None, [drafted.exception(), asked.exception()]):
        raise failed
    return asked.result(), drafted.result()


def plain_stats(stats: ChunkStats) -> dict[str, Any]:
    """Without what is not known."""
    return {name: value for name, value in asdict(stats).items() if value not in (None, "", [], {})}
