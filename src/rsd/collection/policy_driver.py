"""A policy drives part of an episode while the expert labels every state it visits (DAgger, Ross et al. 2011).

Noise shows a learner states near the expert's path; only the policy itself visits the states that its own errors lead
to. The expert is a feedback law over the visited state; what it remembers (its chosen grasp, whether it has told the
gripper to close) can lag behind a policy that opens or closes against it, until it notices the miss.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from rsd.conventions import CHUNK_SIZE, rotate_180
from rsd.expert.noise import ActionNoise
from rsd.sim.libero import LiberoEnv
from rsd.types import Observation, Policy


class PolicyDriver:
    """Stands where `ActionNoise` stands: turns the expert's clean action into the one executed.

    Chunk by chunk a coin of probability `share` decides whether the policy drives, from an image drawn at that moment,
    or the expert with its noise for as long; from step `handover` on it is the expert, so that an episode which the
    policy would fail is still finished, and kept. The environment needs cameras of the policy's image size.
    """

    def __init__(
        self,
        env: LiberoEnv,
        policy: Policy,
        instruction: str,
        share: float,
        handover: int,
        noise: ActionNoise | None,
        rng: np.random.Generator,
    ) -> None:
        self.env, self.policy, self.instruction = env, policy, instruction
        self.share, self.handover, self.noise, self.rng = share, handover, noise, rng
        self.steps = 0
        self._queue: deque[NDArray[np.float32] | None] = deque()
        self._turn = CHUNK_SIZE  # steps, until the policy's own are known
        policy.reset()

    def disturb(self, action: NDArray[np.float64], strength: float = 1.0) -> NDArray[np.float64]:
        """Clean action [7] -> executed action [7]; `strength` scales the noise, not the policy."""
        if not self._queue:
            policy_drives = self.rng.random() < self.share and self.steps < self.handover
            if not policy_drives:
                self.policy.reset()  # what it remembers is of before the expert's chunk
            self._queue.extend(self._predict() if policy_drives else [None] * self._turn)
        driven = self._queue.popleft()
        self.steps += 1
        if driven is not None:
            return driven.astype(np.float64)
        return action if self.noise is None else self.noise.disturb(action, strength)

    def _predict(self) -> NDArray[np.float32]:
        images = rotate_180(self.env.draw())
        state = self.env.proprio().astype(np.float32)
        actions = self.policy.predict(Observation(images, state, self.instruction)).executed
        self._turn = len(actions)
        return actions
