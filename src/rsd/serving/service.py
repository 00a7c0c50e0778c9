"""One policy for several connections, one request after another: a message in, its answer out, without a network.

Every connection has an episode of its own, with what the policy left behind in it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rsd.chunks import checked_chunk
from rsd.evaluation.backend import cpu_model, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.policy import RsdPolicy
from rsd.targets.remote.request import IMAGES, LIMITS, PROMPT, STATE, read_request
from rsd.targets.remote.wire import pack, unpack
from rsd.types import RSD_ASYNC, STATE_DIM, ActionChunk, ChunkPolicy, Observation, RsdError
from rsd.versions import versions

LONGEST_TEXT = 1000  # characters of an answer that says what was wrong
WARMUP_PREDICTIONS = 3  # on a GPU a decoder that remembers takes another way from the second chunk on


class Servable(ChunkPolicy, Protocol):
    """What serving needs of a policy beyond its predictions."""

    @property
    def decode(self) -> str: ...

    @property
    def execute(self) -> int:
        """How many steps of a chunk a client is to execute."""
        ...

    @property
    def cameras(self) -> int:
        """How many of an observation's cameras it looks at, the first ones."""
        ...


class Memoryless:
    """A published OpenVLA policy, which remembers nothing, as a `Servable`."""

    def __init__(self, policy: Any) -> None:
        """policy: an `OpenVlaPolicy`, which is of an extra."""
        self.policy, self.decode, self.execute = policy, policy.decode, policy.execute
        self.image_size, self.cameras = policy.image_size, policy.cameras

    def predict(
        self, observations: Sequence[Observation], states: Sequence[None]
    ) -> tuple[list[ActionChunk], list[None], None]:
        return [self.policy.predict(observation) for observation in observations], [None] * len(states), None

    def verify_pending(self, pending: None) -> tuple[list[ActionChunk], list[None]]:
        raise RsdError("a published OpenVLA policy leaves nothing pending")


@dataclass
class Session:
    """A connection's episode. instruction: "" before its first chunk; state: what the policy left behind in it;
    pending: what is still to be verified of its last chunk.

    previous_ms: what the request before took, from its arrival to the end of its answer.
    """

    instruction: str = ""
    state: Any = None
    pending: Any = None
    previous_ms: float | None = None

    def end_episode(self) -> None:
        self.instruction, self.state, self.pending = "", None, None


def load_served(config: EvalConfig) -> Servable:
    """The policy that `rsd eval` would run with these options."""
    if config.decode == RSD_ASYNC:
        raise RsdError(f"--decode {RSD_ASYNC}: openpi's protocol corrects no answers; expected another, rsd-fused say")
    policy = rsd_policy(config)
    return policy.core if isinstance(policy, RsdPolicy) else Memoryless(policy)


def versions_on(device: str) -> dict[str, str]:
    """Of everything that computes, the device and, on a CPU, the threads: sums round otherwise with another number."""
    if device.startswith("cuda"):
        return {**versions(), "device": torch.cuda.get_device_name(device)}
    return {**versions(), "device": cpu_model(), "torch_threads": str(torch.get_num_threads())}


class PolicyService:
    """Not thread-safe: whoever owns it calls from one thread."""

    def __init__(self, policy: Servable) -> None:
        self.policy = policy

    def warm_up(self) -> list[int]:
        """Take the whole path before anyone waits: lazy initialisation, CUDA graphs -> shape of an action chunk."""
        side = self.policy.image_size + 2  # to be resized
        content = {key: np.zeros((side, side, 3), dtype=np.uint8) for key in IMAGES}
        message = pack({**content, STATE: np.zeros(STATE_DIM), PROMPT: "pick up the black bowl"})
        session = Session()
        for _ in range(WARMUP_PREDICTIONS):
            answer = self.answer(session, message, time.perf_counter())
            if isinstance(answer, str):
                raise RsdError(f"warming up: {answer}")
            shape = list(unpack(answer)["actions"].shape)
        return shape

    def answer(self, session: Session, message: bytes | str, arrived: float) -> bytes | str:
        """The answer to one message; a text says what was wrong, as in openpi's protocol, and the session lives on.

        arrived: time.perf_counter() then.
        """
        started = time.perf_counter()
        try:
            if isinstance(message, str):
                raise RsdError("message: expected msgpack in a binary frame, found a text frame")
            request = read_request(unpack(message, LIMITS), self.policy.image_size, self.policy.cameras)
            if request.reset:
                session.end_episode()
            if request.observation is None:
                return pack({"reset": True})
            chunk = self.predict(session, request.observation)
        except RsdError as error:
            return f"rsd serve: {' '.join(str(error).split()):.{LONGEST_TEXT}}"
        except Exception as error:  # of the policy: the others' connections must not end with it
            traceback.print_exc()
            return f"rsd serve: the policy failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        done = time.perf_counter()
        timing = {"infer_ms": 1e3 * (done - started), "queue_ms": 1e3 * (started - arrived)}
        if session.previous_ms is not None:
            timing["prev_total_ms"] = session.previous_ms
        return pack({"actions": chunk.actions, "server_timing": timing, "stats": asdict(chunk.stats)})

    def verify(self, session: Session) -> None:
        """What is pending once an answer is under way. A failure ends the episode, not the server."""
        pending, session.pending = session.pending, None
        if pending is None:
            return
        try:
            _, (session.state,) = self.policy.verify_pending(pending)
        except Exception:
            traceback.print_exc()
            session.end_episode()

    def predict(self, session: Session, observation: Observation) -> ActionChunk:
        """The session's next chunk, checked; what the one before left pending is verified first."""
        self.verify(session)
        if session.instruction != observation.instruction:
            session.end_episode()
        session.instruction = ""  # a prediction that fails ends the episode
        (chunk,), (session.state,), session.pending = self.policy.predict([observation], [session.state])
        checked_chunk(chunk)
        session.instruction = observation.instruction
        return chunk
