"""One policy for several connections, one request after another: a message in, its answer out, without a network.

Every connection has an episode of its own, with what the policy left behind in it. With `rsd-async` an answer is the
draft at once, but first, and where it opens or closes the gripper and the target's last answer did not, what the target
makes of it. A client that asks for corrections always gets the draft, and what becomes of it in a second message.
"""

from __future__ import annotations

import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from rsd.chunks import checked_chunk
from rsd.decoding.course import NOTHING, OWN, Course, begun
from rsd.devices import cpu_model
from rsd.evaluation import foreign
from rsd.evaluation.backend import rsd_policy
from rsd.evaluation.config import EvalConfig
from rsd.policy import RsdPolicy, SpeculativePolicy
from rsd.targets.black_box import SpeculatingPolicy
from rsd.targets.remote.request import CORRECTIONS, DRAFT, IMAGES, LIMITS, PROMPT, STATE, read_request
from rsd.targets.remote.wire import pack, unpack
from rsd.types import CAMERAS, RSD_ASYNC, STATE_DIM, ActionChunk, Observation, Policy, RsdError
from rsd.versions import versions

LONGEST_TEXT = 1000  # characters of an answer that says what was wrong
WARMUP_PREDICTIONS = 3  # on a GPU a decoder that remembers takes another way from the second chunk on


class Memoryless:
    """A published OpenVLA policy, which remembers nothing, for a server."""

    def __init__(self, policy: Any) -> None:
        """policy: an `OpenVlaPolicy`, which is of an extra."""
        self.policy, self.decode, self.execute = policy, policy.decode, policy.execute
        self.image_size, self.cameras = policy.image_size, policy.cameras

    def predict(
        self, observations: Sequence[Observation], states: Sequence[None]
    ) -> tuple[list[ActionChunk], list[None], None]:
        return [self.policy.predict(observation) for observation in observations], [None] * len(states), None

    def verify_pending(self, pending: None) -> tuple[list[ActionChunk], list[None]]:
        raise RsdError("a policy without memory leaves nothing pending")


class OwnEpisodes(Memoryless):
    """Policies that keep their episode inside, as a class of one's own does: each episode has an instance to itself,
    which `reset` begins, and which is free for another once that is over."""

    def __init__(self, first: Any, another: Callable[[], Policy], execute: int | None) -> None:
        """first: with `decode`; another: makes one more where all are taken; execute: steps of a chunk, None: all."""
        self.decode, self.image_size, self.cameras, self.execute = first.decode, first.image_size, len(CAMERAS), execute
        self._free, self._another = [first], another

    def predict(self, observations: Sequence[Observation], states: Sequence[Any]) -> Any:
        (observation,), (state,) = observations, states
        if state is None:
            policy = self._free.pop() if self._free else self._another()
            weakref.finalize(state := partial(policy.predict), self._free.append, policy)
            policy.reset()
        return [state(observation)], [state], None


Servable = SpeculativePolicy | Memoryless


@dataclass
class Session:
    """A connection's episode. instruction: "" before its first chunk; state: what the policy left behind in it;
    pending: what is still to be verified of its last chunk.

    Of `rsd-async`: corrections: its client takes them; found: the last chunk, once the target has looked; left: what
    the target told of the steps from the next observation on.
    previous_ms: what the request before took, from its arrival to the end of its answer.
    """

    instruction: str = ""
    state: Any = None
    pending: Any = None
    corrections: bool = False
    found: ActionChunk | None = None
    left: Course = NOTHING
    previous_ms: float | None = None

    def end_episode(self) -> None:
        self.instruction, self.state, self.pending = "", None, None
        self.found, self.left = None, NOTHING


def load_served(config: EvalConfig) -> Servable:
    """The policy that `rsd eval` would run with these options."""
    policy = rsd_policy(config)
    if config.custom:
        return OwnEpisodes(policy, partial(another, policy, config), config.execute)
    return policy.core if isinstance(policy, RsdPolicy) else Memoryless(policy)


