"""Which decoders average two equally good grasps, and which commit to one: at the very moment of the choice.

    python -m studies.modes --policy runs/two_sided_late/checkpoint --out results/.../modes.json

The expert of `--grasp-mode two-sided-late` brings the hand over the bowl's middle, on random placements. There every
decoder says what it would do, and the expert shows both ways: the sideways motion of its next chunk to the left and to
the right. A chunk's place between them is -1 at one, +1 at the other and 0 in the middle, where a mean of both leads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsd.evaluation.results import write_atomically
from rsd.expert.goals import task_goals
from rsd.expert.pick_and_place import PickAndPlace
from rsd.expert.scene import Scene
from rsd.policy import RsdPolicy
from rsd.sim.libero import LiberoEnv
from rsd.types import Observation, RsdError
from rsd.versions import versions

FIRST_SEED = 2**31 + 2**20  # no demonstration draws such a placement, nor is the expert measured on it
SIDEWAYS = 1  # of an action: along the world's y, the closing axis of both grasps
COINS = 8  # tossed at most until both sides have come up
DECODERS = ("l1", "parallel", "ar", "rsd", "rsd-fused", "drafter-only")


@dataclass(frozen=True)
class ModesConfig:
    """Measure where chunks lie between two grasps."""

    policy: str
    """Checkpoint trained on demonstrations of --grasp-mode two-sided-late."""
    out: Path
    """JSON file for the result."""
    tasks: tuple[int, ...] = (2, 6, 8)
    """Tasks of libero_spatial."""
    num_placements: int = 20
    """Random placements per task."""


@dataclass(frozen=True)
class Choice:
    """What is seen a chunk before the choice and at it, and the sideways motion of the expert's next chunk each way."""

    before: Observation
    now: Observation
    left: float
    right: float


def choice_at(env: LiberoEnv, seed: int) -> Choice | None:
    """The moment of the choice on a placement; None where one side is not free, or the hand does not get there."""
    ways: list[float] = []
    seen: tuple[Observation, Observation] | None = None
    for coin in range(COINS):
        env.reset(options={"placement_seed": seed})
        scene = Scene(env)
        (goal,) = task_goals(env.suite, env.task.task_id)
        law = PickAndPlace(scene, goal, "two-sided-late", np.random.default_rng(coin))
        past = [env.observation()]
        for _ in range(env.max_steps):
            action = law.action()
            if law.attempts:
                break
            env.advance(action, draw=seen is None)
            past.append(env.observation())
        else:
            return None  # something stands in the way of the middle
        seen = seen or (past[max(0, len(past) - 9)], past[-1])
        sideways = 0.0
        for _ in range(8):
            sideways += float(action[SIDEWAYS])
            env.advance(action)
            action = law.action()
        ways.append(sideways)
        if max(ways) - min(ways) > 2.0:  # a side is four or so away from the middle
            return Choice(*seen, max(ways), min(ways))
    return None


def place_between(choice: Choice, actions: np.ndarray) -> float:
    """Where a chunk [8, 7] leads: -1 to the right, +1 to the left, 0 to the middle between them."""
    middle, half = (choice.left + choice.right) / 2, (choice.left - choice.right) / 2
    return float((actions[:, SIDEWAYS].sum() - middle) / half)


def measure_modes(config: ModesConfig) -> dict[str, Any]:
    """Runs the measurement and writes the result; returns it."""
    policies = {decode: RsdPolicy.from_pretrained(config.policy, decode=decode) for decode in DECODERS}
    places: dict[str, list[float]] = {decode: [] for decode in DECODERS}
    left_out = 0
    for task in config.tasks:
        env = LiberoEnv("libero_spatial", task, policies["l1"].image_size)
        try:
            for seed in range(FIRST_SEED, FIRST_SEED + config.num_placements):
                try:
                    choice = choice_at(env, seed)
                except RsdError:  # the expert refuses this placement
                    choice = None
                if choice is None:
                    left_out += 1
                    continue
                for decode, policy in policies.items():
                    policy.reset()
                    policy.predict(choice.before)  # what there is to remember
                    places[decode].append(round(place_between(choice, policy.predict(choice.now).actions), 4))
        finally:
            env.close()
    if not places["l1"]:
        raise RsdError(f"modes: found no choice between sides on any of {left_out} placements; raise --num-placements")
    settings = {**asdict(config), "out": str(config.out), "left_out": left_out}
    result = {"format": 1, "config": settings, "versions": versions(), "places": places}
    write_atomically(config.out, json.dumps(result, indent=1) + "\n")
    return result


def shares(places: list[float]) -> dict[str, float]:
    """Of chunks: that stay in the middle third, and that go at least two thirds of the way to a side."""
    far = np.abs(np.array(places))
    return {"averaged": float((far < 1 / 3).mean()), "committed": float((far >= 2 / 3).mean())}


def main(config: ModesConfig) -> None:
    for name, found in measure_modes(config)["places"].items():
        print(name, {key: round(value, 2) for key, value in shares(found).items()})


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("modes")
