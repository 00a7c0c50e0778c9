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
from rsd.serving.request import read_request
from rsd.serving.wire import pack, unpack
from rsd.types import CAMERAS, STATE_DIM, ActionChunk, Observation, Policy, RsdError
from rsd.versions import versions

WARMUP_PREDICTIONS = 3  # a decoder that remembers takes another way from the second chunk on


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
    return {**versions(), "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()}


class PolicyService:
    """Not thread-safe: whoever owns it calls from one thread."""

    def __init__(self, policy: Servable) -> None:
        self.policy = policy
        self._at_work = Session()  # whose memory is in the policy

    def warm_up(self) -> list[int]:
        """Pay for lazy initialisation and CUDA graphs before anyone waits -> the shape of an action chunk."""
        size = self.policy.image_size
        images = np.zeros((len(CAMERAS), size, size, 3), dtype=np.uint8)
        observation = Observation(images, np.zeros(STATE_DIM, dtype=np.float32), "pick up the black bowl")
        for _ in range(WARMUP_PREDICTIONS):
            chunk = self._predict(self._at_work, observation)
        return list(chunk.actions.shape)

    def answer(self, session: Session, message: bytes | str, arrived: float) -> bytes | str:
        """The answer to one message; a text says what was wrong, as in openpi's protocol, and the session lives on.

        arrived: time.perf_counter() then.
        """
        started = time.perf_counter()
        try:
            if isinstance(message, str):
                raise RsdError("message: expected msgpack in a binary frame, found a text frame")
            request = read_request(unpack(message), self.policy.image_size, self.policy.cameras)
            if request.reset:
                session.instruction = ""
            if request.observation is None:
                return pack({"reset": True})
            chunk = self._predict(session, request.observation)
        except RsdError as error:
            return f"rsd serve: {error}"
        except Exception as error:  # of the policy: the others' connections must not end with it
            traceback.print_exc()
            return f"rsd serve: the policy failed: {type(error).__name__}: {error}"
        done = time.perf_counter()
        timing = {"infer_ms": 1e3 * (done - started), "queue_ms": 1e3 * (started - arrived)}
        if session.previous_ms is not None:
            timing["prev_total_ms"] = session.previous_ms
        return pack({"actions": chunk.actions, "server_timing": timing, "stats": asdict(chunk.stats)})

    def _predict(self, session: Session, observation: Observation) -> ActionChunk:
        if session is not self._at_work:
            self._at_work.memory = self.policy.swap_memory(session.memory)
            self._at_work, session.memory = session, None
        if session.instruction != observation.instruction:
            self.policy.reset()
        session.instruction = ""  # a prediction that fails ends the episode
        chunk = checked_chunk(self.policy.predict(observation))
        session.instruction = observation.instruction
        return chunk
