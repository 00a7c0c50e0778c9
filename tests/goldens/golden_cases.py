"""What the goldens freeze, and how it is run. A redesign changes `decode_episode` and `train_tiny`, never the files.

Decoders: every one with the options of the shipped checkpoint, and most acceptance rules, on 20 observations of two
episodes in the simulator. Training: the losses of the first steps of a tiny model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd.data.demonstrations import Demonstration
from rsd.decoding.decoders import names
from rsd.decoding.primitives import Primitives, Step
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.feature_drafter import DrafterConfig
from rsd.models.target import TargetConfig
from rsd.models.visual_drafter import VisualDrafterConfig
from rsd.nested import tensors_of
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.training.dataset import Augmentation, FrameDataset, chunk_targets
from rsd.training.loop import LoopConfig, describe, train
from rsd.training.losses import LossConfig, policy_losses
from rsd.types import Observation

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER.parents[1] / "checkpoints" / "libero"
OBSERVATIONS, CHUNKS, STATISTICS, TRAINING = (
    FOLDER / name for name in ("observations.npz", "chunks.npz", "statistics.json", "training.json")
)
TASKS, CHUNKS_PER_EPISODE = (1, 4), 10  # of libero_spatial, initial state 0; in each the gripper closes once


@dataclass(frozen=True)
class Case:
    """decode: the decoder's name; options: of `RsdPolicy.from_pretrained`; seed: given to `reset`."""

    decode: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


DECODERS = (
    *("ar", "parallel", "l1", "rsd", "rsd-fused", "rsd-skip"),
    *("draft-first", "rsd-async", "coarse-only", "drafter-only"),
)
TOLD = {"acceptance": "residual"}  # not the shipped own, which is blind(0.95,moving)
CASES = {name: Case(name, TOLD if name in names(drafts=True) else {}) for name in DECODERS} | {
    "rsd blind": Case("rsd"),  # what is taken unless another is asked for
    "rsd-fused blind": Case("rsd-fused"),
    "rsd exact": Case("rsd", {"acceptance": "exact"}),
    "rsd margin": Case("rsd", {"acceptance": "margin"}),
    "rsd agreement": Case("rsd", {"acceptance": "agreement(0.7)"}),
    "rsd typical": Case("rsd", {"acceptance": "typical(0.09)"}),
    "rsd margin sequential": Case("rsd", {"acceptance": "margin", "fine": "sequential"}),
    "rsd-fused exact": Case("rsd-fused", {"acceptance": "exact"}),
    "rsd-fused margin": Case("rsd-fused", {"acceptance": "margin"}),
    "rsd-fused distance": Case("rsd-fused", {"acceptance": "distance(1)"}),
    "draft-first audited": Case("draft-first", TOLD | {"audit": True}),
    "rsd-skip audited": Case("rsd-skip", {"audit": True, "acceptance": "blind(0.95,moving)"}),
    "ar drawn": Case("ar", {"temperature": 1.0}, seed=5),
    "rsd-fused drawn": Case("rsd-fused", {"temperature": 1.0}, seed=5),
}


class Decoding(NamedTuple):
    """One chunk. actions: float32 [8, 7]; tokens: int [L, P], None where a decoder gives none; statistics: all but the
    times, as they are once what was left to do is done."""

    actions: NDArray[np.float32]
    tokens: NDArray[np.int8] | None
    statistics: dict[str, Any]


def episodes() -> list[list[Observation]]:
    """The observations of each episode, in order."""
    with np.load(OBSERVATIONS) as stored:
        rows = zip(stored["images"], stored["states"], stored["instructions"], strict=True)
        seen = [Observation(images, state, str(words)) for images, state, words in rows]
    return [seen[start : start + CHUNKS_PER_EPISODE] for start in range(0, len(seen), CHUNKS_PER_EPISODE)]


