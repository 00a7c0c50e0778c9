"""A served policy as if it were here: what `rsd eval --policy ws://HOST:PORT` drives the simulator with."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from rsd.evaluation.config import EvalConfig, option
from rsd.serving.request import IMAGES, PROMPT, RESET, STATE
from rsd.serving.server import Welcome
from rsd.serving.wire import pack, unpack
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

try:
    from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
    from websockets.sync.client import ClientConnection, connect
except ImportError as error:
    raise RsdError("serving needs websockets, found none: pip install 'rsd-vla[serve]'") from error


class RemotePolicy:
    """The policy of an `rsd serve`, with an episode memory of its own there; a lost connection is an `RsdError`.

    `reset` connects anew where the connection was lost, and insists on the same policy as before.
    """

    def __init__(self, address: str, timeout_s: float = 60.0) -> None:
        """address: ws://HOST:PORT; timeout_s: how long to wait for any answer."""
        self.address, self.timeout_s = address, timeout_s
        self._connection: ClientConnection | None = None
        self._open = ExitStack()
        self.welcome = self._connect()
        self._first = True

    @property
    def image_size(self) -> int:
        return self.welcome.image_size

    @property
    def decode(self) -> str:
        return self.welcome.decode

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far, with the next observation. Nothing that is served is drawn: no seed counts."""
        self._first = True
        if self._connection is None and (found := self._connect()) != self.welcome:
            self.close()
            raise RsdError(f"{self.address}: another policy is served there now: {found}; expected {self.welcome}")

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `total` is the whole round trip, `queue` the wait for other clients, `network` the way there and
        back with packing and unpacking."""
        start = time.perf_counter()
        views = {key: view for key, view in zip(IMAGES, observation.images, strict=True) if key in self.welcome.images}
        words = {STATE: observation.state, PROMPT: observation.instruction, RESET: self._first}
        answer = self._ask({**views, **words})
        self._first = False
        total = 1e3 * (time.perf_counter() - start)
        try:
            timing, stats = answer["server_timing"], ChunkStats(**answer["stats"])
            queued, inferred = timing["queue_ms"], timing["infer_ms"]
            actions = answer["actions"].copy()  # what arrived is read-only
        except (KeyError, TypeError, AttributeError) as error:
            raise RsdError(f"{self.address}: not the answer of this version's `rsd serve` ({error!r})") from error
        latency = {"network": total - queued - inferred, "queue": queued, **stats.latency_ms, "total": total}
        return ActionChunk(actions, replace(stats, latency_ms=latency))

    def close(self) -> None:
        self._connection = None
        self._open.close()

    def _connect(self) -> Welcome:
        try:
            opening = connect(self.address, compression=None, max_size=None, open_timeout=self.timeout_s)
            self._connection = self._open.enter_context(opening)
            return read_welcome(self.address, self._receive())
        except (OSError, InvalidURI, InvalidHandshake) as error:
            expected = "expected an `rsd serve` at ws://HOST:PORT"
            raise RsdError(f"{self.address}: {expected}, found none that answers ({error})") from error

    def _ask(self, content: dict[str, Any]) -> Any:
        if self._connection is None:
            raise RsdError(f"{self.address}: the connection was lost; a new episode (`reset`) connects anew")
        try:
            self._connection.send(pack(content))
        except WebSocketException as error:
            self.close()
            raise RsdError(f"{self.address}: the connection was lost ({error})") from error
        answer = self._receive()
        if isinstance(answer, str):
            raise RsdError(f"{self.address}: {answer}")
        return unpack(answer)

    def _receive(self) -> bytes | str:
        assert self._connection is not None
        try:
            return self._connection.recv(self.timeout_s)
        except (TimeoutError, WebSocketException) as error:
            self.close()  # a late answer must not be taken for the next one
            reason = str(error) or f"no answer for {self.timeout_s:g} s"
            raise RsdError(f"{self.address}: the connection was lost ({reason})") from error


def read_welcome(address: str, message: bytes | str) -> Welcome:
    content = unpack(message) if isinstance(message, bytes) else message
    names = {field.name for field in fields(Welcome)}
    if not isinstance(content, dict) or content.keys() != names:
        raise RsdError(f"{address}: expected this version's `rsd serve`, found {content!r:.200}")
    return Welcome(**{**content, "images": tuple(content["images"]), "chunk": tuple(content["chunk"])})


def policy_for(config: EvalConfig) -> RemotePolicy:
    """The policy served at `config.policy`; `RsdError` where the options ask for another one."""
    own = ("acceptance", "temperature", "skip_threshold_mm", "max_skips", "memory_chunks", "target_at_reset", "audit")
    mine = (*own, "device", "batch", "engine")  # of the server
    if given := [option(name) for name in mine if getattr(config, name) != getattr(EvalConfig, name)]:
        raise RsdError(f"{config.policy}: {', '.join(given)} cannot be chosen here; give it to `rsd serve`")
    remote = RemotePolicy(config.policy)
    if remote.decode != config.decode:
        remote.close()
        raise RsdError(f"{config.policy}: decodes with {remote.decode}, asked for is --decode {config.decode}")
    return remote


def describe(config: EvalConfig) -> dict[str, Any]:
    """What names the served policy beyond doubt, and what it runs on."""
    remote = policy_for(config)
    remote.close()
    return {**remote.welcome.policy, "policy": config.policy, "server": remote.welcome.versions}
