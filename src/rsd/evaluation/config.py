"""What one evaluation run is: its options, their defaults and the hash that tells two runs apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from rsd.checks import (
    MOST_LISTED,
    Checked,
    Count,
    Millimetres,
    RsdError,
    Rules,
    Seed,
    Where,
    between,
    from_json,
    listed,
    number,
    shown,
)
from rsd.types import (
    AUTO,
    BEST,
    DRAFT_FIRST,
    DRAFTER_ONLY,
    ENGINE_DEVICES,
    LEROBOT,
    RSD_ASYNC,
    SPEED,
    VIEWS,
    Batch,
    Chunks,
    Engine,
    Moving,
    Speed,
    Steps,
    Temperature,
    speed_rule,
)

# What does not change an episode's outcome: it may differ between an interrupted run and its continuation.
# (`batch` is not among them: a batch rounds otherwise than a single observation. Nor is `control_hz`: outcomes are
# the same, but a run's latencies are to be of one kind.)
UNHASHED_FIELDS = (
    *("num_workers", "videos", "max_videos", "output", "batch_wait_ms", "episode_timeout", "launcher", "shard"),
)
TASK_LISTS = "all, numbers such as 0,3 or 0-4, or suite by suite libero_goal:1,2;libero_10:0"
# In every run's hash; the other options only where they are not the default: a new one changes no hash.
HASHED = (
    *("policy", "decode", "acceptance", "device", "task_suite", "num_trials", "tasks", "init_states", "seed", "audit"),
)
DEFAULT = "default"  # of --acceptance: nothing is asked for
# of `decoding.gate.SkipRule`, which has their defaults
OF_THE_RULE = ("max_skips", "max_skips_held", "memory_chunks", "skips_per_agreement")
OF_ONES_OWN = re.compile(r"(.*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")  # module:Class or file.py:Class


def engine_rule(engine: str, device: str) -> tuple[bool, str, str]:
    """What `--engine` asks of `--device`, as `Checked.rules` has it."""
    needed = ENGINE_DEVICES.get(engine, device)
    return device.startswith(needed), f"--device {needed} with --engine {engine}", device


Hertz = Annotated[float, Where(lambda hz: hz == 0 or 0.01 <= hz <= 1000, "that is 0 or from 0.01 to 1000")]
Delay = Annotated[int, between(0, 1000)]
Workers = Annotated[
    str, Where(lambda text: text == "auto" or 0 < (number(text) or 0) < 4097, "that is auto or a number from 1 to 4096")
]


def asked_rule(acceptance: str) -> str | None:
    """What `--acceptance` asks for, as `RsdPolicy` takes it: None for `default`."""
    return None if acceptance == DEFAULT else acceptance


@dataclass(frozen=True)
class PolicyOptions(Checked):
    """A policy and how it decodes, of every command that runs one."""

    policy: str = "checkpoints/libero"
    """Checkpoint directory, Hugging Face hub id, module:Class or file.py:Class of a policy of your own, or ws://HOST:PORT
    of any server in openpi's protocol, or lerobot:DIR_OR_ID of a LeRobot policy, which runs in its own environment."""
    decode: str = BEST
    """Decoding strategy: ar (the baseline), parallel, l1, rsd, rsd-fused, rsd-skip, rsd-async, draft-first,
    coarse-only, drafter-only; target-only, of a policy of your own or an openpi server; best:
    rsd-fused, with a skip threshold or a --drafter rsd-skip, without a visual drafter rsd."""
    acceptance: str = DEFAULT
    """Rule for drafted levels: exact, margin, residual, blind(0.95), own(0.95), distance(1), typical(0.09),
    agreement(0.7); default: the checkpoint's (for residual blind(0.95)), with rsd-skip its calibration's, by a schedule
    own for blind, with a --temperature exact."""
    execute: Steps | None = None
    """Steps of a chunk that are executed before the next one is predicted; by default what the checkpoint says, all of
    a policy of your own, 5 of an openpi server as its client does, with a --drafter what it drafts."""
    skip_threshold_mm: Millimetres | None = None
    """For rsd-skip: skip the target where the draft expects to deviate less; by default what was calibrated."""
    max_skips: Chunks | None = None
    """For rsd-skip with a threshold of its own: chunks in a row without the target, at most (6)."""
    max_skips_held: Count | None = None
    """The same while the gripper is closed (as --max-skips)."""
    memory_chunks: Chunks | None = None
    """The same: how many chunks the draft attends to what the target left behind, after that what it sees alone (2)."""
    skips_per_agreement: Chunks | None = None
    """The same: after k runs of the target in a row at which the draft stood, at most k times so many chunks go without
    it, and none after a rejected draft; by default there is no such limit."""
    target_at_reset: bool = True
    """With --no-target-at-reset, an ablation of rsd-skip, the gate decides on an episode's first observation, too;
    otherwise the target always runs there."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda (every GPU of this host), cuda:1."""
    engine: Engine = AUTO
    """auto (CUDA graphs on a GPU, ONNX Runtime on a CPU), eager (PyTorch operation by operation), cuda-graphs, compiled
    (cuda-graphs of fewer, larger kernels; takes a minute or two to begin), onnx, onnx-int8 (on CPUs that multiply such
    numbers: half the time of a large target, rounded to 8 bits)."""


