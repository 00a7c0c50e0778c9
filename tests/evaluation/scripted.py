"""A tiny simulator and a scripted policy behind the evaluation's backend, for tests without a simulator.

Task t from initial state k succeeds after 5 + 3 t + k steps; the step limit is 20. `EvalConfig.policy` names
the policy's behaviour: `good`, `draws`, or `dies:2.1` and the like for one task and initial state; `once:FILE:dies:2.1`
misbehaves only while FILE does not exist, and makes it; `until:FILE:...` does not make it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rsd.evaluation.backend import Backend
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.results import EpisodeResult
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

STEP_LIMIT = 20
TASKS = [(task, f"task_{task}", f"do thing {task}") for task in range(6)]


class CountingEnv:
    def __init__(self, suite: str, task_id: int, image_size: int) -> None:
        self.suite, self.task_id, self.image_size = suite, task_id, image_size
        self.instruction = TASKS[task_id][2]
        self.steps = self.needed = self.resets = 0
        self.executed: list[np.ndarray] = []
        self.drawing_s = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.steps, self.needed = 0, 5 + 3 * self.task_id + options["init_state"]
        self.resets += 1
        self.executed = []
        return None, {}

    def step_chunk(
        self, actions: np.ndarray, before_step: Callable[[], None] | None = None, draw: bool = True
    ) -> tuple[Any, float, bool, bool, dict]:
        steps = min(len(actions), self.needed - self.steps, STEP_LIMIT - self.steps)
        for _ in range(steps):
            if before_step is not None:
                before_step()
            self.step_once()
        self.steps += steps
        self.executed.extend(actions[:steps])
        terminated = self.steps >= self.needed
        return None, float(terminated), terminated, self.steps >= STEP_LIMIT, {"steps": steps}

    def step_once(self) -> None:
        pass

    def observation(self) -> Observation:
        images = np.full((2, self.image_size, self.image_size, 3), self.steps, dtype=np.uint8)
        state = np.array([self.task_id, self.needed, self.steps, 0, 0, 0, 0, 0], dtype=np.float32)
        return Observation(images, state, self.instruction)

    def redraw(self) -> None:
        pass

    def proprio(self) -> np.ndarray:
        return self.observation().state

    def failure_detail(self) -> str:
        return f"{self.needed - self.steps} steps short"

    def close(self) -> None:
        pass


class ScriptedPolicy:
    """Chunks of 4; drafts 3 levels of 10 tokens of which 10, 8, 5 are accepted, unless it decodes by `ar`.

    A policy that `draws` reports one number a chunk that hangs on the episode's seed.
    """

    image_size = 8

    def __init__(self, decode: str = "rsd", behaviour: str = "good") -> None:
        self.decode, self.behaviour, self.predictions = decode, behaviour, 0
        self.rng = np.random.default_rng(0)

    def reset(self, seed: int | None = None) -> None:
        self.rng = np.random.default_rng(seed)

    def predict(self, observation: Observation) -> ActionChunk:
        self.predictions += 1
        task_id, needed = int(observation.state[0]), int(observation.state[1])
        self.misbehave(task_id, needed - 5 - 3 * task_id)
        actions = np.full((4, 7), 0.25, dtype=np.float32)
        if self.behaviour == "nan":
            actions[1, 2] = np.nan
        latency = {"total": float(self.predictions), "prefill": 0.01}
        if self.decode == "ar":
            return ActionChunk(actions, ChunkStats("ar", prefills=1, target_passes=7, latency_ms=latency))
        stats = ChunkStats(
            self.decode,
            "margin",
            prefills=1,
            target_passes=1,
            num_draft_tokens=[10, 10, 10],
            num_accepted_tokens=[10, 8, 5],
            accepted_levels=int(observation.state[2]) // 4 % 4,
            expected_deviation_mm=self.rng.random() if self.behaviour == "draws" else None,
            latency_ms=latency,
        )
        return ActionChunk(actions, stats, answer=-actions if self.decode == "rsd-async" else None)

    def misbehave(self, task_id: int, init_state: int) -> None:
        behaviour, marker, once = self.behaviour, None, self.behaviour.startswith("once:")
        if behaviour.startswith(("once:", "until:")):
            _, file, behaviour = behaviour.split(":", 2)
            marker = Path(file)
        name, _, only = behaviour.partition(":")
        if name == "slow":
            time.sleep(0.02)
        if (only and only != f"{task_id}.{init_state}") or (marker is not None and marker.exists()):
            return
        if marker is not None and once:
            marker.touch()
        if name == "raises":
            raise RuntimeError("the policy broke")
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(1000)


def list_tasks(suite: str) -> list[tuple[int, str, str]]:
    return TASKS


def count_init_states(suite: str, task_id: int) -> int:
    return 10


def make_env(suite: str, task_id: int, image_size: int) -> CountingEnv:
    return CountingEnv(suite, task_id, image_size)


def make_policy(config: EvalConfig) -> ScriptedPolicy:
    if config.policy == "missing":
        raise RsdError("missing: expected a checkpoint directory, found nothing")
    return ScriptedPolicy(config.decode, config.policy)


def describe_policy(config: EvalConfig) -> dict[str, str]:
    return {"sha256": f"hash of {config.policy.partition(':')[0]}"}


def versions(device: str) -> dict[str, str]:
    return {"simulator": "scripted 1", "cpu": "any"}


def choose_decode(config: EvalConfig) -> Any:
    from rsd.options import Choice  # loads torch, which would take a worker longer than its episodes

    return Choice("rsd-fused", "as scripted")


class ScriptedBatchPolicy:
    """The scripted policy, one observation after another. A state counts its episode's predictions."""

    image_size = 8

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.policy = config, make_policy(config)

    def predict(
        self, observations: Sequence[Observation], states: Sequence[int | None]
    ) -> tuple[list[ActionChunk], list[int], None]:
        assert 0 < len(observations) <= self.config.batch
        chunks, after = [], [(state or 0) + 1 for state in states]
        for observation, count in zip(observations, after, strict=True):
            chunk = self.policy.predict(observation)
            chunks.append(replace(chunk, stats=replace(chunk.stats, expected_deviation_mm=float(count))))
        return chunks, after, None

    def verify_pending(self, pending: None) -> tuple[list[ActionChunk], list[int]]:
        raise AssertionError("nothing was left pending")


