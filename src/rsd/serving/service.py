"""One policy for several connections, one request after another: a message in, its answer out, without a network.

Every connection has an episode of its own. What the policy remembers of it is put aside while another one's turn is.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rsd.evaluation.backend import cpu_model, rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.rollout import checked_chunk
from rsd.openvla.policy import OpenVlaPolicy
from rsd.policy import RsdPolicy
from rsd.serving.request import IMAGES, LIMITS, PROMPT, STATE, read_request
from rsd.serving.wire import pack, unpack
from rsd.types import STATE_DIM, ActionChunk, FollowsUp, Observation, Policy, RsdError
from rsd.versions import versions

LONGEST_TEXT = 1000  # characters of an answer that says what was wrong
WARMUP_PREDICTIONS = 3  # on a GPU a decoder that remembers takes another way from the second chunk on


class Servable(Policy, Protocol):
    """What serving needs of a policy beyond a rollout."""

    decode: str

    @property
    def cameras(self) -> int:
        """How many of an observation's cameras it looks at, the first ones."""
        ...

    def swap_memory(self, memory: Any = None) -> Any:
        """Turn to another episode: what an earlier call returned of it, or None at its start -> this episode's."""
        ...


@dataclass
class Session:
    """A connection's episode. instruction: "" before its first chunk; memory: None while the policy itself has it.

    previous_ms: what the request before took, from its arrival to the end of its answer.
    """

    instruction: str = ""
    memory: Any = None
    previous_ms: float | None = None


def load_policy(config: EvalConfig) -> Servable:
    """The policy that `rsd eval` would run with these options."""
    policy = rsd_policy(config)
    assert isinstance(policy, RsdPolicy | OpenVlaPolicy)  # what `rsd_policy` makes of a checkpoint
    return policy


def versions_on(device: str) -> dict[str, str]:
    """Of everything that computes, the device and, on a CPU, the threads: sums round otherwise with another number."""
    if device.startswith("cuda"):
        return {**versions(), "device": torch.cuda.get_device_name(device)}
    return {**versions(), "device": cpu_model(), "torch_threads": str(torch.get_num_threads())}


class PolicyService:
    """Not thread-safe: whoever owns it calls from one thread."""

    def __init__(self, policy: Servable) -> None:
        self.policy = policy
        self._at_work = Session()  # whose memory is in the policy

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
                session.instruction = ""
            if request.observation is None:
                return pack({"reset": True})
            chunk = self._predict(session, request.observation)
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

    def follow_up(self) -> None:
        """What the policy has left to do once an answer is under way. A failure ends the episode, not the server."""
        if not isinstance(self.policy, FollowsUp):
            return
        try:
            self.policy.follow_up()
        except Exception:
            traceback.print_exc()
            self._at_work.instruction = ""

    def _predict(self, session: Session, observation: Observation) -> ActionChunk:
        if session is not self._at_work:
            self.follow_up()  # a failure is of that episode, not of this request
            self._at_work.memory = self.policy.swap_memory(session.memory)
            self._at_work, session.memory = session, None
        if session.instruction != observation.instruction:
            self.policy.reset()
        session.instruction = ""  # a prediction that fails ends the episode
        chunk = checked_chunk(self.policy.predict(observation))
        session.instruction = observation.instruction
        return chunk
