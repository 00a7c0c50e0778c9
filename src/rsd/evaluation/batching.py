"""One process that owns the policy and predicts for many simulators at once.

A batch goes as soon as it is full, as every simulator that is there waits, or as its deadline is over. What an episode
remembers from chunk to chunk lies here, with the simulator's connection.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any

from rsd.types import ActionChunk, ChunkPolicy, Observation, RsdError

if TYPE_CHECKING:
    from rsd.evaluation.backend import Backend
    from rsd.evaluation.config import EvalConfig


@dataclass(frozen=True)
class Welcome:
    """What a simulator gets to know of the policy when it connects."""

    image_size: int
    versions: dict[str, str]
    description: dict[str, Any]


@dataclass
class Episode:
    """What the policy has left behind in a simulator's episode."""

    state: Any = None


@dataclass
class Request:
    connection: Connection
    observation: Observation
    episode: Episode
    arrived: float = field(default_factory=time.perf_counter)


class RemotePolicy:
    """The policy of another process, as a simulator's own. Raises EOFError when that process is gone."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address, authkey=bytes(multiprocessing.current_process().authkey))
        welcome: Welcome = self._connection.recv()
        self.versions, self.description = welcome.versions, welcome.description
        self._image_size, self._first = welcome.image_size, True

    @property
    def image_size(self) -> int:
        return self._image_size

    def reset(self, seed: int | None = None) -> None:
        """Forget the episode so far, with the next observation; what draws is not batched."""
        self._first = True

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `queue` is the wait for the batch to fill and begin, `total` holds it, too."""
        start = time.perf_counter()
        self._connection.send((observation, self._first))
        self._first = False
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RsdError(f"the policy's process could not predict: {answer}")
        total = 1000 * (time.perf_counter() - start)
        computed = answer.stats.latency_ms
        latency = {"queue": max(0.0, total - computed.get("total", 0.0)), **computed, "total": total}
        return replace(answer, stats=replace(answer.stats, latency_ms=latency))


class BatchServer:
    """Collects requests into batches. address: its socket. clients: simulators expected; fewer may be there."""

    def __init__(
        self, policy: ChunkPolicy, size: int, wait_ms: float, welcome: Welcome, clients: int, address: str
    ) -> None:
        self.policy, self.size, self.wait = policy, size, wait_ms / 1000
        self.welcome = welcome
        key = bytes(multiprocessing.current_process().authkey)
        self.listener = Listener(address, family="AF_UNIX", backlog=2 * clients, authkey=key)
        self._requests: queue.Queue[Request] = queue.Queue()
        self._connected = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Answer requests for ever."""
        threading.Thread(target=self._accept, daemon=True).start()
        while True:
            self._answer(self._collect())

    def _accept(self) -> None:
        while True:
            try:
                connection = self.listener.accept()
            except (OSError, EOFError, multiprocessing.AuthenticationError):
                continue  # someone hung up while connecting
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: Connection) -> None:
        with self._lock:
            self._connected += 1
        episode = Episode()
        try:
            connection.send(self.welcome)
            while True:
                observation, first = connection.recv()
                if first:
                    episode = Episode()
                self._requests.put(Request(connection, observation, episode))
        except (EOFError, OSError):
            connection.close()
        finally:
            with self._lock:
                self._connected -= 1

    def _collect(self) -> list[Request]:
        batch = [self._requests.get()]
        deadline = batch[0].arrived + self.wait
        while len(batch) < min(self.size, max(1, self._connected)):
            try:
                # past the deadline what has come already is still taken along
                batch.append(self._requests.get(timeout=max(0.0, deadline - time.perf_counter())))
            except queue.Empty:
                break
        return batch

    def _answer(self, batch: list[Request]) -> None:
        answers: Sequence[ActionChunk | str]
        try:
            answers = self._predict(batch)
        except Exception as error:
            answers = [f"{type(error).__name__}: {error}"] * len(batch)
            traceback.print_exc()
        for request, answer in zip(batch, answers, strict=True):
            try:
                request.connection.send(answer)
            except OSError:
                continue  # that simulator is gone


    def _predict(self, batch: list[Request]) -> list[ActionChunk]:
        """Chunks with complete statistics; the episodes go on."""
        states = [request.episode.state for request in batch]
        chunks, states, pending = self.policy.predict([request.observation for request in batch], states)
        if pending is not None:
            found, states = self.policy.verify_pending(pending)
            chunks = [replace(chunk, stats=stats) for chunk, stats in zip(chunks, found, strict=True)]
        for request, state in zip(batch, states, strict=True):
            request.episode.state = state
        return chunks


def policy_main(
    connection: Connection, config: EvalConfig, backend: Backend, threads: int, clients: int, address: str
) -> None:
    """Body of the policy's process: says Welcome once it listens, or Failed, then serves until it is ended."""
    from rsd.evaluation.workers import failed, prepare_process

    prepare_process(threads)
    try:
        import torch

        torch.set_num_threads(config.threads)
        if backend.make_batch_policy is None:
            raise RsdError(f"--batch {config.batch}: this policy cannot predict in batches")
        policy = backend.make_batch_policy(config)
        welcome = Welcome(policy.image_size, backend.versions(config.device), backend.describe_policy(config))
        server = BatchServer(policy, config.batch, config.batch_wait_ms, welcome, clients, address)
        connection.send(welcome)
    except Exception as error:
        connection.send(failed(error))
        return
    server.serve()
