"""What the trainings are told, without the trainings: the command line reads it before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rsd.checks import Checked, Count, Rules, Seed, Share, Some, Weight, Where, above, between
from rsd.models.config import DrafterConfig, LoraConfig, PolicyConfig, VisualDrafterConfig
from rsd.tokenizer.config import TokenizerConfig
from rsd.types import Steps

DEFAULT_TOKENIZER = Path("runs/tokenizer")  # where `fit` writes and the trainings read
Every = Annotated[int, between(2, 1e6)]  # every n-th episode
Batch = Annotated[int, between(1, 2**20)]
Remembered = Annotated[int, between(1, 64)]


@dataclass(frozen=True)
class LoopConfig(Checked):
    """steps: optimiser steps; minutes: end earlier, with the schedule brought to its end (0 = no limit);
    batch_size: per process; accumulate: batches whose gradients make one step; save_every: steps between resumable
    states (0 = only at the end); log_every: the same for TensorBoard; cuda_graph: record forward and backward once
    and replay them, which spares a GPU the launches of thousands of small kernels (the losses must not look at a
    tensor's content). compiled: on a GPU, PyTorch's compiler fuses what it can (minutes before the first step)."""

    steps: Count = 20_000
    minutes: Annotated[float, between(0, 1e6)] = 0.0
    batch_size: Batch = 512
    accumulate: Batch = 1
    learning_rate: Annotated[float, above(0, 10)] = 6e-4
    weight_decay: Annotated[float, between(0, 10)] = 0.05
    warmup: Count = 300
    ema: Share = 0.999
    save_every: Count = 0
    log_every: Some = 50
    cuda_graph: Annotated[bool, tyro.conf.FlagConversionOff] = True
    compiled: bool = False
    seed: Seed = 0


@dataclass(frozen=True)
class DrafterLoss(Checked):
    """Of the visual drafter; regress and deviation are weights."""

    regress: Weight = 5.0
    blind: Share = 0.1
    """Share of its samples without a memory of the target (1: it never has one)."""
    deviation: Weight = 0.2
    forecast_every: Annotated[int, Where(lambda n: n == 0 or 2 <= n <= 10**6, "that is 0 or from 2 to 1000000")] = 0
    """Every n-th episode never trains its drafts, and its forecast of their deviation is learnt on these alone: on
    frames that it knows by heart a draft hardly deviates (0: both learn on everything)."""


@dataclass(frozen=True)
class LossConfig(DrafterLoss):
    """draft_share: part of the batch on a draft's prefixes; jitter: largest share of digits disturbed in the rest;
    level_decay: weight of a level's loss relative to the one above, past the coarse ones; counterfactual: share of the
    whole drafts judged in training that are another sample's, so that the block that is told a draft learns to doubt
    it; parallel, gripper: weights. grounding: of saying, on half of the batch, where each thing is seen that could have
    been asked for (needs a target that is `grounded` and rendered demonstrations of a permuted suite). committed: share
    of the rows (of a visual drafter's pairs, of the earlier ones) that are told actions of their chunk (needs a target
    that is `committed`). levels_every: the blocks of the levels are trained on every n-th row of the batch (4: two
    thirds of the arithmetic)."""

    draft_share: Share = 0.5
    jitter: Share = 0.4
    level_decay: Weight = 0.7
    parallel: Weight = 0.5
    gripper: Weight = 1.0
    counterfactual: Share = 0.0
    grounding: Weight = 0.0
    committed: Share = 0.0
    levels_every: Annotated[int, between(1, 1024)] = 1


@dataclass(frozen=True)
class Augmentation(Checked):
    """shift: pixels each way; brightness, contrast, colour: relative; state_noise: in standard deviations."""

    shift: Annotated[int, between(0, 64)] = 4
    brightness: Share = 0.12
    contrast: Share = 0.15
    colour: Share = 0.05
    state_noise: Annotated[float, between(0, 100)] = 0.02


@dataclass(frozen=True)
class TrainTokenizerConfig(Checked):
    """Calibrate the action tokenizer on demonstrations."""

    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of demonstrations: HDF5 files, this package's or LIBERO's own, or LeRobot data sets (lerobot:DIR)."""
    output: Path = DEFAULT_TOKENIZER
    """Where tokenizer.json goes (and tokenizer.safetensors, with pca)."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    overwrite: bool = False
    """Replace the tokenizer that is there; what was trained with it goes on having its own copy."""


@dataclass(frozen=True, kw_only=True)
class OnDemonstrations(Checked):
    """What every training is told."""

    data: tuple[Path, ...] = (Path("data/libero_spatial"),)
    """Folders of rendered demonstrations: HDF5, or LeRobot data sets in LIBERO's layout (lerobot:DIR), for OpenVLA with
    images of 256 px. Of a corrector, a chunk's age is drawn from the multiples of --every of their rendering."""
    device: str = "auto"
    """cuda, cpu or auto."""
    validation_every: Every = 40
    """Every n-th episode is kept out of training for the offline validation."""
    augment: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, kw_only=True)
