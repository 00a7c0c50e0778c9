"""Who drives, and until when; the environment and the policy are scripted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsd.collection.collect import CollectConfig, driving_policy, settings
from rsd.collection.policy_driver import PolicyDriver
from rsd.decoding.gate import SkipRule
from rsd.policy import RsdPolicy
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError


class ScriptedEnv:
    def __init__(self) -> None:
        self.drawn = 0

    def draw(self) -> np.ndarray:
        self.drawn += 1
        images = np.zeros((2, 32, 32, 3), np.uint8)
        images[:, 0, 0] = 255  # a corner that a rotation by 180 degrees takes to the other end
        return images

    def proprio(self) -> np.ndarray:
        return np.zeros(8, np.float32)


class ScriptedPolicy:
    image_size = 32

    def __init__(self, execute: int | None = None) -> None:
        self.execute = execute
        self.seen: list[Observation] = []
        self.resets = 0

    def reset(self, seed: int | None = None) -> None:
        self.resets += 1

    def predict(self, observation: Observation) -> ActionChunk:
        self.seen.append(observation)
        actions = np.full((8, 7), 0.5, np.float32)
        actions[:, 0] = np.arange(8) / 10
        return ActionChunk(actions, ChunkStats("scripted"), self.execute)


def executed(
    share: float, handover: int, steps: int, execute: int | None = None
) -> tuple[np.ndarray, ScriptedEnv, ScriptedPolicy]:
    env: Any = ScriptedEnv()
    policy = ScriptedPolicy(execute)
    driver = PolicyDriver(env, policy, "pick it up", share, handover, None, np.random.default_rng(0))
    clean = np.full(7, -1.0)
    return np.stack([driver.disturb(clean) for _ in range(steps)]), env, policy


def test_the_policy_drives_whole_chunks_until_the_handover() -> None:
    actions, env, policy = executed(share=1.0, handover=10, steps=24)
    assert np.allclose(actions[:16, 0], np.tile(np.arange(8) / 10, 2), atol=1e-6)  # a chunk begun is finished
    assert (actions[16:] == -1.0).all()
    assert env.drawn == len(policy.seen) == 2
    assert policy.seen[0].instruction == "pick it up"
    assert policy.seen[0].images[0, -1, -1].tolist() == [255, 255, 255]  # upright, as in training


def test_of_a_chunk_the_policy_drives_what_is_executed_and_the_expert_as_long() -> None:
    actions, _, policy = executed(share=1.0, handover=10, steps=24, execute=5)
    assert np.allclose(actions[:10, 0], np.tile(np.arange(5) / 10, 2), atol=1e-6)
    assert len(policy.seen) == 2
    assert policy.resets == 1 + 3  # at the start, and at each of the expert's turns of 5


@pytest.mark.parametrize(("share", "handover"), [(0.0, 100), (1.0, 0)])
def test_otherwise_the_expert_drives_and_nothing_is_drawn(share: float, handover: int) -> None:
    actions, env, policy = executed(share, handover, steps=16)
    assert (actions == -1.0).all()
    assert env.drawn == len(policy.seen) == 0


def test_a_share_between_mixes_chunks() -> None:
    actions, _, policy = executed(share=0.5, handover=10_000, steps=800)
    assert 30 < len(policy.seen) < 70
    assert ((actions[:, 1] == -1.0).sum() == 800 - 8 * len(policy.seen)).all()


def test_what_the_policy_remembers_ends_with_a_chunk_of_the_experts() -> None:
    assert executed(share=1.0, handover=100, steps=32)[2].resets == 1  # at the start
    _, _, policy = executed(share=0.5, handover=1000, steps=80)
    assert policy.resets == 1 + 10 - len(policy.seen)  # and at every chunk that it did not drive


def test_rsd_skip_drives_with_a_threshold_where_no_calibration_is(checkpoint: Path) -> None:
    driven = CollectConfig(Path("any"), policy=str(checkpoint), policy_decode="rsd-skip", states_only=True)
    with pytest.raises(RsdError, match=r"rsd-skip needs a skip_calibration\.json, found none"):
        driving_policy(driven)
    limits = {"policy_skip_threshold_mm": 80.0, "policy_max_skips": 3, "policy_memory_chunks": 9}
    own = replace(driven, **limits)
    unlimited = replace(driven, policy_decode="l1")
    policy = driving_policy(own)
    assert isinstance(policy, RsdPolicy)
    assert policy.core.ops.skip == SkipRule(threshold_mm=80.0, max_skips=3, memory_chunks=9)
    assert limits.items() <= settings(own).items()
    assert not limits.keys() & settings(unlimited).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_skip_threshold_mm": 80.0}, "expected --policy-skip-threshold-mm with --policy-decode rsd-skip"),
        ({"policy_decode": "rsd-skip", "policy_max_skips": 2}, "expected --policy-max-skips .*-skip-threshold-mm"),
    ],
)
def test_limits_without_what_they_limit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        CollectConfig(Path("any"), policy="any", **options)