@dataclass(frozen=True)
class EvalConfig(PolicyOptions):
    """One run: a policy, a way to decode, and the initial states it is tried on."""

    task_suite: str = "libero_spatial"
    """LIBERO suite, or several with commas between: libero_spatial, libero_object, libero_goal, libero_10, libero_90,
    and LIBERO-PRO's variants of them, such as libero_spatial_swap."""
    num_trials: Annotated[int, between(1, MOST_LISTED)] = 50
    """Episodes per task at most, one for each of the benchmark's fixed initial states; 3 gives a quick look."""
    tasks: str = "all"
    """Task numbers of each suite, such as 0,3 or 0-4; or by suite, libero_goal:1,2;libero_10:0 (of others all)."""
    init_states: str = "0"
    """Initial states: a list such as 0,3,10-19, of which the first num_trials are taken; a single number is the first
    of num_trials in a row."""
    drafter: str = ""
    """Directory of a drafter that `rsd drafter distil` made for this policy: for rsd-skip, rsd-async, rsd-fused."""
    continue_steps: Steps | None = None
    """With a --drafter, rsd-fused: steps of a diffusion or flow matching target from the noised draft on (half)."""
    temperature: Temperature = 0.0
    """Above 0, ar, parallel, rsd and rsd-fused draw motion tokens from softmax(logits / temperature); 0 takes the
    likeliest."""
    seed: Seed = 7
    """Seed of what is drawn at a temperature, for --motion and for --view; the simulator is always seeded by 0, as the
    published protocol does."""
    audit: bool = False
    """With a visual drafter: record how far its chunks lead away from the target's; for that the target is run beside
    every skipped chunk (not timed), and the realised risk is known."""
    control_hz: Hertz = 0.0
    """Run in real time: an action every 1/hz seconds (LIBERO's own is 20), the target's pending verification meanwhile;
    how long the robot stands still between chunks is recorded. 0: as fast as possible, simulator and policy in turn.
    With --meanwhile, or rsd-async, the physics goes on while the policy thinks, and outcomes depend on the machine."""
    delay: Delay = 0
    """Virtual delay: the target's answer to an observation taken at step k can be used from step k + so many on, the
    world moves on meanwhile. Exact: outcomes hang on no clock and no load."""
    drafter_delay: Delay = 0
    """The same of the drafter's chunk, where it is executed before or without the target's answer."""
    meanwhile: Literal["hold", "tail", "corrected", "a2c2", "rtc"] | None = None
    """What the robot does while it waits for a delayed answer: hold (stand still, the default), tail (go on with the
    chunk before, whose steps beyond --execute are there for that), or corrected (a tail, and what was missed of the
    answer is made up for), a2c2 (a tail, every action corrected by the --corrector), rtc (a tail that the target has
    been told, real-time chunking: l1 of one trained with --loss.committed); rsd-async has its own way."""
    corrector: str = ""
    """With --meanwhile a2c2 and l1: directory of what `rsd train corrector` made for this very policy."""
    motion: Moving = "none"
    """The scene moves: the asked-for thing slides along a line until the gripper has touched it, or the destination
    does all the time, 8 cm to one side of where it stood, then to the other; jump: one of the two stands 6 to 12 cm
    aside from a drawn step on, the thing if untouched; push-out: the thing, once it is lifted."""
    motion_speed: Speed = SPEED
    """Metres a second of what slides; what is drawn of a --motion comes from --seed, task and initial state. The expert
    solves 90 % up to 0.1 in libero_object_permuted; in libero_spatial_permuted to 0.02 (thing), 0.1 (destination)."""
    view: str = ""
    """The scene looks otherwise: some of light,camera,zoom,shift,noise (camera: turned by 2 to 6 degrees), drawn from
    --seed, suite, task and initial state."""
    num_workers: Workers = "auto"
    """Worker processes, each with a simulator of its own; auto takes one per CPU core, in real time one."""
    threads: Annotated[int, between(1, 4096)] = 1
    """Torch's threads for a policy on a CPU. Sums round otherwise with another number, whatever the number of workers;
    for times with nothing else running, give it the cores (and one worker)."""
    batch: Batch = 0
    """One process owns the policy and predicts for up to so many simulators at once (good on a GPU); 0 gives every
    worker a policy of its own."""
    batch_wait_ms: Annotated[float, between(0, 60_000)] = 4.0
    """How long an incomplete batch waits for more observations."""
    episode_timeout: Annotated[float, between(0.1, 1e6)] = 600.0
    """Seconds after which a worker that is still at its episode is taken for hung and replaced."""
    launcher: Literal["local", "ray"] = "local"
    """Where the workers are: processes on this machine, or actors of a Ray cluster (pip install 'rsd-vla[ray]')."""
    shard: str = ""
    """Run only part i of n of the episodes, written i/n from 0/n on; `rsd merge` puts the parts together."""
    videos: Literal["none", "failures", "all"] = "none"
    """Which episodes get a video, replayed from their actions after the episode is over."""
    max_videos: Annotated[int, between(1, MOST_LISTED)] = 10
    """At most so many videos a run; of all episodes, failures first."""
    output: str = ""
    """Results directory; default runs/eval/<suite>-<decode>-<hash of the options>."""

    def rules(self) -> Rules:
        for name in OF_THE_RULE:
            needed = f"a --skip-threshold-mm with {option(name)}, as the checkpoint has its own"
            yield self.skip_threshold_mm is not None or getattr(self, name) is None, needed, "none"
        yield engine_rule(self.engine, self.device)
        continues = self.drafter and self.decode in ("rsd-fused", BEST)
        found = f"--decode {self.decode}"
        yield self.continue_steps is None or continues, "--continue-steps with a --drafter and rsd-fused", found
        alone = "--control-hz without --batch, in which robots would wait for each other"
        yield not (self.control_hz and self.batch), alone, f"--batch {self.batch}"
        yield from self._delays()
        yield speed_rule(self.motion, self.motion_speed)
        looks = self.view in ("", ",".join(what for what in VIEWS if what in self.view.split(",")))
        yield looks, f"--view with some of {','.join(VIEWS)}, in this order, commas between, no spaces", self.view
        ray, given = self.launcher == "ray", f"--batch {self.batch} and --videos {self.videos}"
        apart = "--launcher ray without --batch and --videos: a policy in every actor and no videos"
        yield not (ray and (self.batch or self.videos != "none")), apart, given
        once = all(self.suites) and len(set(self.suites)) == len(self.suites)
        yield once, "--task-suite to name LIBERO suites, each once", self.task_suite
        self.shard_of()
        planned_states(self.init_states, self.num_trials)
        unknown = planned_tasks(self.tasks).keys() - {*self.suites, ""}
        yield not unknown, "--tasks of the suites in --task-suite", ", ".join(sorted(unknown))

    def _delays(self) -> Rules:
        delays = f"--delay {self.delay} and --drafter-delay {self.drafter_delay}"
        delayed = bool(self.delay or self.drafter_delay)
        apart = "--control-hz, by whose clock answers come, without virtual delays"
        yield not (self.control_hz and delayed), apart, delays
        drafted = self.decode in (DRAFT_FIRST, RSD_ASYNC, "rsd-skip", DRAFTER_ONLY, BEST)
        executes = "a --decode that executes unverified drafts with --drafter-delay"
        yield not self.drafter_delay or drafted, executes, f"--decode {self.decode}"
        both = self.decode in (DRAFT_FIRST, RSD_ASYNC, "rsd-skip")
        yield not both or self.drafter_delay <= self.delay, "--drafter-delay of at most --delay", delays
        asks = "a --delay, --drafter-delay or --control-hz with --meanwhile"
        free = self.meanwhile in (None, "a2c2")
        yield free or delayed or self.control_hz > 0, asks, f"--meanwhile {self.meanwhile} alone"
        own = f"no --meanwhile with --decode {RSD_ASYNC}, which goes on with its draft"
        yield self.decode != RSD_ASYNC or self.meanwhile is None, own, f"--meanwhile {self.meanwhile}"
        heads = (self.meanwhile == "a2c2") == bool(self.corrector)
        yield heads, "--meanwhile a2c2 and --corrector together", f"--meanwhile {self.meanwhile or 'hold'}"
        plain = not (self.control_hz or self.drafter or self.served or self.custom) and self.decode == "l1"
        alone = f"--meanwhile {self.meanwhile} with --decode l1 of a checkpoint, without --drafter and --control-hz"
        found = f"--decode {self.decode} of {self.policy}, --drafter {self.drafter!r}, --control-hz {self.control_hz:g}"
        yield self.meanwhile not in ("a2c2", "rtc") or plain, alone, found
        single = "--corrector without --batch"
        yield not (self.corrector and self.batch), single, f"--batch {self.batch}"

    @property
    def suites(self) -> list[str]:
        return [name.strip() for name in self.task_suite.split(",")]

    @property
    def served(self) -> bool:
        """Whether the policy is behind a port."""
        return self.policy.startswith(("ws://", "wss://")) or self.lerobot

    @property
    def lerobot(self) -> bool:
        """Whether the policy is LeRobot's, in a process of its own behind a port."""
        return self.policy.startswith(LEROBOT)

    @property
    def custom(self) -> bool:
        """Whether the policy is a class of the user's."""
        return OF_ONES_OWN.fullmatch(self.policy) is not None and not self.lerobot

    @property
    def output_dir(self) -> Path:
        directory = Path(self.output or f"runs/eval/{'+'.join(self.suites)}-{self.decode}-{self.hash[:8]}")
        return directory / f"shard-{self.shard.replace('/', '-of-')}" if self.shard else directory

    @property
    def identity(self) -> dict[str, Any]:
        """The options that an episode's outcome depends on."""
        asked = {name: value for name, value in asdict(self).items() if name not in UNHASHED_FIELDS}
        named = {name: value for name, value in asked.items() if name in HASHED or value != getattr(EvalConfig, name)}
        if self.init_states.isdecimal():
            named["init_states"] = int(self.init_states)  # the first of a row
        named.pop("target_at_reset", None)
        return named | ({"target_at_reset": True} if self.decode == "rsd-skip" and self.target_at_reset else {})

    @property
    def states(self) -> Sequence[int]:
        """The initial states of every task, in the order of the trials."""
        return planned_states(self.init_states, self.num_trials)

    def shard_of(self) -> tuple[int, int]:
        """(part, number of parts); raises RsdError for anything but i/n with 0 <= i < n."""
        part, _, parts = (number(text) for text in (self.shard or "0/1").partition("/"))
        if part is None or parts is None or part >= parts or self.shard not in ("", f"{part}/{parts}"):
            raise RsdError(f"--shard {shown(self.shard)}: expected i/n with 0 <= i < n, such as 0/4")
        return part, parts

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def task_ids(self, suite: str, available: list[int]) -> list[int]:
        """Resolve `tasks` against a suite's task numbers; raises RsdError for one that it does not have."""
        planned = planned_tasks(self.tasks)
        wanted = planned.get(suite, planned.get("", available))
        missing = [task for task in wanted if task not in available]
        if missing:
            there = f"{min(available)} to {max(available)}"
            found = ",".join([*map(str, missing[:9]), *["..."][: len(missing) > 9]])
            raise RsdError(f"--tasks {found}: {suite} has tasks {there}")
        return wanted


