"""What one evaluation run is: its options, their defaults and the hash that tells two runs apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rsd.types import RsdError

# What does not change an episode's outcome: it may differ between an interrupted run and its continuation.
UNHASHED_FIELDS = ("num_workers", "videos", "max_videos", "output")


class OptionError(RsdError):
    """An option's value that cannot be run; the message says what can."""


@dataclass(frozen=True)
class EvalConfig:
    """One run: a policy, a way to decode, and the initial states it is tried on."""

    task_suite: str = "libero_spatial"
    """LIBERO suite, such as libero_spatial, libero_object, libero_goal, libero_10, libero_90."""
    num_trials: int = 50
    """Episodes per task, one for each of the benchmark's fixed initial states; 3 gives a quick look."""
    tasks: str = "all"
    """Task numbers of the suite, such as 0,3,5."""
    init_states: int = 0
    """Number of the first initial state; trial k of a task starts from state init_states + k."""
    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory or Hugging Face hub id."""
    decode: str = "rsd"
    """Decoding strategy: ar (the baseline), parallel, l1, rsd, draft."""
    acceptance: str = "default"
    """Rule for drafted levels: exact, margin, distance(1), typical(0.09), agreement(0.7); default: the checkpoint's."""
    seed: int = 7
    """Seed of a policy that samples; the simulator is always seeded by 0, as the published protocol does."""
    skip_threshold_mm: float = -1.0
    """For rsd-skip: leave the main idle where the draft expects to deviate less; -1 takes the calibration."""
    max_skips: int = 4
    """For rsd-skip with a threshold of its own: chunks in a row without the main, at most."""
    audit: bool = False
    """For rsd-skip: run the main beside every skipped chunk (not timed), to report the realised risk."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda, cuda:1."""
    num_workers: str = "auto"
    """Worker processes, each with its own simulator and policy; auto takes one per CPU core."""
    videos: Literal["none", "failures", "all"] = "none"
    """Which episodes get a video, replayed from their actions after the episode is over."""
    max_videos: int = 10
    """At most so many videos a run."""
    output: str = ""
    """Results directory; default results/scratch/<suite>-<decode>-<hash of the options>."""

    def __post_init__(self) -> None:
        for name, minimum in (("num_trials", 1), ("init_states", 0), ("max_videos", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < minimum:
                raise OptionError(f"{option(name)} {value}: expected at least {minimum}")
        if self.videos not in ("none", "failures", "all"):
            raise OptionError(f"--videos '{self.videos}': expected one of none, failures, all")
        if self.num_workers != "auto" and not (self.num_workers.isdecimal() and int(self.num_workers) > 0):
            raise OptionError(f"--num-workers '{self.num_workers}': expected auto or a number of at least 1")
        for task in [] if self.tasks == "all" else self.tasks.split(","):
            if not task.strip().isdecimal():
                raise OptionError(f"--tasks '{self.tasks}': expected all or numbers such as 0,3,5")

    @property
    def output_dir(self) -> Path:
        if self.output:
            return Path(self.output)
        return Path("results/scratch") / f"{self.task_suite}-{self.decode}-{self.hash[:8]}"

    @property
    def identity(self) -> dict[str, Any]:
        """The options that an episode's outcome depends on."""
        return {name: value for name, value in asdict(self).items() if name not in UNHASHED_FIELDS}

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def task_ids(self, available: list[int]) -> list[int]:
        """Resolve `tasks` against the suite's task numbers; raises OptionError for one that it does not have."""
        if self.tasks == "all":
            return list(available)
        wanted = list(dict.fromkeys(int(task) for task in self.tasks.split(",")))
        missing = [task for task in wanted if task not in available]
        if missing:
            raise OptionError(
                f"--tasks {','.join(map(str, missing))}: {self.task_suite} has tasks "
                f"{min(available)} to {max(available)}"
            )
        return wanted


def option(field_name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + field_name.replace("_", "-")
