"""Collecting demonstrations with the scripted expert: in worker processes, resumable, each one reproducible.

Every demonstration is a function of (seed, suite, task, index) alone. A worker writes a finished one as a part file of
its own, atomically; the parent merges parts into the file of the task. So nothing is ever half-written, workers never
share a file, and a killed run continues where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from rsd.checks import Checked, ImageSize, Millimetres, Rules, Seed, Share, between
from rsd.collection import workers
from rsd.collection.policy_driver import PolicyDriver
from rsd.data.schema import FILE_SUFFIX, DamagedFile, Episode, merge, open_data, read_provenance, reading, stored_names
from rsd.expert import expert
from rsd.expert.goals import solvable_tasks, task_goals
from rsd.expert.grasps import GraspMode
from rsd.expert.noise import ActionNoise, Disturbance, NoiseConfig
from rsd.json_files import read_object, write_atomically
from rsd.locks import exclusive
from rsd.output import Faults, plural
from rsd.sim import permuted
from rsd.sim.libero import SIM_CAMERAS, LiberoEnv, simulator_versions
from rsd.sim.motion import Motion, check_task
from rsd.sim.physics import mujoco
from rsd.sim.rendering import check_gl
from rsd.sim.suites import MAIN_SUITES, bddl_file, suite_task, suite_tasks
from rsd.types import (
    CAMERAS,
    MAX_SKIPS,
    MEMORY_CHUNKS,
    RSD_ASYNC,
    SPEED,
    Chunks,
    Moving,
    Policy,
    RsdError,
    Speed,
    Steps,
    speed_rule,
)

SUITES = (*MAIN_SUITES, *permuted.SUITES)  # the expert is measured
BATCH = 5  # demonstrations a worker makes of one task before the next: balanced, few environments built
MAX_TRIES = 30
HANDOVER = (24, 121)  # steps, the latest per goal; 100 of each are left to the expert, who needs 60 to 110 of them


@dataclass(frozen=True)
class CollectConfig(Checked):
    """What to collect. Everything but num_demos, num_workers and tasks must stay the same when a run is resumed."""

    out: Path
    """Folder for `<task>_demo.hdf5`."""
    suite: str = "libero_spatial"
    """libero_spatial, libero_object, libero_goal, each also with _permuted behind, libero_10 or libero_90."""
    tasks: tuple[int, ...] = ()
    """Task ids; empty = all that the expert can do (docs/expert.md names the others)."""
    num_demos: Annotated[int, between(1, 1e6)] = 50
    """Successful demonstrations per task. Raise it later and run again to add more."""
    seed: Seed = 0
    """Seed of everything."""
    num_workers: workers.Workers = 2
    """Processes."""
    states_only: bool = False
    """Record no images (fast; only a driving policy needs a renderer then); `rsd demos render` adds them later."""
    image_size: ImageSize = 256
    """Side of the recorded images in pixels."""
    grasp_mode: GraspMode = "canonical"
    """"canonical": one predictable grasp; "two-sided": a coin decides between two equally good ones; "two-sided-late":
    it falls over the object's middle, so that nothing before tells the side."""
    clean_fraction: Share = 0.15
    """Share of demonstrations without any noise; the others draw their level between 0 and noise.max_level."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Disturbance of the executed actions; labels stay clean."""
    motion: Moving = "none"
    """What moves, as `--motion` of `rsd eval`; what is drawn of it comes from --seed, task and placement. The expert is
    ahead of what slides. Tasks whose thing or destination is fixed to the scene are left out."""
    motion_speed: Speed = SPEED
    """Metres a second of what slides."""
    policy: str = ""
    """Checkpoint directory or hub id: this policy drives part of each episode and the expert labels every state
    (DAgger). Recorded images must have the policy's size."""
    policy_decode: str = "rsd-fused"
    """With `policy`: how it decodes; the states that `rsd-skip` leads into are its own."""
    policy_skip_threshold_mm: Millimetres | None = None
    """With `--policy-decode rsd-skip`: as `--skip-threshold-mm` of `rsd eval`; without it: its calibration."""
    policy_max_skips: Chunks = MAX_SKIPS
    """With `--policy-skip-threshold-mm`: as `--max-skips` of `rsd eval`."""
    policy_memory_chunks: Chunks = MEMORY_CHUNKS
    """With `--policy-skip-threshold-mm`: as `--memory-chunks` of `rsd eval`."""
    execute: Steps | None = None
    """With `policy`: steps of its chunks that are executed; by default what its checkpoint says."""
    policy_share: Share = 0.8
    """With `policy`: mean share of the chunks it drives before the expert takes over for good; each episode draws its
    own share around it and the step of the handover."""

    def rules(self) -> Rules:
        yield len({*self.tasks}) == len(self.tasks), "--tasks to name each once", " ".join(map(str, self.tasks))
        drawn = not self.states_only or self.image_size == CollectConfig.image_size
        yield drawn, "--image-size without --states-only, which draws nothing", self.image_size
        default = CollectConfig.policy_decode, CollectConfig.policy_share, None
        alone = self.policy or (self.policy_decode, self.policy_share, self.execute) == default
        yield alone, "--policy with --policy-decode, --policy-share and --execute", "none"
        corrected = f"--policy-decode other than {RSD_ASYNC}, whose drafts are not corrected here"
        yield self.policy_decode != RSD_ASYNC, corrected, self.policy_decode
        gated = self.policy_decode == "rsd-skip" or self.policy_skip_threshold_mm is None
        yield gated, "--policy-skip-threshold-mm with --policy-decode rsd-skip", self.policy_decode
        limits = self.policy_max_skips, self.policy_memory_chunks
        limited = self.policy_skip_threshold_mm is not None or limits == (MAX_SKIPS, MEMORY_CHUNKS)
        yield limited, "--policy-max-skips and --policy-memory-chunks with --policy-skip-threshold-mm", "none"
        yield speed_rule(self.motion, self.motion_speed)

    def skip_rule(self) -> tuple[float, int, int] | None:
        """When a driving `rsd-skip` leaves its target out, as `SkipRule` has it; None: as its calibration says."""
        threshold = self.policy_skip_threshold_mm
        return None if threshold is None else (threshold, self.policy_max_skips, self.policy_memory_chunks)


