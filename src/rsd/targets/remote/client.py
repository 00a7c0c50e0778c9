"""A served policy as if it were here: what `rsd eval --policy ws://HOST:PORT` drives the simulator with."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Time, checked
from rsd.chunks import MOST_STEPS, ROUNDING, checked_chunk
from rsd.json_files import from_json
from rsd.targets.remote.connection import Connection
from rsd.targets.remote.request import CORRECTIONS, DRAFT, IMAGES, MAX_SIDE, PROMPT, RESET, STATE, STEPS
from rsd.targets.remote.wire import Welcome, pack, unpack
from rsd.types import ACTION_DIM, VERIFY_PENDING, ActionChunk, ChunkStats, Observation, RsdError, check_observation

ODD = (KeyError, TypeError, AttributeError, ValueError, RsdError)  # what reading an impossible answer raises


class RemotePolicy:
    """The policy of an `rsd serve`, with an episode memory of its own there; a lost connection is an `RsdError`.

    `reset` connects anew where the connection was lost, and insists on the same policy as before.
    """

    _corrects = False  # whether a request asks for the target's answer, too

    def __init__(self, address: str, timeout_s: float = 60.0) -> None:
        """address: ws://HOST:PORT; timeout_s: how long to wait for any answer."""
        self.address = address
        self._connection = Connection(address, timeout_s, "an `rsd serve`")
        self.welcome, self._first = self._connect(), True
        self.decode, self.image_size = self.welcome.decode, self.welcome.image_size
        self.num_inference_steps = self.welcome.num_inference_steps

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far, with the next observation. Nothing that is served is drawn: no seed counts."""
        self._first = True
        if not self._connection.is_open and (found := self._connect()) != self.welcome:
            self.close()
            raise RsdError(f"{self.address}: another policy is served there now: {found}; expected {self.welcome}")

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `total` is the whole round trip, `queue` the wait for other clients, `network` the way there and
        back with packing and unpacking."""
        return self._asked(observation, {CORRECTIONS: True} if self._corrects else {})

    def continue_from(self, observation: Observation, draft: NDArray[np.float32], steps: int) -> ActionChunk:
        """As `rsd.types.Continues` has it, of a server whose welcome tells of denoising steps."""
        return self._asked(observation, {DRAFT: draft, STEPS: steps})

    def _asked(self, observation: Observation, more: dict[str, Any]) -> ActionChunk:
        observation = check_observation(observation)
        start = time.perf_counter()
        views = {key: view for key, view in zip(IMAGES, observation.images, strict=True) if key in self.welcome.images}
        words = {STATE: observation.state, PROMPT: observation.instruction, RESET: self._first}
        answer = unpack(self._connection.ask(pack({**views, **words, **more})), whose=self.address)
        self._first = False
        total = 1e3 * (time.perf_counter() - start)
        try:
            timing, chunk = answer["server_timing"], self._chunk_of(answer)
            stats = chunk.stats
            queued, inferred = (checked(Time, timing[name], name) for name in ("queue_ms", "infer_ms"))
            if queued + inferred > total:
                raise ValueError(f"{queued} and {inferred} ms of {total:.1f} ms")
            if (longest := max(stats.latency_ms.values(), default=0.0)) > inferred + ROUNDING:
                raise ValueError(f"a stage of {longest:g} ms in the {inferred:g} ms that it took")
        except ODD as error:
            raise self._odd(error) from error
        latency = {"network": total - queued - inferred, "queue": queued, **stats.latency_ms, "total": total}
        return replace(chunk, stats=replace(stats, latency_ms=latency))

    def close(self) -> None:
        self._connection.close()

    def _chunk_of(self, content: Any) -> ActionChunk:
        """Of a message's `actions` and `stats`; one of ODD for impossible ones."""
        stats, actions = ChunkStats(**content["stats"]), content["actions"]
        if actions.dtype != np.float32 or (self.welcome.execute and actions.shape != self.welcome.chunk):  # None: any
            raise ValueError(f"actions {actions.dtype} {list(actions.shape)} in the place of {self.welcome.chunk}")
        chunk = checked_chunk(ActionChunk(actions.copy(), stats, self.welcome.execute))  # what arrived is read-only
        if stats.decode != self.decode:
            raise ValueError(f"decoded with {stats.decode}, announced was {self.decode}")
        return chunk

    def _odd(self, error: Exception) -> RsdError:
        found = f"{type(error).__name__}: {error!s:.200}"
        return RsdError(f"{self.address}: not the answer of this version's `rsd serve` ({found})")

    def _connect(self) -> Welcome:
        return read_welcome(self.address, self._connection.open())


class CorrectedPolicy(RemotePolicy):
    """Of an `rsd serve --decode rsd-async`: the draft at once, the target's answer in a second message."""

    _corrects = True
    _chunk: ActionChunk | None = None  # whose correction is on its way

    def reset(self, seed: int | None = None) -> None:
        with suppress(RsdError):  # of the episode before
            self.complete()
        super().reset(seed)

    def predict(self, observation: Observation) -> ActionChunk:
        """The draft; what is left of the chunk before is waited for first."""
        self.complete()
        self._chunk = super().predict(observation)
        return self._chunk

    def complete(self) -> ActionChunk | None:
        """The last chunk with the target's `answer`, waited for; None if none is on its way."""
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            return None
        message = unpack(self._connection.receive(), whose=self.address)
        try:
            found = self._chunk_of(message["correction"])
            checked(bool, found.stats.stood, "stood")
            later = {VERIFY_PENDING: checked(Time, found.stats.latency_ms[VERIFY_PENDING], VERIFY_PENDING)}
        except ODD as error:
            raise self._odd(error) from error
        stats = replace(found.stats, latency_ms={**chunk.stats.latency_ms, **later})
        return replace(chunk, stats=stats, answer=found.actions)


def read_welcome(address: str, message: bytes | str) -> Welcome:
    content: Any = unpack(message, whose=address) if isinstance(message, bytes) else message
    with suppress(RsdError, TypeError):  # keys of any kind may have been sent
        welcome = from_json(Welcome, content if isinstance(content, dict) else {}, address)
        steps = welcome.chunk[0] if len(welcome.chunk) == 2 and welcome.chunk[1] == ACTION_DIM else 0
        known = welcome.images in (IMAGES, IMAGES[:1]) and 0 < welcome.image_size <= MAX_SIDE
        if known and 0 < steps <= MOST_STEPS and 0 < (steps if welcome.execute is None else welcome.execute) <= steps:
            return welcome
    raise RsdError(f"{address}: expected this version's `rsd serve`, found {content!r:.200}")
