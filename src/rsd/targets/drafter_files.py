"""The directory of a distilled drafter: `drafter.json`, weights, tokenizer and manifest; it names its target."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rsd import manifest
from rsd.checkpoint import finite_halves, load_weights
from rsd.checks import Checked, Millimetres, Share, above
from rsd.decoding.calibration import SkipCalibration
from rsd.json_files import from_json, read_versioned, write_atomically
from rsd.manifest import file_sha256
from rsd.models.bundle import code_sizes
from rsd.models.config import StandaloneDrafterConfig
from rsd.models.standalone_drafter import StandaloneDrafter
from rsd.pt_files import save_tensors
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.types import MAX_SKIPS, Chunks, RsdError

FILE_NAME, WEIGHTS_FILE, FORMAT_VERSION = "drafter.json", "model.safetensors", 1
ELSEWHERE = ("policy", "engine", "server", "provenance")  # of an identity: where a target is, not what it is


@dataclass(frozen=True)
class SelfDeviation(Checked):
    """How far a target is from itself where it is asked twice of the same observation, mm: 0 of a deterministic one.

    gripper: share of the pairs whose gripper symbols differ."""

    pairs: int = 0
    p50_mm: Millimetres = 0.0
    p90_mm: Millimetres = 0.0
    gripper: Share = 0.0


@dataclass(frozen=True)
class StoredDrafter(Checked):
    """drafter.json. target: identity of what it was distilled from. epsilon_mm: beyond it a draft deviates from the
    target's chunk, and does not stand; calibration: of the gate, None where there were too few episodes."""

    config: StandaloneDrafterConfig
    target: dict[str, Any]
    epsilon_mm: Annotated[float, above(0, 1e6)]
    self_deviation: SelfDeviation = field(default_factory=SelfDeviation)
    max_skips: Chunks = MAX_SKIPS
    calibration: SkipCalibration | None = None
    uncalibrated: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_atomically(directory / FILE_NAME, json.dumps(content, indent=1, default=str) + "\n")
        manifest.seal(directory)


def read_drafter(directory: Path) -> StoredDrafter:
    """What its drafter.json says; `RsdError` for anything but such a directory, whole and unchanged."""
    manifest.verify_made(directory, FILE_NAME, f"drafter {directory}", "rsd drafter distil")
    content = read_versioned(directory / FILE_NAME, "drafter", FORMAT_VERSION, "distil it again")
    stored = from_json(StoredDrafter, content, str(directory / FILE_NAME), ignore=("format_version",))
    if stored.calibration is not None:
        stored.calibration.check_belongs(file_sha256(directory / WEIGHTS_FILE))
    return stored


def load_models(directory: Path, stored: StoredDrafter) -> tuple[StandaloneDrafter, ActionTokenizer]:
    """The drafter, on the CPU, and its tokenizer."""
    tokenizer = ActionTokenizer.load(directory)
    model = StandaloneDrafter(stored.config, *code_sizes(tokenizer))
    load_weights(model, directory / WEIGHTS_FILE)
    return model.eval(), tokenizer


def save_models(model: StandaloneDrafter, tokenizer: ActionTokenizer, stored: StoredDrafter, directory: Path) -> None:
    """Write the whole directory: fp16 weights."""
    save_tensors(finite_halves(model, directory), directory / WEIGHTS_FILE)
    tokenizer.save(directory)
    stored.save(directory)


def nameless(drafter: str, policy: str) -> list[str]:
    """A sentence where a drafter's target, a server, does not say what it is: any such server passes for it."""
    if any(value for name, value in read_drafter(Path(drafter)).target.items() if name not in ELSEWHERE):
        return []
    return [f"{policy}: its metadata are empty, so a drafter distilled for another such server is taken for its own"]


def check_belongs(stored: StoredDrafter, target: dict[str, Any], where: str) -> None:
    """`RsdError` unless the drafter was distilled from this very target, wherever it is now."""
    own, found = ({k: v for k, v in each.items() if k not in ELSEWHERE} for each in (stored.target, target))
    own, found = (json.loads(json.dumps(each, default=str)) for each in (own, found))
    if own != found:
        changed = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        name = changed[0]
        apart = f"{name} {own.get(name)!s:.60} there, {found.get(name)!s:.60} here"
        raise RsdError(f"{where}: distilled from another target ({apart}); distil one for this target")
