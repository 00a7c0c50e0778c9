"""Rollouts of a target, any policy, as demonstrations: what it answered is the label of every chunk's observation.

`target`: it drives itself. `drafter`: its drafter drives most chunks and it labels (DAgger, Ross et al. 2011): only
there are the states that the drafter's errors lead to. `gate`: as `rsd-skip` would drive, for a calibration. On random
placements, none of the benchmark's states; each a function of (seed, driver, suite, task, index) and the policies.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Checked, ImageSize, Millimetres, Seed, Share, Some, told
from rsd.collection import workers
from rsd.collection.collect import CollectConfig, EpisodeRecorder, libero_attributes
from rsd.conventions import rotate_180, shrunk
from rsd.data.schema import FILE_SUFFIX, Episode, merge, stored_names
from rsd.decoding.calibration import fingertip_deviation
from rsd.decoding.state import EpisodeState
from rsd.json_files import read_object, write_atomically
from rsd.locks import exclusive
from rsd.output import Faults
from rsd.sim.libero import LiberoEnv, simulator_versions
from rsd.sim.suites import suite_task
from rsd.targets.black_box import Drafter, load_drafter
from rsd.tokenizer.config import Horizon
from rsd.types import ActionChunk, Observation, Policy, RsdError

ASKED_TWICE = 4  # every so many chunks a target that drives itself is asked again: how far is it from itself?
MAX_EQUAL_FAULTS = 8  # episodes in a row that end alike: a target that is gone
BATCH = 2  # episodes a worker makes of one task before the next
Driver = Literal["target", "drafter", "gate"]
MakeTarget = Callable[[], Policy]


@dataclass(frozen=True)
class RolloutConfig(Checked):
    """target: what names it. horizon: actions of its answers that are executed and learnt, 0: all of them. drafter:
    its directory, sha256: of its manifest. share: with `drafter`, of the chunks that it drives. threshold_mm: with
    `gate`."""

    out: Path
    suite: str
    tasks: tuple[int, ...]
    episodes: Some
    driver: Driver
    target: dict[str, Any]
    image_size: ImageSize
    horizon: Horizon | Literal[0] = 0
    drafter: Path | None = None
    drafter_sha256: str = ""
    share: Share = 0.8
    threshold_mm: Millimetres = 0.0
    seed: Seed = 0
    num_workers: workers.Workers = 2

    @property
    def settings(self) -> dict[str, Any]:
        """What an episode depends on."""
        unused = {"out", "tasks", "episodes", "num_workers", "drafter"}
        made = {name: value for name, value in asdict(self).items() if name not in unused}
        return dict(json.loads(json.dumps(made, default=str)))


@dataclass(frozen=True)
class Look:
    """One chunk with a draft: how far it expected to deviate, how far it does (mm), whether the gripper differs,
    whether the target was asked whatever was drafted, whether the draft stood, and whether it drove."""

    expected_mm: float
    deviation_mm: float
    gripper_differs: bool
    forced: bool
    stood: bool
    drove: bool


def roll_out(config: RolloutConfig, make_target: MakeTarget) -> dict[str, int]:
    """Rollouts until every task has its episodes -> how many, by task name. A folder of other ones is an error."""
    names = {task: suite_task(config.suite, task).name for task in config.tasks}
    with exclusive(config.out):
        check_settings(config)
        faults = Faults(f"finished episodes are kept in {config.out}; the same command goes on", MAX_EQUAL_FAULTS)
        have = workers.finished_by_task(config.out, names, faults)
        batches = workers.batched(config.episodes, have, BATCH)
        make, merge_of = functools.partial(batch_of, config, make_target), functools.partial(merged, config)
        what = f"rollouts, driven by {config.driver}"
        counts = workers.make_all(what, names, have, batches, make, merge_of, faults, config.num_workers)
    faults.raise_any(f"of {config.episodes * len(have)} rollouts or their files", sum(counts.values()))
    return counts


@functools.lru_cache(maxsize=1)
def worker_target(make_target: MakeTarget, drafter: Path | None) -> tuple[Policy, Drafter | None]:
    """Of this worker process, loaded once; one thread, as there is a worker per core."""
    import torch  # start-up time: the parent needs none

    torch.set_num_threads(1)
    return make_target(), load_drafter(drafter) if drafter is not None else None


def batch_of(config: RolloutConfig, make_target: MakeTarget, task: int, indices: list[int]) -> workers.Made:
    target, drafter = worker_target(make_target, config.drafter)
    env = workers.worker_environment(config.suite, task, target.image_size, cameras=True)
    folder = config.out / workers.PARTS / env.task.name
    return workers.make_parts(folder, indices, lambda index: Rollout(env, target, drafter, config).episode(index))


def labels_every(steps: int) -> int:
    """Where a target drives itself by chunks of `steps` actions: an image, and so a label, every so many."""
    return steps // 2 if steps % 2 == 0 else steps


class Rollout:
    """One episode of a worker's target and environment; it is made of chunks."""

    def __init__(self, env: LiberoEnv, target: Policy, drafter: Drafter | None, config: RolloutConfig) -> None:
        self.env, self.target, self.drafter, self.config = env, target, drafter, config
        self.recorder, self.images = EpisodeRecorder(images=False), list[NDArray[np.uint8]]()
        self.looks, self.apart = list[Look](), list[tuple[float, bool]]()
        self.state, self.answers = EpisodeState(), 0

    def episode(self, index: int) -> Episode:
        config, env = self.config, self.env
        rng = np.random.default_rng([config.seed, zlib.crc32(config.driver.encode()), env.task.task_id, index])
        placement = int(rng.integers(2**31))
        env.reset(options={"placement_seed": placement})
        body_pos, body_quat = env.fixture_poses()
        self.target.reset(placement)
        done = success = False
        every = steps = 0
        while not done:
            label, driven = self.chunk(rng)
            alone, steps = config.driver == "target", len(label)
            every = every or (labels_every(steps) if alone else steps)
            terminated, done = self.execute(label, driven, every)
            success = success or terminated
        attributes = {
            "placement_seed": placement,
            "language_instruction": env.instruction,
            "image_every": every,
            "horizon": steps,
            "driver": config.driver,
            "success": success,
            "looks": json.dumps([asdict(look) for look in self.looks]),
            "self_deviation": json.dumps(self.apart),
        }
        arrays = self.recorder.arrays()
        return Episode(
            index=index,
            success_step=len(arrays["actions"]) - 1,
            attributes=attributes,
            body_pos=body_pos,
            body_quat=body_quat,
            images=np.stack(self.images),
            **arrays,
        )

    def chunk(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The target's actions [H, 7] for the present observation, and those that are executed."""
        config, drafter, seen = self.config, self.drafter, self.env.observation()
        self.images.append(rotate_180(shrunk(seen.images, config.image_size)))
        label = self.labelled(self.asked(seen))
        if drafter is None:
            self.answers += 1
            if self.answers % ASKED_TWICE == 1:
                again = self.labelled(self.asked(seen))
                differs = bool((again[:, -1] != label[:, -1]).any())
                self.apart.append((float(fingertip_deviation(again, label)), differs))
            return label, label
        skip = drafter.skip_rule(config.threshold_mm)
        proposal = drafter.propose(seen, self.state, skip)
        drove = proposal.trusted if config.driver == "gate" else bool(rng.random() < config.share)
        found = drafter.judged(proposal, label)
        known = float(found.deviation_mm or 0.0), bool(found.gripper_differs), proposal.forced, bool(found.stood)
        self.looks.append(Look(proposal.expected_mm, *known, drove))
        executed = proposal.actions if drove else label
        self.state = drafter.after(self.state, executed, None if drove else found.stood)
        return label, executed

    def asked(self, seen: Observation) -> ActionChunk:
        """The target's answer; whatever a policy of one's own raises costs this episode, as in an evaluation."""
        try:
            return self.target.predict(seen)
        except RsdError:
            raise
        except (Exception, SystemExit) as error:
            raise RsdError(f"the target's predict: {type(error).__name__}: {told(error)}") from error

    def labelled(self, chunk: ActionChunk) -> NDArray[np.float32]:
        """The actions that are executed, with the gripper as its controller takes it: the sign alone."""
        horizon = self.config.horizon or len(chunk.executed)
        if len(chunk.actions) < horizon:
            raise RsdError(f"rollouts: expected {horizon} actions of the target, found {len(chunk.actions)}")
        label = np.array(chunk.actions[:horizon], dtype=np.float32)
        label[:, -1] = np.where(label[:, -1] > 0, 1.0, -1.0)
        return label

    def execute(self, label: NDArray[np.float32], driven: NDArray[np.float32], every: int) -> tuple[bool, bool]:
        """-> whether it succeeded, whether the episode is over. Frames between chunks are drawn too where the target
        drives: what it did from there on is known."""
        step = 0

        def record() -> None:
            nonlocal step
            if step and step % every == 0:
                self.images.append(rotate_180(shrunk(rotate_180(self.env.draw()), self.config.image_size)))
            self.recorder.record(self.env, driven[step].astype(np.float64), label[step].astype(np.float64))
            step += 1

        _, _, terminated, truncated, _ = self.env.step_chunk(driven, record)
        return terminated, terminated or truncated


def merged(config: RolloutConfig, task: int) -> int:
    name = suite_task(config.suite, task).name
    path, parts = config.out / f"{name}{FILE_SUFFIX}", workers.part_files(config.out / workers.PARTS / name)
    if not parts:
        return len(stored_names(path))
    alike = CollectConfig(config.out, suite=config.suite, image_size=config.image_size)
    provenance = {
        "versions": simulator_versions(),
        "settings": config.settings,
        "rendering": {"image_size": config.image_size},
        "recorded_by": f"a target's rollouts, driven by {config.driver}, on random placements",
    }
    return merge(path, parts, libero_attributes(alike, task), provenance)


def check_settings(config: RolloutConfig) -> None:
    """`RsdError` for a folder of rollouts made otherwise; the first one writes down how."""
    path = config.out / workers.PARTS / "settings.json"
    wanted = config.settings
    if path.exists() and (found := read_object(path, "a folder of rollouts")) != wanted:
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        other = ", ".join(f"{name} {found.get(name)!s:.60} there, {wanted[name]!s:.60} here" for name in changed)
        raise RsdError(f"{config.out}: rollouts made otherwise ({other}); choose another --output")
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")
