"""What measurements and the calibration are told, without what they load: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rsd.checks import Checked, Count, Epsilon, Millimetres, Proper, Rules, Seed, between
from rsd.evaluation.config import DEFAULT, Workers, engine_rule
from rsd.types import AUTO, MAX_SKIPS, MEMORY_CHUNKS, Batch, Chunks, Engine, Steps, Threads

Tries = Annotated[int, between(1, 10_000)]


@dataclass(frozen=True)
class LatencyConfig(Checked):
    """Time decoders of a policy, the first one being the baseline."""

    policy: str = "checkpoints/libero"
    """Checkpoint directory or hub id."""
    decode: tuple[str, ...] = ("ar", "l1", "parallel", "rsd", "rsd-fused")
    """Decoders, in the order of the columns; any but rsd-skip."""
    suite: str = "libero_spatial"
    """Suite whose tasks give the observations: initial state 0 of each, and two chunks later."""
    num_tasks: Tries = 10
    """Take the observations from the first so many tasks."""
    acceptance: str = DEFAULT
    """Rule for drafted levels, as in `rsd eval`; or synthetic(RATE) or synthetic(RATE,SEED): each drafted level stands
    at that rate whatever the target says, the rest comes level by level as under exact. So the time of a pass is told
    from the quality of the draft; the other rules take one pass whatever they accept."""
    engine: Engine = AUTO
    """As in `rsd eval`; eager shows more stages."""
    rounds: Annotated[int, between(1, 1e6)] = 20
    """Predictions per decoder and observation."""
    warmup: Count = 5
    """Rounds thrown away first."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: Threads = 0
    """Torch's threads; 0 = one per core."""
    output: Path = Path("runs/bench/latency.json")
    """Raw milliseconds and the environment, as JSON; the file of an earlier measurement is replaced."""
    overwrite: bool = False
    """Replace any other file, too."""

    def rules(self) -> Rules:
        from rsd.decoding.decoders import DECODERS, names  # loads torch

        known, asked = [name for name in DECODERS if name not in names(gated=True)], set(self.decode)
        of_them = f"--decode to be some of {', '.join(known)}, each once (when rsd-skip skips depends on the episode)"
        yield asked and asked <= {*known} and len(asked) == len(self.decode), of_them, " ".join(self.decode)
        judged = self.acceptance == DEFAULT or any(DECODERS[name].drafts for name in asked)
        yield judged, "a decoder that drafts among --decode with --acceptance", " ".join(self.decode)
        yield engine_rule(self.engine, self.device)


@dataclass(frozen=True)
class CalibrateConfig(Checked):
    """Fit the skip threshold of a checkpoint: the risk that an executed draft chunk deviates stays under alpha."""

    policy: str = "checkpoints/libero"
    """Checkpoint directory; the calibration is written into it, if it has none yet or with `overwrite`."""
    task_suite: str = "libero_spatial"
    """Suite of the rollouts, or several with commas between. Each is fitted by itself and the strictest threshold is
    taken, so that no easy suite vouches for a hard one; the confidence is one suite's, not that of all at once."""
    tasks: str = "all"
    """As in `rsd eval`."""
    num_trials: Tries = 20
    """Rollouts per task, each from a random placement of its own."""
    alpha: Proper = 0.1
    """Promised risk: mean share of an episode's executed draft chunks that deviate."""
    delta: Proper = 0.1
    """The promise holds with confidence 1 - delta over the draw of the rollouts."""
    epsilon_mm: Epsilon = 75.0
    """A draft chunk deviates if its commands lead the fingertip further than this away from the target's. The arm
    follows about a quarter of what is commanded."""
    max_skips: Chunks = MAX_SKIPS
    """Chunks in a row without the target, at most. A risk by chunk does not see where a row of them leads: without a
    limit the draft of the shipped policy goes round in circles at times."""
    memory_chunks: Chunks = MEMORY_CHUNKS
    """For so many chunks the draft attends to what the target left behind; after that it acts on what it sees alone."""
    skips_per_agreement: Chunks | None = None
    """Trust is earned: chunks that may go without the target for each of its last runs in a row at which the draft
    stood; left out: no such limit."""
    acceptance: str = DEFAULT
    """How the target judges drafts, as in `rsd eval`; `rsd-skip` will take the same."""
    execute: Steps | None = None
    """Steps of a chunk that are executed, as in `rsd eval`; `rsd-skip` will insist on the same."""
    tried_mm: Millimetres = 100.0
    """Threshold of the rollouts. The promise is about episodes that skip as these do: run again, in another folder,
    with the threshold that came out if it skips much more or less often."""
    test: Literal["betting", "hoeffding-bentkus"] = "betting"
    """Test behind the promise: betting (arXiv 2010.09686) or hoeffding-bentkus."""
    device: str = "cpu"
    """cpu or cuda."""
    num_workers: Workers = "auto"
    """Worker processes."""
    batch: Batch = 0
    """As in `rsd eval`: one policy for all workers, that many observations at once."""
    seed: Seed = 11
    """Seed of the policy's rollouts."""
    output: Path = Path("runs/calibration")
    """Folder of the rollouts and of the calibration; an interrupted run continues, and other alpha, delta or epsilon
    need no new ones."""
    overwrite: bool = False
    """Replace the calibration that the checkpoint has."""
