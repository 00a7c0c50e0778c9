"""A checkpoint in OpenVLA's published format: its files, finding it, telling it from others, what it does not say.

No model and no image code in here: every evaluation asks whether its policy is one of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rsd import hub
from rsd.checkpoint import locate_checkpoint
from rsd.checks import between
from rsd.conventions import CHUNK_SIZE
from rsd.json_files import from_json, read_object
from rsd.types import RsdError

CONFIG_FILE, STATISTICS_FILE, ADAPTER_DIR = "config.json", "dataset_statistics.json", "lora_adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "*_checkpoint.pt", f"{ADAPTER_DIR}/*"]
DECODERS = ("ar", "l1", "discrete")
CHUNKS = {"libero": CHUNK_SIZE, "bridge": 5, "aloha": 25}  # by what the data set's name has in it
SETTINGS_FILE = "rsd_openvla.json"


def read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "an OpenVLA directory")


def is_openvla(directory: Path) -> bool:
    """Whether a checkpoint directory is in OpenVLA's format: its config.json says so, or it is a LoRA run's."""
    path = directory / CONFIG_FILE
    if path.is_file():
        return read_json(path).get("model_type") == "openvla"
    return (directory / ADAPTER_DIR / ADAPTER_CONFIG).is_file()


def component_file(directory: Path, name: str) -> Path | None:
    """`action_head--150000_checkpoint.pt` and the like; None where there is none, an error where there are several."""
    found = sorted(directory.glob(f"{name}--*checkpoint.pt"))
    if len(found) > 1:
        raise RsdError(f"{directory}: expected one {name} file, found {[path.name for path in found]}; keep one")
    return found[0] if found else None


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's own files do not say. None: as the files suggest, see `resolve`."""

    decode: str | None = None
    """ar (OpenVLA's 7 tokens, one action), l1 or discrete (OpenVLA-OFT, a chunk of 8)."""
    cameras: int | None = None
    """1: third person; 2: and the wrist."""
    unnorm_key: str | None = None
    """Data set in dataset_statistics.json."""
    chunk: Annotated[int, between(1, 100)] | None = None
    """Steps that OFT predicts at once: 8 of LIBERO's data sets, 5 of Bridge's; 1 with ar."""
    center_crop: bool = True
    """Whether training cropped images at random, as all published fine-tunes did."""

    @classmethod
    def load(cls, directory: Path) -> Settings:
        path = directory / SETTINGS_FILE
        return from_json(cls, read_json(path), str(path)) if path.exists() else cls()

    def resolve(self, directory: Path) -> Settings:
        """Decoder and cameras settled; `RsdError` where the files contradict them or do not say."""
        head, proprio = (component_file(directory, name) for name in ("action_head", "proprio_projector"))
        decode = self.decode or ("l1" if head else "ar")
        if decode not in DECODERS:
            raise RsdError(f"decode {decode!r}: expected one of {', '.join(DECODERS)} for an OpenVLA checkpoint")
        if (decode == "l1") != (head is not None):
            found = f"holds {head.name}" if head else "has no action_head--*_checkpoint.pt"
            fitting = "l1" if head else "ar (OpenVLA) or discrete (OpenVLA-OFT with tokens)"
            raise RsdError(f"decode {decode}: {directory} {found}; it decodes with {fitting}")
        if proprio and not head:
            raise RsdError(f"{directory}: holds {proprio.name} but no action head; expected both, or neither")
        cameras = self.cameras or (2 if proprio else None if decode == "l1" else 1)
        if cameras not in (1, 2):
            raise RsdError(
                f"{directory}: cameras: expected 1 or 2, found {cameras}; the checkpoint does not say how many it was "
                f'trained with: write {{"cameras": 1}} or {{"cameras": 2}} into {directory / SETTINGS_FILE}'
            )
        chunk = 1 if decode == "ar" else self.chunk or chunk_of(directory, self.unnorm_key)
        return replace(self, decode=decode, cameras=cameras, chunk=chunk)


def chunk_of(directory: Path, unnorm_key: str | None) -> int:
    """Steps that OFT predicts at once, which its files do not say: its constants go by the robot, that is by the name
    of the data set; `RsdError` where none of them is known."""
    path = directory / STATISTICS_FILE
    tables = read_json(path) if path.is_file() else read_json(directory / CONFIG_FILE).get("norm_stats") or {}
    names = [unnorm_key] if unnorm_key else sorted(map(str, tables))
    known = {steps for name in names for robot, steps in CHUNKS.items() if robot in name}
    if len(known) == 1:
        return known.pop()
    raise RsdError(
        f"{directory}: how many steps does it predict at once? its files do not say, nor do the names of its data "
        f'sets, {", ".join(names)[:200]}: write {{"chunk": 8}}, say, into {directory / SETTINGS_FILE}'
    )


def locate_openvla(path_or_hub_id: str | Path) -> Path | None:
    """The local directory, all its files there, if the checkpoint is in OpenVLA's format, else None."""
    directory = locate_checkpoint(path_or_hub_id)
    if not is_openvla(directory):
        return None
    if hub.local(path_or_hub_id) is not None:
        return directory
    return hub.download(str(path_or_hub_id), "policy", HUB_FILES)


def locate_under(directory: Path, base: str | Path | None = None) -> Path | None:
    """The model under the adapter of a directory without merged weights; None where there are some."""
    if list(directory.glob("model*.safetensors")):
        if base is not None:
            raise RsdError(f"{directory}: holds merged weights; its adapter must not be added again, leave base out")
        return None
    adapter = directory / ADAPTER_DIR / ADAPTER_CONFIG
    name = base or (read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else None)
    if not name:
        return None
    located = locate_openvla(name)
    if located is None:
        raise RsdError(f"{name}: the adapter's base model is not in OpenVLA's format")
    return located


def fingerprint(directory: Path, patterns: Sequence[str] = (*HUB_FILES, SETTINGS_FILE)) -> str:
    """SHA-256 over names, sizes, small files, and the first, middle and last MiB of the large ones.

    Whole hashes of 15 GB take minutes in every worker; two trainings differ in every tensor."""
    digest, block = hashlib.sha256(), 1 << 20
    paths = [p for pattern in patterns for p in directory.glob(pattern) if p.is_file()]
    for path in sorted(set(paths)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(size // 2 - block, 0), max(size - block, 0)}):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()
