"""Options of the studies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rsd.checks import Checked, Count, Millimetres, Rules, Seed, Some, between
from rsd.evaluation.bench_config import CalibrateConfig
from rsd.evaluation.config import DEFAULT, EvalConfig
from rsd.types import RsdError

TRUNKS = {  # dim, layers, heads; cameras and words are those of the checkpoint
    "10M": (192, 6, 3),
    "18M": (320, 8, 5),
    "32M": (448, 10, 7),
    "104M": (576, 24, 9),
    "312M": (1024, 24, 16),
}


@dataclass(frozen=True)
class ScalingConfig:
    """Time the decoders with targets of several sizes, random weights."""

    policy: str = "checkpoints/libero"
    """Checkpoint whose tokenizer, cameras and visual drafter are taken."""
    sizes: tuple[str, ...] = tuple(TRUNKS)
    """Sizes of the target, smallest first."""
    num_tasks: int = 2
    """Take two observations each from the first so many tasks of libero_spatial."""
    rounds: int = 20
    """Predictions per decoder and observation."""
    warmup: int = 3
    """Rounds thrown away first."""
    device: str = "cpu"
    """cpu or cuda (there every decoder is replayed from CUDA graphs)."""
    engine: str = "default"
    """As in `rsd eval`; default: CUDA graphs on a GPU, PyTorch operation by operation on a CPU, where exporting models
    of a gigabyte for one measurement outlasts it."""
    acceptance: str = DEFAULT
    """How `rsd` and `rsd-fused` verify, as in `rsd eval`."""
    output: Path = Path("runs/bench/scaling.json")
    """Raw milliseconds and the environment, as JSON."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in TRUNKS or self.sizes.count(size) > 1:
                raise RsdError(f"--sizes {size}: expected some of {', '.join(TRUNKS)}, each once")
        if min(self.rounds, self.num_tasks) < 1 or self.warmup < 1 or not self.sizes:
            found = f"{self.rounds}, {self.num_tasks}, {self.warmup} and {len(self.sizes)} sizes"
            raise RsdError(f"--rounds, --num-tasks, --warmup: expected 1 or more, and one of --sizes, found {found}")


@dataclass(frozen=True)
class DeviationConfig:
    """Measure the action deviation from `ar` on held-out demonstration frames."""

    data: tuple[Path, ...]
    """Folders of rendered demonstrations (HDF5); every n-th episode is taken, as the training held it out."""
    policy: str = "checkpoints/libero"
    """Checkpoint directory or hub id."""
    frames: int = 256
    """Frames, evenly spread; one at a time."""
    validation_every: int = 40
    """Every n-th episode is held out: the training's own setting."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path = Path("runs/bench/deviation.json")
    """p50, p99 and max by decoder, as JSON."""


@dataclass(frozen=True)
class SubstitutionConfig(Checked):
    """Measure what acceptance rules make of right and wrong drafts, on demonstration frames."""

    data: tuple[Path, ...]
    """Folders of rendered demonstrations (HDF5), that the policy was not trained on; of the permuted suites for the
    draft of a look-alike."""
    policy: str = EvalConfig.policy
    """Checkpoint directory or hub id."""
    acceptance: tuple[str, ...] = ()
    """Rules, judged with fine levels regressed; by default one of each kind that the policy can use."""
    frames: Some = 640
    """Frames, evenly spread."""
    max_per_task: Some = 8
    """Demonstrations that are read of each task."""
    memory_chunks: Count = 1
    """So many chunks before, the target looked, and the drafter remembers that; 0: it remembers nothing."""
    epsilon_mm: Millimetres = CalibrateConfig.epsilon_mm
    """A draft is right if its commands lead the fingertip no further than this away from the target's own."""
    batch: Annotated[int, between(1, 4096)] = 64
    """Frames at once."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path = Path("runs/bench/substitution.json")
    """Every number, as JSON; the file of an earlier measurement is replaced."""
    overwrite: bool = False
    """Replace any other file, too."""

    def rules(self) -> Rules:
        yield self.data, "--data to name a folder", "none"


@dataclass(frozen=True)
class ContinuingConfig(Checked):
    """Measure the draft pull of a target that continues from drafts, on demonstration frames."""

    policy: str
    """module:Class or file.py:Class of a policy of your own with `continue_from`; in LeRobot's environment also
    lerobot:DIR_OR_ID, in this process, as its noise has to be drawn twice alike."""
    drafter: Path
    """Directory of the drafter that `rsd drafter distil` made for it."""
    data: tuple[Path, ...]
    """Folders of rendered demonstrations (HDF5), that neither was trained on."""
    steps: tuple[Some, ...] = ()
    """Steps left; by default 1, 2, 4 and so on, and all of them."""
    frames: Some = 64
    """Frames, evenly spread."""
    seeds: Some = 2
    """Seeds of the target's noise for every frame, at least 2 for its own spread."""
    max_per_task: Some = 8
    """Demonstrations that are read of each task."""
    seed: Seed = 0
    """The first seed."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path = Path("runs/bench/continuing.json")
    """Every number, as JSON; the file of an earlier measurement is replaced."""
    overwrite: bool = False
    """Replace any other file, too."""

    def rules(self) -> Rules:
        yield self.data, "--data to name a folder", "none"
        yield self.seeds > 1, "--seeds of at least 2", self.seeds


@dataclass(frozen=True)
class ServingBenchConfig:
    """Time chunks decided here and behind a port of this machine."""

    policy: str = EvalConfig.policy
    """Checkpoint directory or hub id."""
    decode: tuple[str, ...] = ("l1", "rsd-fused")
    """Decoders, in the order of the columns."""
    rounds: int = 200
    """Chunks per decoder."""
    warmup: int = 20
    """Chunks thrown away first."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 0
    """Torch's threads here and in the server; 0 = one per core."""
    proxy: bool = False
    """Instead: what a speculating proxy adds to a server that waits for --target-ms."""
    target_ms: float = 50.0
    """Of that server, milliseconds an answer."""
    drafter: str = ""
    """Of the proxy: directory of `rsd drafter distil`; without, random weights and the tokenizer of --policy."""
    output: Path = Path("runs/bench/serving.json")
    """Raw milliseconds and the environment, as JSON."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0 or self.threads < 0 or not self.decode or not 0 <= self.target_ms <= 1e5:
            most = "a decoder, target_ms from 0 to 1e5"
            raise RsdError(f"serving: expected rounds >= 1, warmup >= 0, threads >= 0, {most}; found {self}")


@dataclass(frozen=True)
class LegacyConfig:
    """Read the files of the original experiment and write them as one checkpoint without pickle."""

    autoencoder: Path
    """rfsq_robust_best.pt"""
    head: Path
    """best_rfsq_head.pt"""
    draft: Path | None = None
    """best_draft_with_projection.pt; without it the head decodes alone, if it is not conditioned."""
    layernorm: bool | None = None
    """Whether the autoencoder was trained with LayerNorm; needed where its file does not say."""
    calibration: Path | None = None
    """Demonstrations (HDF5), or a .npy file of action chunks [N, 8, 7], in the units the autoencoder was trained on."""
    output: Path = Path("runs/legacy")