class Shared:
    """Runs primitives as they are, but what the target makes of what it sees once for all decoders of one model, each
    of which gets a copy."""

    whole = False

    def __init__(self) -> None:
        self._found = dict[tuple[Any, ...], Any]()

    def __call__(self, ops: Primitives, step: Step, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if step.name not in ("embed", "prefill"):
            return body(ops, *args)
        key = (step.name, id(ops.target), *args[1:], *(tensor.numpy().tobytes() for tensor in tensors_of(args)))
        if key not in self._found:
            self._found[key] = body(ops, *args)
        return copy.deepcopy(self._found[key])


def decode_case(case: Case, engine: str, device: str = "cpu", shared: Shared | None = None) -> list[Decoding]:
    """Every observation of every episode, with the threads that PyTorch has."""
    policy = RsdPolicy.from_pretrained(CHECKPOINT, decode=case.decode, engine=engine, device=device, **case.options)
    policy.core.ops.engine = shared or policy.core.ops.engine
    return [decoding for episode in episodes() for decoding in decode_episode(policy, episode, case.seed)]


def decode_episode(policy: RsdPolicy, observations: list[Observation], seed: int | None) -> Iterator[Decoding]:
    core, tokens = policy.core, list[Tensor | None]()
    decode = core._decode

    def noting(*given: Any) -> Any:
        decoded = decode(*given)
        tokens.append(None if decoded.motion is None else decoded.motion.clone())
        return decoded

    core._decode = noting
    policy.reset(seed)
    for observation in observations:
        chunk = policy.predict(observation)
        statistics = asdict(policy.verify() or chunk.stats)
        found = tokens[-1]
        del statistics["latency_ms"]
        yield Decoding(chunk.actions, None if found is None else found[0].cpu().numpy().astype(np.int8), statistics)
    core._decode = decode


def tiny_model(whole_block: bool) -> tuple[RsdModel, ActionTokenizer]:
    target = TargetConfig(32, (16, 16, 32, 32), dim=64, layers=2, heads=2, text_dim=32, whole_block=whole_block)
    draft = DrafterConfig(levels=3, dim=32, layers=1, heads=2)
    visual_drafter = VisualDrafterConfig(2, (16, 16, 16, 32), dim=32, layers=1, heads=2, levels=draft)
    chunks = np.concatenate([chunk_targets(demonstration.labels, 8) for demonstration in tiny_data()])
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig())
    torch.manual_seed(0)
    config = PolicyConfig(target=target, feature_drafter=draft, visual_drafter=visual_drafter)
    return RsdModel.of(config, tokenizer), tokenizer


def tiny_data() -> list[Demonstration]:
    """Three episodes of 40 steps with smooth actions and noise for images."""
    rng, time = np.random.default_rng(0), np.linspace(0.0, 1.0, 40, dtype=np.float32)[:, None]
    found = []
    for index in range(3):
        motion = rng.uniform(-0.5, 0.5, 6) * np.cos(np.arange(1, 7) * time)
        labels = np.hstack([motion, np.where(time < 0.5, -1.0, 1.0)]).astype(np.float32)
        state = np.hstack([motion, time, -time]).astype(np.float32)
        images = rng.integers(0, 256, (40, 2, 32, 32, 3), dtype=np.uint8)
        words = f"put thing {index} on the plate"
        found.append(Demonstration("t", f"{index}", words, images, state, labels, labels, 39, "", -1, Path("t")))
    return found


def train_tiny(run: Path, whole_block: bool, stops: tuple[int, ...] = (4,)) -> list[dict[str, float]]:
    """Every step's losses, the run interrupted after each of `stops` but the last."""
    config, found = LoopConfig(steps=stops[-1], batch_size=16, warmup=2, save_every=1), list[dict[str, float]]()
    for stop in stops:
        model, tokenizer = tiny_model(whole_block)
        data = FrameDataset(tiny_data(), 8, torch.device("cpu"))

        def losses(
            model: RsdModel = model, tokenizer: ActionTokenizer = tokenizer, data: FrameDataset = data, stop: int = stop
        ) -> dict[str, Tensor]:
            if len(found) == stop:
                raise KeyboardInterrupt
            batch = data.batch(*data.draw(config.batch_size, 2), augment=Augmentation())
            values = policy_losses(model, tokenizer, batch, LossConfig())
            found.append({name: float(value.detach()) for name, value in values.items()})
            return values

        try:
            train(model, losses, config, run, torch.device("cpu"), describe(config))
        except KeyboardInterrupt:
            assert stop != stops[-1], "the last stop is the end of the run"
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON with a line for each entry, so that a difference can be read."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
