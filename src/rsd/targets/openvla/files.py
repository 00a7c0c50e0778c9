"""The files of OpenVLA's published format: their names, and whether a directory is in it. Loads no model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsd.json_files import read_object
from rsd.types import RsdError

CONFIG_FILE, STATISTICS_FILE, ADAPTER_DIR = "config.json", "dataset_statistics.json", "lora_adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "*_checkpoint.pt", f"{ADAPTER_DIR}/*"]


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