def stored_config(options: dict[str, Any], where: str, *, older: bool = False) -> EvalConfig:
    """The options of a run as its config.json has them; `RsdError` for one of another type, or that cannot be.

    older: options that this version does not know are passed over.
    """
    unknown = options.keys() - {field.name for field in fields(EvalConfig)}
    return from_json(EvalConfig, options, f"{where}: config", ignore=unknown if older else ())


def planned_tasks(tasks: str) -> dict[str, list[int]]:
    """`--tasks` -> numbers by suite, "" for every suite, none for a suite of which all are planned.

    Raises RsdError for anything else than all, numbers, or numbers suite by suite."""
    planned: dict[str, list[int]] = {}
    for part in [] if tasks == "all" else tasks.split(";"):
        suite, _, numbers = part.rpartition(":")
        if (";" in tasks and not suite) or suite.strip() in planned:
            raise RsdError(f"--tasks: expected {TASK_LISTS}, found {shown(tasks)}")
        planned[suite.strip()] = listed(numbers, "--tasks", MOST_LISTED, TASK_LISTS)
    return planned


def planned_states(init_states: str, num_trials: int) -> Sequence[int]:
    """`--init-states` and `--num-trials` -> numbers; raises RsdError for what is neither number nor list."""
    start = number(init_states)
    if start is not None and start < MOST_LISTED:
        return range(start, start + num_trials)
    return listed(init_states, "--init-states", MOST_LISTED)[:num_trials]


def option(field_name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + field_name.replace("_", "-")
