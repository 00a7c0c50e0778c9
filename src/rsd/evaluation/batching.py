"""One process that owns the policy and predicts for many simulators at once.

A batch goes as soon as it is full, as every simulator that is there waits, or as its deadline is over. It always has
the same size: what is missing is filled up and thrown away. With one shape there is one way to multiply the matrices,
so an episode does not depend on how full its batches happened to be; its place in them can still move the last bit
(measured on a CPU: up to 7e-7 in the actions of `l1`, nothing in those of `ar` and `rsd`, which are tokens).
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any, Protocol

from rsd.types import ActionChunk, Observation, RsdError

if TYPE_CHECKING:
    from rsd.decoding.steps import Decoded
    from rsd.evaluation.backend import Backend
    from rsd.evaluation.config import EvalConfig
    from rsd.policy import RsdPolicy

# Decoders that keep nothing from one chunk to the next; a batch mixes episodes, so no other may be batched.
STATELESS = ("ar", "parallel", "l1", "rsd", "draft")


class BatchPolicy(Protocol):
    @property
    def image_size(self) -> int: ...

    def predict_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]: ...


class BatchedRsdPolicy:
    """Predicts `size` observations in one go. Raises RsdError for a decoder that cannot be batched."""

    def __init__(self, policy: RsdPolicy, size: int) -> None:
        if policy.decode not in STATELESS:
            raise RsdError(
                f"--batch {size}: --decode {policy.decode} may keep state from chunk to chunk, which a batch of "
                f"several episodes would mix up; leave --batch out, or decode by one of {', '.join(STATELESS)}"
            )
        if policy.decode == "rsd" and policy.decoder.fine == "sequential":
            raise RsdError(
                f"--batch {size}: --acceptance {policy.acceptance} decodes the fine levels one after another, each "
                "observation at its own pace; leave --batch out"
            )
        self.policy, self.size = policy, size

    @property
    def image_size(self) -> int:
        return self.policy.image_size

    def predict_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """At most `size` observations -> their chunks; latency_ms is that of the whole batch."""
        import torch

        from rsd.decoding.steps import Scene, Stopwatch

        if not 0 < len(observations) <= self.size:
            raise RsdError(f"batch: expected 1 to {self.size} observations, found {len(observations)}")
        policy, watch = self.policy, Stopwatch(self.policy.device)
        filled = [*observations, *[observations[-1]] * (self.size - len(observations))]
        with torch.inference_mode(), watch.stage("total"):
            with watch.stage("preprocess"):
                scene = Scene(*policy._preprocess(filled))
            decoded = policy._strategy(policy.decoder, scene, watch)
            policy.decoder.check()
            actions = policy._to_actions(decoded.value, decoded.gripper)
        chunks = []
        for row in range(len(observations)):
            stats = policy._stats(one_row(decoded, row), watch)
            chunks.append(ActionChunk(actions[row], replace(stats, latency_ms=dict(watch.ms))))
        return chunks


def one_row(decoded: Decoded, row: int) -> Decoded:
    """The part of a batch's decoding that is about one observation."""
    from torch import Tensor

    found = {field.name: getattr(decoded, field.name) for field in fields(decoded)}
    rows: dict[str, Any] = {name: value[row : row + 1] for name, value in found.items() if isinstance(value, Tensor)}
    return replace(decoded, **rows)


@dataclass(frozen=True)
class Welcome:
    """What a simulator gets to know of the policy when it connects."""

    image_size: int
    versions: dict[str, str]
    description: dict[str, Any]


@dataclass
class Request:
    connection: Connection
    observation: Observation
    arrived: float


class RemotePolicy:
    """The policy of another process, as a simulator's own. Raises EOFError when that process is gone."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address, authkey=bytes(multiprocessing.current_process().authkey))
        welcome: Welcome = self._connection.recv()
        self.versions, self.description = welcome.versions, welcome.description
        self._image_size = welcome.image_size

    @property
    def image_size(self) -> int:
        return self._image_size

    def reset(self) -> None:
        """Nothing to forget: a batched policy keeps no state."""

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `queue` is the wait for the batch to fill and begin, `total` holds it, too."""
        start = time.perf_counter()
        self._connection.send(observation)
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
        self, policy: BatchPolicy, size: int, wait_ms: float, welcome: Welcome, clients: int, address: str
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
        try:
            connection.send(self.welcome)
            while True:
                observation = connection.recv()
                self._requests.put(Request(connection, observation, time.perf_counter()))
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
            answers = self.policy.predict_batch([request.observation for request in batch])
        except Exception as error:
            answers = [f"{type(error).__name__}: {error}"] * len(batch)
            traceback.print_exc()
        for request, answer in zip(batch, answers, strict=True):
            try:
                request.connection.send(answer)
            except OSError:
                continue  # that simulator is gone


def policy_main(
    connection: Connection, config: EvalConfig, backend: Backend, threads: int, clients: int, address: str
) -> None:
    """Body of the policy's process: says Welcome once it listens, or Failed, then serves until it is ended."""
    from rsd.evaluation.workers import failed, prepare_process

    prepare_process(threads)
    try:
        import torch

        torch.set_num_threads(threads)
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
