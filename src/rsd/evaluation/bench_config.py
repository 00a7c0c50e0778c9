"""What measurements and the calibration are told, without what they load: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd.evaluation.config import DEFAULT, OptionError
from rsd.types import AUTO, MAX_SKIPS, MEMORY_CHUNKS, RsdError

MOST_TRIALS = 10_000  # of a calibration, per task

TRUNKS = {  # dim, layers, heads; cameras and words are those of the checkpoint
    "10M": (192, 6, 3),
    "18M": (320, 8, 5),
    "32M": (448, 10, 7),
    "104M": (576, 24, 9),
    "312M": (1024, 24, 16),
}


@dataclass(frozen=True)
class LatencyConfig:
    """Time decoders of a policy, the first one being the baseline."""

    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory or hub id."""
    decode: tuple[str, ...] = ("ar", "l1", "parallel", "rsd", "rsd-fused")
    """Decoders, in the order of the columns; any but rsd-skip."""
    suite: str = "libero_spatial"
    """Suite whose tasks give the observations: initial state 0 of each, and two chunks later."""
    num_tasks: int = 10
    """Take the observations from the first so many tasks."""
    acceptance: str = DEFAULT
    """Rule for drafted levels, as in `rsd eval`."""
    engine: str = AUTO
    """As in `rsd eval`; eager shows more stages."""
    rounds: int = 20
    """Predictions per decoder and observation."""
    warmup: int = 5
    """Rounds thrown away first."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 0
    """Torch's threads; 0 = one per core."""
    output: Path = Path("runs/bench/latency.json")
    """Raw milliseconds and the environment, as JSON; the file of an earlier measurement is replaced."""
    overwrite: bool = False
    """Replace any other file, too."""

    def __post_init__(self) -> None:
        from rsd.decoding.decoders import DECODERS, names  # loads torch

        for name in self.decode:
            if name not in DECODERS:
                raise RsdError(f"--decode '{name}': expected some of {', '.join(DECODERS)}")
        if gated := [name for name in self.decode if name in names(gated=True)]:
            raise RsdError(
                f"--decode {gated[0]}: when it skips depends on the episode; time it in one: rsd eval --num-workers 1"
            )
        if len(set(self.decode)) < len(self.decode):
            raise RsdError(f"--decode {' '.join(self.decode)}: expected each decoder once")
        if min(self.rounds, self.num_tasks) < 1 or self.warmup < 0 or self.threads < 0 or not self.decode:
            expected = "rounds >= 1, num_tasks >= 1, warmup >= 0, threads >= 0, a decoder"
            raise RsdError(f"latency: expected {expected}; found {self}")


@dataclass(frozen=True)
class CalibrateConfig:
    """Fit the skip threshold of a checkpoint: the risk that an executed draft chunk deviates stays under alpha."""

    policy: str = "checkpoints/libero_spatial"
    """Checkpoint directory; the calibration is written into it, if it has none yet or with `overwrite`."""
    task_suite: str = "libero_spatial"
    """Suite of the rollouts, or several with commas between. Each is fitted by itself and the strictest threshold is
    taken, so that no easy suite vouches for a hard one; the confidence is one suite's, not that of all at once."""
    tasks: str = "all"
    """As in `rsd eval`."""
    num_trials: int = 20
    """Rollouts per task, each from a random placement of its own."""
    alpha: float = 0.1
    """Promised risk: mean share of an episode's executed draft chunks that deviate."""
    delta: float = 0.1
    """The promise holds with confidence 1 - delta over the draw of the rollouts."""
    epsilon_mm: float = 75.0
    """A draft chunk deviates if its commands lead the fingertip further than this away from the target's. The arm
    follows about a quarter of what is commanded."""
    max_skips: int = MAX_SKIPS
    """Chunks in a row without the target, at most. A risk by chunk does not see where a row of them leads: without a
    limit the draft of the shipped policy goes round in circles at times."""
    memory_chunks: int = MEMORY_CHUNKS
    """For so many chunks the draft attends to what the target left behind; after that it acts on what it sees alone."""
    acceptance: str = DEFAULT
    """How the target judges drafts, as in `rsd eval`; `rsd-skip` will take the same."""
    tried_mm: float = 100.0
    """Threshold of the rollouts. The promise is about episodes that skip as these do: run again, in another folder,
    with the threshold that came out if it skips much more or less often."""
    test: str = "betting"
    """Test behind the promise: betting (arXiv 2010.09686) or hoeffding-bentkus."""
    device: str = "cpu"
    """cpu or cuda."""
    num_workers: str = "auto"
    """Worker processes."""
    batch: int = 0
    """As in `rsd eval`: one policy for all workers, that many observations at once."""
    seed: int = 11
    """Seed of the policy's rollouts."""
    output: Path = Path("runs/calibration")
    """Folder of the rollouts and of the calibration; an interrupted run continues, and other alpha, delta or epsilon
    need no new ones."""
    overwrite: bool = False
    """Replace the calibration that the checkpoint has."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_trials <= MOST_TRIALS:
            raise OptionError(f"--num-trials {self.num_trials}: expected 1 to {MOST_TRIALS}")