class EpisodeRecorder:
    """Collects what one episode stores, step by step."""

    def __init__(self, images: bool) -> None:
        self.images = images
        self.rows: dict[str, list[NDArray[Any]]] = {}

    def record(self, env: LiberoEnv, executed: NDArray[np.float64], clean: NDArray[np.float64]) -> None:
        """Stores the present state and observation of `env` with the action about to be executed."""
        latest = env.latest()
        state = env.proprio()
        row = {
            "actions": executed,
            "expert_actions": clean,
            "states": env.sim_state(),
            "eef_pos": latest["robot0_eef_pos"],
            "eef_quat": latest["robot0_eef_quat"],
            "eef_axis_angle": state[3:6],
            "gripper": latest["robot0_gripper_qpos"],
            "joints": latest["robot0_joint_pos"],
        }
        if self.images:
            row["images"] = np.stack([latest[f"{SIM_CAMERAS[name]}_image"] for name in CAMERAS])
        for key, value in row.items():
            self.rows.setdefault(key, []).append(np.array(value))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name -> array [T, ...]."""
        return {key: np.stack(values) for key, values in self.rows.items()}


def make_demonstration(env: LiberoEnv, config: CollectConfig, index: int, policy: Policy | None = None) -> Episode:
    """The successful demonstration `index` of env's task: the first placement (by sub-seed) that the expert solves.

    A placement that the expert refuses (a grasp that it does not know) costs that placement only. Raises RsdError if
    MAX_TRIES placements in a row fail.
    """
    refused = ""
    for failed in range(MAX_TRIES):
        rng = np.random.default_rng([config.seed, env.task.task_id, index, failed])
        try:
            episode = _try_placement(env, config, rng, policy)
        except (RsdError, mujoco.FatalError) as error:
            refused = f"; of the last that it refused it says: {error}"
            continue
        if episode is not None:
            attributes = {**episode.attributes, "failed_tries": failed}
            return dataclasses.replace(episode, index=index, attributes=attributes)
    found = f"the expert failed on {MAX_TRIES} placements in a row{refused}"
    raise RsdError(f"{env.task.name}, demonstration {index}: {found}")


def _try_placement(
    env: LiberoEnv, config: CollectConfig, rng: np.random.Generator, policy: Policy | None
) -> Episode | None:
    """The demonstration of one placement, drawn from rng; None where there is nothing to do, or the expert fails."""
    placement_seed = int(rng.integers(2**31))
    level = 0.0 if rng.random() < config.clean_fraction else float(rng.random())
    env.motion = None if config.motion == "none" else Motion(config.motion, config.motion_speed, config.seed)
    _, info = env.reset(options={"placement_seed": placement_seed})
    goals = expert.asked_goals(env)
    if all(env.holds(*goal.words) for goal in goals):
        return None
    body_pos, body_quat = env.fixture_poses()
    recorder = EpisodeRecorder(images=not config.states_only)
    drift = ActionNoise(config.noise, level, rng) if level > 0 else None
    disturbance: Disturbance | None = drift
    if policy is not None:
        spread = min(config.policy_share, 1 - config.policy_share)
        share = float(rng.uniform(config.policy_share - spread, config.policy_share + spread))
        to_do = sum(not env.holds(*goal.words) for goal in goals)
        handover = int(rng.integers(HANDOVER[0], HANDOVER[1] * to_do))
        disturbance = PolicyDriver(env, policy, env.instruction, share, handover, drift, rng)
    mode, draw = config.grasp_mode, not config.states_only
    result = expert.run(env, goals, recorder.record, rng, disturbance, mode, draw=draw)
    if not result.success:
        return None
    attributes = {
        "placement_seed": placement_seed,
        "placement_rejections": info["placement_rejections"],
        "language_instruction": env.instruction,
        "target_object": ",".join(goal.target for goal in goals),
        "asks": json.dumps(env.asks),
        "noise_level": level * config.noise.max_level,
        "attempts": result.attempts,
        "motion": config.motion,
        "success": True,
    }
    return Episode(
        index=0,
        success_step=result.steps - 1,
        attributes=attributes,
        body_pos=body_pos,
        body_quat=body_quat,
        **recorder.arrays(),
    )


def collect(config: CollectConfig) -> dict[str, int]:
    """Collects until every task has num_demos demonstrations; returns the number per task name.

    Raises RsdError if the folder holds demonstrations made with other settings, or if another run is writing to it;
    and, after everything else is done, if some demonstrations could not be made.
    """
    if config.suite not in SUITES:
        raise RsdError(f"collect: the expert solves {', '.join(SUITES)}, found the suite {config.suite!r}")
    workers.check_place(config.out)
    if config.policy or not config.states_only:
        check_gl()
    if config.policy:
        _check_policy(config)
    tasks = chosen_tasks(config)
    names = {task: suite_task(config.suite, task).name for task in tasks}
    with exclusive(config.out):
        faults = Faults(f"finished demonstrations are kept in {config.out}; the same command tries the others again")
        have = _made_alike(config, names, faults)
        batches = workers.batched(config.num_demos, have, BATCH)
        total, left = config.num_demos * len(have), sum(len(indices) for _, indices in batches)
        print(f"{config.suite}: {left} of {total} demonstrations to collect, starting workers", file=sys.stderr)
        make, merged = functools.partial(_collect_batch, config), functools.partial(_merge, config)
        counts = workers.make_all("demonstrations", names, have, batches, make, merged, faults, config.num_workers)
    following = f"demos render --source {config.out}" if config.states_only else f"tokenizer fit --data {config.out}"
    if made := sum(counts.values()):
        print(f"{plural(made, 'demonstration')} in {config.out}; next: rsd {following}", file=sys.stderr)
    faults.raise_any(f"of {total} demonstrations or their files", made)
    return counts


def chosen_tasks(config: CollectConfig) -> list[int]:
    """Those asked for, each of which the expert can do and something moves in; by default all such."""
    tasks, reason = [], "the expert cannot do them" + (", or nothing moves in them" if config.motion != "none" else "")
    for task in config.tasks or solvable_tasks(config.suite):
        task_goals(config.suite, task)
        try:
            if config.motion != "none":
                check_task(config.motion, config.suite, task)
        except RsdError:
            if config.tasks:
                raise
            continue
        tasks.append(task)
    left_out = [task.language for task in suite_tasks(config.suite) if task.task_id not in tasks]
    if left_out and not config.tasks:
        print(f"{config.suite}: left out, {reason}: {', '.join(left_out)}", file=sys.stderr)
    return tasks


@functools.lru_cache(maxsize=1)
def driving_policy(config: CollectConfig) -> Policy:
    """The policy of this process, loaded once; one thread, as there is a worker per core."""
    # start-up time: most collections need neither
    import torch

    from rsd.decoding.gate import SkipRule
    from rsd.policy import RsdPolicy

    torch.set_num_threads(1)
    skip = None if (given := config.skip_rule()) is None else SkipRule(*given)
    return RsdPolicy.from_pretrained(config.policy, decode=config.policy_decode, execute=config.execute, skip=skip)


def _collect_batch(config: CollectConfig, task_id: int, indices: list[int]) -> workers.Made:
    policy = driving_policy(config) if config.policy else None
    size = policy.image_size if policy is not None else config.image_size
    env = workers.worker_environment(config.suite, task_id, size, cameras=policy is not None or not config.states_only)
    folder = config.out / workers.PARTS / env.task.name
    return workers.make_parts(folder, indices, lambda index: make_demonstration(env, config, index, policy))


def _merge(config: CollectConfig, task_id: int) -> int:
    name = suite_task(config.suite, task_id).name
    path, parts = config.out / f"{name}{FILE_SUFFIX}", workers.part_files(config.out / workers.PARTS / name)
    if not parts:
        return len(stored_names(path))
    provenance = {
        "versions": simulator_versions(),
        "settings": settings(config),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return merge(path, parts, libero_attributes(config, task_id), provenance)


def settings(config: CollectConfig) -> dict[str, Any]:
    """What a demonstration depends on, as JSON values."""
    unused = {"out", "tasks", "num_demos", "num_workers"} | ({"image_size"} if config.states_only else set())
    everything = {key: value for key, value in dataclasses.asdict(config).items() if key not in unused}
    if config.policy:  # its path may come to hold another one
        # start-up time: most collections need no torch
        from rsd.checkpoint import checkpoint_hash, gate_of, locate_checkpoint

        everything["policy_sha256"] = checkpoint_hash(config.policy)
        if config.policy_decode == "rsd-skip" and config.skip_rule() is None:
            everything |= gate_of(locate_checkpoint(config.policy))
    return _that_matter(json.loads(json.dumps(everything)))


def _that_matter(everything: dict[str, Any]) -> dict[str, Any]:
    """Without a policy, how much it would have driven does not matter; before it could be asked, nor did `execute`."""
    unused = set() if everything.get("policy") else {"policy", "policy_decode", "policy_share"}
    if everything.get("policy_skip_threshold_mm") is None:
        unused |= {"policy_skip_threshold_mm", "policy_max_skips", "policy_memory_chunks"}
    if everything.get("motion", "none") not in ("thing", "destination"):
        unused |= {"motion_speed"} | ({"motion"} if everything.get("motion") == "none" else set())
    return {k: v for k, v in everything.items() if k not in unused and (k, v) != ("execute", None)}


def _check_policy(config: CollectConfig) -> None:
    size = driving_policy(config).image_size
    if not config.states_only and config.image_size != size:
        raise RsdError(f"collect: the policy {config.policy} needs images of {size} px, found {config.image_size} px")
    if config.policy_decode == "rsd-skip":
        # start-up time: most collections need no torch
        from rsd.checkpoint import gate_memory, gate_of, locate_checkpoint, long_memory, read_content

        directory = locate_checkpoint(config.policy)
        calibrated = config.policy_skip_threshold_mm is None
        asked = gate_memory(gate_of(directory)) if calibrated else config.policy_memory_chunks
        for caution in long_memory(read_content(directory), asked):
            print(f"warning: {config.policy}: {caution}", file=sys.stderr)


def _made_alike(config: CollectConfig, names: Mapping[int, str], faults: Faults) -> dict[int, set[int]]:
    """What the folder has of each task whose file can be read. Raises RsdError where it was made with other settings;
    else it now says with which."""
    wanted, stored = settings(config), config.out / workers.PARTS / "settings.json"

    def compare(path: Path, made_by: dict[str, Any]) -> None:
        if (other := _that_matter(made_by)) != wanted:
            different = sorted(key for key in wanted.keys() | other.keys() if wanted.get(key) != other.get(key))
            found = ", ".join(f"{key} = {other.get(key)!r}, found {wanted.get(key)!r}" for key in different)
            remedy = "Use the same settings to resume, or another folder."
            raise workers.OtherSettings(f"collect: {path} was made with other settings; expected {found}. {remedy}")

    def check(path: Path) -> None:
        if path.exists():
            with open_data(path) as data:
                provenance = read_provenance(data)
            with reading(f"demonstrations {path}, rsd_provenance"):
                made_by = {} if provenance is None else dict(provenance["settings"])
            compare(path, made_by)

    if stored.exists():
        compare(stored, read_object(stored, "a folder of parts"))
    own = {f"{name}{FILE_SUFFIX}" for name in names.values()}
    for other in (path for path in sorted(config.out.glob(f"*{FILE_SUFFIX}")) if path.name not in own):
        with contextlib.suppress(DamagedFile):  # it costs itself only
            check(other)
    have = workers.finished_by_task(config.out, names, faults, check)
    write_atomically(stored, json.dumps(wanted, indent=1))
    return have


def libero_attributes(config: CollectConfig, task_id: int) -> dict[str, Any]:
    """The attributes of LIBERO's and robomimic's `data` group."""
    task = suite_task(config.suite, task_id)
    scene = bddl_file(config.suite, task_id)
    content = scene.read_text(encoding="utf-8")
    found = re.search(r"\(problem\s+(\w+)\)", content)
    if found is None:
        raise RsdError(f"{scene}: expected (problem ...), found none")
    problem_name = found[1].lower()  # libero_tabletop_manipulation, libero_floor_manipulation
    relative = f"{config.suite}/{scene.name}"  # LIBERO stores a path of the machine it was collected on
    env_args = {
        "type": 1,
        "env_name": problem_name.title(),
        "problem_name": problem_name,
        "bddl_file": relative,
        "env_kwargs": {
            "robots": ["Panda"],
            "camera_names": list(SIM_CAMERAS.values()),
            "camera_heights": config.image_size,
            "camera_widths": config.image_size,
            "control_freq": 20,
        },
    }
    problem = {"problem_name": problem_name, "language_instruction": task.language}
    return {
        "tag": "libero-v1",
        "env_name": problem_name.title(),
        "env_args": json.dumps(env_args),
        "problem_info": json.dumps(problem),
        "macros_image_convention": "opengl",
        "bddl_file_name": relative,
        "bddl_file_content": content,
    }
