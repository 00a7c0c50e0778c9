"""One process that owns the policy and predicts for many simulators at once.

A batch goes as soon as it is full, as every simulator that is there waits, or as its deadline is over. What an episode
remembers from chunk to chunk lies here, with the simulator's connection.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any

from rsd.checks import told
from rsd.evaluation.backend import Backend
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.workers import Ready, failed, prepare_process
from rsd.types import ActionChunk, ChunkPolicy, Observation


class BatchServer:
    """Collects requests into batches of at most `size`."""

    def __init__(self, policy: ChunkPolicy, size: int, wait_ms: float, ready: Ready, control: Connection) -> None:
        """ready: said to every simulator; control: where the simulators' connections come from, as file handles."""
        self._policy, self._size, self._wait = policy, size, wait_ms / 1000
        self._ready, self._control = ready, control
        self._states: dict[Connection, Any] = {}  # what the policy has left behind in each simulator's episode

    def serve(self) -> None:
        """Answer requests for ever."""
        computing_since = time.perf_counter()
        while True:
            asked = self._collect(computing_since + self._wait)
            computing_since = time.perf_counter()
            for simulator, answer in zip(asked, self._answers(asked), strict=True):
                with contextlib.suppress(OSError):  # that simulator is gone, which its next reading says
                    simulator.send(answer)

    def _collect(self, deadline: float) -> dict[Connection, Observation]:
        """deadline: of what came while the last batch was computed; past it what has come already is still taken."""
        asked: dict[Connection, Observation] = {}
        while len(asked) < min(self._size, max(1, len(self._states))):
            channels = [self._control, *(simulator for simulator in self._states if simulator not in asked)]
            spoke = wait(channels, max(0.0, deadline - time.perf_counter()) if asked else 0.0)
            if not spoke and asked:
                break
            if not spoke:
                spoke = wait(channels)
                deadline = time.perf_counter() + self._wait
            for channel in spoke:
                if channel is self._control:
                    simulator = Connection(recv_handle(self._control))
                    self._states[simulator] = None
                    with contextlib.suppress(OSError):  # gone already, which its first reading says
                        simulator.send(self._ready)
                elif isinstance(channel, Connection) and len(asked) < self._size:
                    try:
                        asked[channel], first = channel.recv()
                    except (EOFError, OSError):
                        channel.close()
                        del self._states[channel]
                        continue
                    if first:
                        self._states[channel] = None
        return asked

    def _answers(self, asked: dict[Connection, Observation]) -> Sequence[ActionChunk | str]:
        """Chunks with complete statistics, or what went wrong; the episodes go on."""
        try:
            chunks, states, pending = self._policy.predict(list(asked.values()), [self._states[c] for c in asked])
            if pending is not None:
                chunks, states = self._policy.verify_pending(pending)
            self._states.update(zip(asked, states, strict=True))
        except Exception as error:
            traceback.print_exc()
            return [f"{type(error).__name__}: {told(error)}"] * len(asked)
        return chunks


def policy_main(connection: Connection, config: EvalConfig, backend: Backend, threads: int, gpu: str | None) -> None:
    """Body of the policy's process: says Ready or Failed, then serves until it is ended."""
    prepare_process(threads, gpu)
    try:
        policy = backend.make_batch_policy(config)
        ready = Ready(backend.versions(config.device), backend.describe_policy(config), policy.image_size)
        connection.send(ready)
    except Exception as error:
        connection.send(failed(error))
        return
    BatchServer(policy, config.batch, config.batch_wait_ms, ready, connection).serve()
