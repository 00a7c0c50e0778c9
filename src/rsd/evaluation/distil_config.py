"""What `rsd drafter distil` is told, without what it loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rsd.checks import Checked, Count, Epsilon, Proper, Rules, Seed, between
from rsd.evaluation.bench_config import CalibrateConfig
from rsd.evaluation.config import EvalConfig
from rsd.models.config import StandaloneDrafterConfig
from rsd.training.config import Augmentation, DrafterLoss, LoopConfig
from rsd.types import MAX_SKIPS, Chunks


@dataclass(frozen=True)
class DistilConfig(Checked):
    """Distil a drafter for any policy: roll it out, let the drafter drive while it labels, train, calibrate the gate.

    The same command goes on where it was interrupted."""

    target: str
    """Everything that `rsd eval --policy` takes."""
    task_suite: str = EvalConfig.task_suite
    """The LIBERO suite that the drafter is for."""
    tasks: str = EvalConfig.tasks
    """As in `rsd eval`."""
    output: Path = Path("runs/distil")
    """Run folder; the drafter goes to `drafter/` in it."""
    num_rollouts: Annotated[int, between(1, 10_000)] = 20
    """Rollouts of the target per task, on random placements."""
    num_dagger: Annotated[int, between(1, 10_000)] = 10
    """Rollouts per task and round in which the drafter drives four chunks in five and the target labels."""
    rounds: Annotated[int, between(0, 20)] = 2
    """Such rounds, each followed by a training on all rollouts so far."""
    num_calibration: Count = 5
    """Rollouts per task for the gate; with too few in all it stays uncalibrated, and goes by epsilon."""
    execute: Annotated[int, between(1, 64)] | None = None
    """Actions of each answer that are executed, and that the drafter drafts; default as in `rsd eval`."""
    alpha: Proper = CalibrateConfig.alpha
    """Promised risk of the gate, as of `rsd calibrate`."""
    delta: Proper = CalibrateConfig.delta
    """Confidence 1 - delta of that promise."""
    epsilon_mm: Epsilon = CalibrateConfig.epsilon_mm
    """A draft deviates beyond it, for a target that answers an observation always alike; of a stochastic one epsilon is
    what nine in ten of its answers stay within of each other."""
    max_skips: Chunks = MAX_SKIPS
    """Chunks in a row without the target, at most."""
    device: str = "cpu"
    """Where training runs, and the target unless it is served; 4,000 steps want a GPU."""
    num_workers: Annotated[int, between(1, 4096)] = 2
    """Processes of the rollouts, each with a target of its own."""
    seed: Seed = 0
    """Of placements and training."""
    drafter: StandaloneDrafterConfig = field(default_factory=StandaloneDrafterConfig)
    loss: DrafterLoss = field(default_factory=lambda: DrafterLoss(forecast_every=5))
    augment: Augmentation = field(default_factory=lambda: Augmentation(shift=2))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=4_000, batch_size=256))
    """Of each round's training."""
    validation_every: Annotated[int, between(2, 1e6)] = 20
    """Every n-th rollout is kept out of training."""

    def rules(self) -> Rules:
        yield "," not in self.task_suite, "--task-suite with one suite", self.task_suite
        unit, side = 16 * self.drafter.visual.shrink, self.drafter.image_size
        yield side % unit == 0, f"--drafter.image-size of a multiple of 16 x --drafter.visual.shrink, {unit}", side
        yield self.loop.steps, "--loop.steps of at least 1", 0
        yield self.loss.blind == DrafterLoss.blind, "no --loss.blind: this drafter has no memory", self.loss.blind