def make_batch_policy(config: EvalConfig) -> ScriptedBatchPolicy:
    return ScriptedBatchPolicy(config)


def prepare(suite: str, task_id: int) -> None:
    """Leaves a file a process, where a test says so."""
    if folder := os.environ.get("SCRIPTED_PREPARED"):
        (Path(folder) / f"{suite} {task_id} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}").touch()


def make_prepared_batch_policy(config: EvalConfig) -> ScriptedBatchPolicy:
    prepare("policy", 0)
    return ScriptedBatchPolicy(config)


def make_patient_batch_policy(config: EvalConfig) -> ScriptedBatchPolicy:
    """Loads until two simulators have prepared themselves."""
    until = time.monotonic() + 30
    while len(list(Path(os.environ["SCRIPTED_PREPARED"]).iterdir())) < 2:
        if time.monotonic() > until:
            raise RsdError("no simulator has prepared itself")
        time.sleep(0.02)
    return ScriptedBatchPolicy(config)


def nothing(config: EvalConfig) -> list[str]:
    """To check, or to be warned of."""
    return []


SCRIPTED = Backend(
    list_tasks,
    count_init_states,
    make_env,
    make_policy,
    describe_policy,
    versions,
    choose_decode,
    make_batch_policy,
    prepare,
    preflight=nothing,
    cautions=nothing,
)


def episode(task_id: int = 0, init_state: int = 0, **changes: Any) -> EpisodeResult:
    """A valid result of one drafted chunk, with changes."""
    values: dict[str, Any] = {
        "suite": "libero_spatial",
        "task_id": task_id,
        "task_name": f"task_{task_id}",
        "instruction": "do it",
        "init_state": init_state,
        "seed": 7,
        "decode": "rsd",
        "acceptance": "margin",
        "success": True,
        "steps": 8,
        "chunks": 1,
        "failure": "",
        "latency_ms": {"total": [10.0]},
        "num_drafts": 1,
        "num_draft_tokens": [10, 10, 10],
        "num_accepted_tokens": [10, 8, 5],
        "accepted_levels": [1],
        "prefills": 1,
        "target_passes": 1,
        "wall_s": 1.5,
    }
    return EpisodeResult(**{**values, **changes})
