"""`python -m studies.continuing`: what of a wrong draft a target inherits that continues from it, by the steps left.

A target by diffusion or flow matching is given drafts of another instruction for the same scene and moment, noised to
the time at which some of its denoising steps are left. *Draft pull* is |continued - own| / |draft - own|, of mean
absolute normalised motion, where own is the target's own chunk, from the same seed of its noise: 1 with no step left,
0 where the draft decides nothing. Beside it the target's *own spread*, |own - own| of two seeds, in the same unit: a
target that has several ways at once differs from itself, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from rsd import output
from rsd.data.demonstrations import load_demonstrations
from rsd.decoding.state import EpisodeState
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.tables import print_table
from rsd.targets.black_box import Drafter, load_drafter
from rsd.targets.custom import CustomPolicy
from rsd.types import LEROBOT, ActionChunk, Continues, Observation, RsdError
from rsd.versions import versions
from studies.config import ContinuingConfig
from studies.substitution import INSTRUCTION, OWN, spread_frames

FORMAT = 1
MARK = b'"own_spread": '  # in every record of a measurement


@dataclass(frozen=True)
class Pull:
    """Over all frames and seeds; apart: mean |draft - own|, moved: mean |continued - own|, own_spread: mean |own - own|
    of two seeds, each of normalised motion."""

    steps: int
    pairs: int
    apart: float
    moved: float
    own_spread: float

    @property
    def draft_pull(self) -> float:
        return self.moved / self.apart if self.apart else 0.0


@dataclass(frozen=True)
class ContinuingRecord:
    """in_full: denoising steps of the target's own chunk."""

    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    frames: int
    in_full: int
    pulls: list[Pull]


class Hosted:
    """A LeRobot policy in this process, whose noise comes from torch's own generator."""

    def __init__(self, name: str, device: str, horizon: int) -> None:
        hosted = import_module("lerobot_policy_rsd.hosted")  # of LeRobot's environment
        self.policy = hosted.HostedPolicy(name, device, horizon)
        self.image_size, self.num_inference_steps = self.policy.image_size, self.policy.num_inference_steps

    def reset(self, seed: int | None = None) -> None:
        torch.manual_seed(seed or 0)

    def predict(self, observation: Observation) -> ActionChunk:
        return cast(ActionChunk, self.policy.predict([observation], [None])[0][0])

    def continue_from(self, observation: Observation, draft: NDArray[np.float32], steps: int) -> ActionChunk:
        return cast(ActionChunk, self.policy.predict([observation], [None], (draft, steps))[0][0])


def measure_continuing(config: ContinuingConfig) -> ContinuingRecord:
    """Run the measurement, print the table, write the JSON."""
    output.refuse_to_replace(config.output, config.overwrite, MARK)
    drafter = load_drafter(config.drafter, config.device)
    target = loaded(config, drafter)
    demonstrations = [
        each for folder in config.data for each in load_demonstrations(folder, max_per_task=config.max_per_task)
    ]
    frames = [frame for frame in spread_frames(demonstrations, config.frames, 0) if INSTRUCTION in frame]
    if not frames:
        raise RsdError(f"--data: expected scenes in which several things can be asked for, found none in {config.data}")
    pairs = [(frame[OWN].now, drafted(drafter, frame[INSTRUCTION].now)) for frame in frames]
    steps = config.steps or doubled(target.num_inference_steps)
    seeds = range(config.seed, config.seed + config.seeds)
    pulls = pull_by_steps(target, drafter, output.shown(pairs, "frames", len(pairs)), steps, seeds)
    settings = {**asdict(config), "data": [str(path) for path in config.data]}
    settings |= {"output": str(config.output), "drafter": str(config.drafter)}
    record = ContinuingRecord(FORMAT, settings, versions(), len(frames), target.num_inference_steps, pulls)
    write_atomically(config.output, encode_record(record) + "\n")
    print_pulls(Console(), record)
    return record


def loaded(config: ContinuingConfig, drafter: Drafter) -> Continues:
    """`RsdError` for a policy that cannot continue from a draft, or not from so few or many steps."""
    if config.policy.startswith(LEROBOT):
        target: Any = Hosted(config.policy.removeprefix(LEROBOT), config.device, drafter.horizon)
    else:
        target = CustomPolicy(config.policy, config.device, drafter.horizon)
    if not (most := target.num_inference_steps):
        raise RsdError(f"--policy {config.policy}: expected one that continues from a draft (docs/your_policy.md)")
    if beyond := [steps for steps in config.steps if steps > most]:
        raise RsdError(f"--steps {beyond[0]}: expected at most {most}, all that {config.policy} takes")
    return cast(Continues, target)


def doubled(most: int) -> list[int]:
    """1, 2, 4 and so on, and all steps."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def drafted(drafter: Drafter, observation: Observation) -> NDArray[np.float32]:
    """[H, 7]."""
    return drafter.propose(observation, EpisodeState(), drafter.skip_rule()).actions


def pull_by_steps(
    target: Continues,
    drafter: Drafter,
    pairs: Iterable[tuple[Observation, NDArray[np.float32]]],
    steps: Sequence[int],
    seeds: Sequence[int],
) -> list[Pull]:
    """pairs: what the target sees, and a draft [H, 7] that was made for something else."""
    apart, spread, moved = list[float](), list[float](), {left: list[float]() for left in steps}

    def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
        here, there = (normalised(drafter, chunk) for chunk in (one, other))
        return float((here - there).abs().mean())

    for seen, draft in pairs:
        own = [from_seed(target, seed, seen) for seed in seeds]
        spread += [distance(one, other) for one, other in pairwise(own)]
        for seed, chunk in zip(seeds, own, strict=True):
            apart.append(distance(draft, chunk))
            for left in steps:
                moved[left].append(distance(from_seed(target, seed, seen, draft, left), chunk))
    means = float(np.mean(apart)), float(np.mean(spread))
    return [Pull(left, len(apart), means[0], float(np.mean(found)), means[1]) for left, found in moved.items()]


def normalised(drafter: Drafter, chunk: NDArray[np.float32]) -> torch.Tensor:
    """chunk [n >= H, 7] -> motion [H, 6]."""
    return drafter.tokenizer.normalise(torch.from_numpy(drafter.cut(chunk)[None]).to(drafter.device))[0]


def from_seed(
    target: Continues, seed: int, seen: Observation, draft: NDArray[np.float32] | None = None, left: int = 0
) -> NDArray[np.float32]:
    """The target's own chunk [n, 7], or the one continued from a draft."""
    target.reset(seed)
    return (target.predict(seen) if draft is None else target.continue_from(seen, draft, left)).actions


def print_pulls(console: Console, record: ContinuingRecord) -> None:
    rows = [
        [f"{pull.steps} of {record.in_full}", f"{pull.draft_pull:.3f}", f"{pull.moved:.3f}"] for pull in record.pulls
    ]
    first = record.pulls[0]
    found = f"|draft - own| {first.apart:.3f}, own spread {first.own_spread:.3f}"
    title = f"draft pull, {record.frames} frames, {first.pairs} pairs; {found}"
    print_table(console, title, ["steps left", "draft pull", "|continued - own|"], rows)


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("continuing")