def another(first: Any, config: EvalConfig) -> Policy:
    """One more instance of a class of one's own, with the same drafter; `RsdError` where there can be but one."""
    try:
        if not config.drafter:
            return foreign.custom(config)
        target = first.target and foreign.custom(foreign.alone(config))
        return SpeculatingPolicy(first.drafter, target, first.skip, first.decode, steps=first.steps)
    except RsdError as error:
        raise RsdError(f"{error}; another client has the one that there is, ask again later") from error


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
        message = pack(blank(self.policy.image_size + 2))  # to be resized
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
            if request.corrections and self.policy.decode != RSD_ASYNC:
                raise RsdError(f"{CORRECTIONS}: expected a server of --decode {RSD_ASYNC}, found {self.policy.decode}")
            if request.draft is not None and not getattr(self.policy, "num_inference_steps", 0):
                raise RsdError(f"{DRAFT}: this policy does not continue from one; leave it out")
            session.corrections = request.corrections
            more = {} if request.draft is None else {"draft": request.draft}
            chunk, before = self.predict(session, request.observation, **more)
        except (Exception, SystemExit) as error:  # of the policy: the others' connections must not end with it
            if not isinstance(error, RsdError):
                traceback.print_exc()
            return in_words(error)
        done = time.perf_counter()
        timing = {"infer_ms": 1e3 * (done - started), "queue_ms": 1e3 * (started - arrived)}
        if session.previous_ms is not None:
            timing["prev_total_ms"] = session.previous_ms
        content = {"actions": chunk.actions, "server_timing": timing, "stats": asdict(chunk.stats)}
        if before is not None and before.answer is not None and not request.corrections:
            content["previous"] = {"actions": before.answer, "stats": asdict(before.stats)}
        return pack(content)

    def verify(self, session: Session) -> bytes | str | None:
        """What is pending once an answer is under way -> the message with it for a client that asked for corrections.
        A failure ends the episode, not the server."""
        pending, session.pending = session.pending, None
        if pending is None:
            return None
        started = time.perf_counter()
        try:
            (found,), (session.state,) = self.policy.verify_pending(pending)
            if found.answer is None:
                return None
            self._corrected(session, found)
        except Exception as error:
            traceback.print_exc()
            session.end_episode()
            return in_words(error) if session.corrections else None
        if not session.corrections:
            return None
        timing = {"infer_ms": 1e3 * (time.perf_counter() - started)}
        correction = {"actions": found.answer, "stats": asdict(found.stats)}
        return pack({"correction": correction, "server_timing": timing})

    def predict(
        self, session: Session, observation: Observation, **more: Any
    ) -> tuple[ActionChunk, ActionChunk | None]:
        """The chunk to answer with, and the one before, once the target has looked, of a policy that corrects. more:
        `draft` of a request, for a policy that can continue from one."""
        self.verify(session)
        if session.instruction != observation.instruction:
            session.end_episode()
        session.instruction, before = "", session.found  # a prediction that fails ends the episode
        (chunk,), (session.state,), session.pending = self.policy.predict([observation], [session.state], **more)
        checked_chunk(chunk)
        if self.policy.decode == RSD_ASYNC and not session.corrections and not self._may_begin(session, chunk):
            (found,), (session.state,) = self.policy.verify_pending(session.pending)
            session.pending, chunk = None, self._corrected(session, found, first=before is None)
        session.instruction = observation.instruction
        return chunk, before

    def _may_begin(self, session: Session, draft: ActionChunk) -> bool:
        """Whether a draft may be executed to its end before the target has looked."""
        steps, last = draft.executed, session.found
        return last is not None and begun(steps, session.left.actions, float(last.executed[-1, 6])) == len(steps)

    def _corrected(self, session: Session, found: ActionChunk, first: bool = False) -> ActionChunk:
        """What to execute of a chunk that the target has looked at: the draft where it stood and does not begin an
        episode."""
        assert found.answer is not None
        decided = found if found.stats.stood and not first else checked_chunk(replace(found, actions=found.answer))
        session.found = replace(decided, answer=found.answer)
        session.left = Course.of(decided.actions[len(decided.executed) :], OWN)
        return session.found


def blank(size: int) -> dict[str, Any]:
    """An observation of nothing under openpi's keys, to warm up with."""
    view = np.zeros((size, size, 3), np.uint8)
    return {**dict.fromkeys(IMAGES, view), STATE: np.zeros(STATE_DIM), PROMPT: "pick up the black bowl"}


def in_words(error: BaseException, who: str = "policy") -> str:
    """What a client is told of an error."""
    if isinstance(error, RsdError):
        return f"rsd serve: {' '.join(str(error).split()):.{LONGEST_TEXT}}"
    return f"rsd serve: the {who} failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