class Training(OnDemonstrations):
    """What every training of a policy is told."""

    remembered_chunks: Remembered = 4
    """The visual drafter is trained to remember the target's run of 1 to this many chunks before."""
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig(Training):
    """Train target and drafters on demonstrations (--backbone openvla has other options: see its --help)."""

    tokenizer: Path | None = None
    """Folder with tokenizer.json, from `rsd tokenizer fit`; left out: runs/tokenizer, or with `init` the one there."""
    output: Path = Path("runs/policy")
    """Run folder: resumable state, TensorBoard and, at the end, `checkpoint/`."""
    init: str = ""
    """Checkpoint directory or hub id whose weights to start from, with its tokenizer; empty = from scratch."""
    init_matching: bool = False
    """With `init`: take over what has the same name and shape there, and start the rest afresh (another size)."""
    init_fresh: tuple[str, ...] = ()
    """With `init_matching`: parts that start afresh, e.g. feature_drafter target.level_head (another tokenizer)."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def rules(self) -> Rules:
        yield self.init or self.loop.steps, "--loop.steps of at least 1 without --init", "0"
        doubts = "--policy.target.whole-block with --loss.counterfactual, which judges whole drafts"
        yield self.policy.target.whole_block or not self.loss.counterfactual, doubts, "none"
        grounded = "--policy.target.grounded with --loss.grounding"
        yield self.policy.target.grounded or not self.loss.grounding, grounded, "none"
        told = self.policy.target.committed == (self.loss.committed > 0)
        yield told, "--policy.target.committed and --loss.committed together", "one of them"
        most = self.loop.batch_size // 2
        yield self.loss.levels_every <= most, f"--loss.levels-every of at most {most}", self.loss.levels_every
        yield self.init or not self.init_matching, "--init with --init-matching", "none"
        yield self.init_matching or not self.init_fresh, "--init-matching with --init-fresh", "none"


@dataclass(frozen=True, kw_only=True)
class TrainDrafterConfig(OnDemonstrations):
    """Train another draft for a finished target."""

    policy: str = "checkpoints/libero"
    """Checkpoint directory or hub id whose target is kept."""
    output: Path = Path("runs/draft")
    """Run folder; the checkpoint with the new draft goes to `checkpoint/` in it."""
    kind: Literal["feature", "visual"] = "feature"
    """feature: the one that reads the target's prefill; visual: the one with its own perception."""
    resume_weights: bool = False
    """Start from the checkpoint's own draft (and its sizes) instead of afresh."""
    feature_drafter: DrafterConfig = field(default_factory=DrafterConfig)
    visual_drafter: VisualDrafterConfig = field(default_factory=VisualDrafterConfig)
    own_prefix: Share = 0.5
    """Share of the batch on which a draft that reads the prefill continues its own digits."""
    remembered_chunks: Remembered = Training.remembered_chunks
    """The visual one is trained to remember the target's run of 1 to this many chunks before."""
    loss: DrafterLoss = field(default_factory=DrafterLoss)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=5_000))

    def rules(self) -> Rules:
        visual, feature = ("visual_drafter", "remembered_chunks", "loss"), ("feature_drafter", "own_prefix")
        sizes = (f"{self.kind}_drafter",) * self.resume_weights  # the checkpoint's own
        for name in (*(feature if self.kind == "visual" else visual), *sizes):
            value, how = getattr(self, name), f"--kind {self.kind}{' --resume-weights' * (name in sizes)}"
            usual = getattr(TrainDrafterConfig, name, None) or type(value)()
            yield value == usual, f"no --{name.replace('_', '-')} with {how}, which does not read it", "one"


@dataclass(frozen=True, kw_only=True)
class TrainCorrectorConfig(OnDemonstrations):
    """Train a residual head that corrects a policy's stale chunks at every control step (a baseline, A2C2)."""

    policy: str = "checkpoints/libero"
    """Checkpoint directory or hub id of the policy whose chunks it corrects."""
    output: Path = Path("runs/corrector")
    """Run folder; the corrector goes to `checkpoint/` in it."""
    corrector: VisualDrafterConfig = field(default_factory=VisualDrafterConfig)
    """Sizes, as of a visual drafter, of which only the trunk is used."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=5_000))


@dataclass(frozen=True, kw_only=True)
class TrainOpenVlaConfig(Training):
    """Train residual tokens and drafts on an OpenVLA or OpenVLA-OFT checkpoint."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Directory or hub id in OpenVLA's published format."""
    tokenizer: Path = DEFAULT_TOKENIZER
    """Folder with tokenizer.json, from `rsd tokenizer fit`."""
    output: Path = Path("runs/openvla")
    """Run folder: resumable state, TensorBoard and, at the end, `checkpoint/`. The same command continues a run."""
    cameras: Annotated[int, between(0, 2)] = 0
    """Cameras that the target reads, 1 or 2; 0: as many as it was trained with, 2 if its files do not say."""
    unnorm_key: str = ""
    """Which data set's statistics the checkpoint's proprioception projector was trained with, if it has several."""
    validation_frames: Some = 256
    """At most so many of the frames held out are decoded, once by every decoder."""
    checkpointing: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep only every layer's input and compute its inside again backwards: less memory, a third more time."""
    execute: Steps | None = None
    """Steps of a chunk that are executed before the next, as the checkpoint will say; by default all."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    feature_drafter: DrafterConfig = field(default_factory=lambda: DrafterConfig(dim=256))
    visual_drafter: VisualDrafterConfig | None = field(default_factory=VisualDrafterConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            batch_size=16, learning_rate=3e-4, weight_decay=0.0, save_every=500, cuda_graph=False
        )
    )

    def rules(self) -> Rules:
        yield not self.loss.committed, "no --loss.committed with OpenVLA", self.loss.committed
        yield not self.loop.cuda_graph, "--loop.cuda-graph False, as batches have prompts of several lengths", "True"
