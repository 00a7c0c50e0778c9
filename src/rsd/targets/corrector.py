"""The directory of a corrector (`corrector.json`, weights, manifest), and a policy whose stale chunks it corrects."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsd import manifest
from rsd.checkpoint import finite_halves, load_weights
from rsd.checks import Checked, Sha256
from rsd.json_files import from_json, read_versioned, write_atomically
from rsd.models.config import VisualDrafterConfig
from rsd.models.corrector import ChunkCorrector, Stale, rest_of, stale_run
from rsd.models.target import TargetModel
from rsd.policy import RsdPolicy
from rsd.pt_files import save_tensors
from rsd.types import ActionChunk, Observation, RsdError

FILE_NAME, WEIGHTS_FILE, FORMAT_VERSION = "corrector.json", "model.safetensors", 1


@dataclass(frozen=True)
class StoredCorrector(Checked):
    """corrector.json. target_sha256: of the weights file of the checkpoint whose chunks it corrects."""

    config: VisualDrafterConfig
    target_sha256: Sha256
    provenance: dict[str, Any] = field(default_factory=dict)


def save_corrector(model: ChunkCorrector, stored: StoredCorrector, directory: Path) -> None:
    """Write the whole directory: fp16 weights."""
    save_tensors(finite_halves(model, directory), directory / WEIGHTS_FILE)
    content = {"format_version": FORMAT_VERSION, **asdict(stored)}
    write_atomically(directory / FILE_NAME, json.dumps(content, indent=1, default=str) + "\n")
    manifest.seal(directory)


def read_corrector(directory: Path, target_sha256: str) -> StoredCorrector:
    """What its corrector.json says; `RsdError` for anything but such a directory, whole and of that target."""
    manifest.verify_made(directory, FILE_NAME, f"--corrector {directory}", "rsd train corrector")
    content = read_versioned(directory / FILE_NAME, "corrector", FORMAT_VERSION, "train it again")
    stored = from_json(StoredCorrector, content, str(directory / FILE_NAME), ignore=("format_version",))
    if stored.target_sha256 != target_sha256:
        found = "one trained on the chunks of another policy"
        raise RsdError(f"--corrector {directory}: expected one of this policy, found {found}; train one for this")
    return stored


class CorrectedPolicy:
    """A policy that decodes by `l1`, one episode of it, with a corrector of its chunks at every control step."""

    def __init__(self, policy: RsdPolicy, directory: Path, target_sha256: str) -> None:
        target = policy.model.target
        if not isinstance(target, TargetModel):
            raise RsdError("--corrector: expected a compact policy, found one on OpenVLA")
        stored = read_corrector(directory, target_sha256)
        model = ChunkCorrector(stored.config, target)
        load_weights(model, directory / WEIGHTS_FILE)
        self.policy, self.target, self.model = policy, target, model.to(policy.device).eval()
        self.image_size = policy.image_size
        self._stale: list[Stale] = []  # of the last chunks, two at most

    def reset(self, seed: int | None = None) -> None:
        self._stale = []
        self.policy.reset(seed)

    def predict(self, observation: Observation) -> ActionChunk:
        """The target's chunk as it is."""
        chunk = self.policy.predict(observation)
        with torch.inference_mode():
            seen = self.policy.core.body([observation])
            stale = stale_run(self.target, self.policy.tokenizer, seen.images, seen.state, seen.text)
        own = torch.from_numpy(chunk.actions).to(stale.chunk)[None]  # of another engine, to the last bit
        self._stale = [*self._stale[-1:], Stale(own, stale.read)]
        return chunk

    def correct(self, observation: Observation, index: int, before: bool) -> NDArray[np.float32]:
        """The action [7] of now, which is number `index` of the last chunk, or of the one before it."""
        stale = self._stale[0 if before else -1]
        with torch.inference_mode():
            seen, at = self.policy.core.body([observation]), torch.tensor([index], device=stale.chunk.device)
            state = self.target.normalise(seen.state)
            rest = rest_of(stale.chunk, at)
            motion, closing = self.model(seen.images, state, seen.text[1], stale.read, rest, at)
        if not (torch.isfinite(motion).all() and torch.isfinite(closing).all()):
            raise RsdError("--corrector: non-finite output: damaged weights or an observation far out of range")
        action = [*motion[0, 0].clamp(-1.0, 1.0).tolist(), 1.0 if closing[0, 0] > 0 else -1.0]
        return np.array(action, np.float32)
