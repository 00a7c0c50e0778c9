"""`python -m studies.deviation`: how far every decoder's chunk is from the baseline's, on frames no decoder has learnt
from. 
Do later levels take a draft's coarse error out? Compare `coarse-only` (nothing after the coarse levels) with `rsd` and
`rsd-fused` (the target's fine levels after them), each against `ar` on the same frame.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from rsd import output
from rsd.conventions import ACTION_METRES, ACTION_RADIANS
from rsd.decoding.decoders import DECODERS, look
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import print_table
from rsd.policy import RsdPolicy
from rsd.training.dataset import FrameDataset
from rsd.training.policy import load_folders, split
from rsd.training.validation import frames_seen, remembering
from rsd.types import EAGER
from rsd.versions import versions
from studies.config import DeviationConfig

FORMAT = 1
VARIANTS = (  # decoder, acceptance, fine levels
    ("ar", "margin", "regress"),
    ("rsd", "exact", "sequential"),
    ("rsd", "margin", "sequential"),
    ("rsd", "margin", "regress"),
    ("rsd", "residual", "regress"),
    ("rsd-fused", "margin", "regress"),
    ("rsd-fused", "residual", "regress"),
    ("coarse-only", "margin", "regress"),
    ("draft-first", "margin", "regress"),
    ("l1", "margin", "regress"),
    ("parallel", "margin", "regress"),
)
UNITS = ("normalised", "mm", "degrees")


@dataclass(frozen=True)
class Row:
    """Deviation over steps of chunks, p50 / p99 / max by unit: from `ar`'s actions and from the demonstrated ones.

    normalised: largest of the six motion numbers, in [-1, 1] units; mm, degrees: length of the commanded translation's
    and of the rotation's difference."""

    decode: str
    acceptance: str
    fine: str
    from_ar: dict[str, tuple[float, float, float]]
    from_expert: dict[str, tuple[float, float, float]]
    gripper_differs_from_ar: float


@dataclass(frozen=True)
class DeviationRecord:
    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    episodes: int
    frames: int
    rows: list[Row]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DeviationRecord:
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})


@torch.inference_mode()
def measure_deviation(config: DeviationConfig) -> list[Row]:
    """Run the measurement, print the table, write the JSON."""
    shown = {}
    first = RsdPolicy.from_pretrained(config.policy, device=config.device, decode="ar", engine=EAGER)
    size = first.image_size
    _, held_out = split(load_folders(config.data, image_size=size), config.validation_every)
    dataset = FrameDataset(held_out, first.tokenizer.config.horizon, first.device, size)
    frames = torch.linspace(0, len(dataset) - 1, min(config.frames, len(dataset)), device=first.device).long()
    expert = dataset.batch(frames).chunk.float().cpu().numpy()
    for variant in VARIANTS:
        if DECODERS[variant[0]].visual and first.model.visual_drafter is None:
            continue
        decode, acceptance, fine = variant
        policy = RsdPolicy.of(
            first.model, first.tokenizer, first.config, decode=decode, acceptance=acceptance, fine=fine, engine=EAGER
        )
        progress = output.shown(frames.split(1), f"{decode}, frames", len(frames))
        shown[variant] = np.stack([actions(policy, dataset, frame) for frame in progress])
    baseline = next(iter(shown.values()))
    rows = [
        Row(*variant, spread(own, baseline), spread(own, expert), float((own != baseline)[..., -1].mean()))
        for variant, own in shown.items()
    ]
    settings = {**asdict(config), "data": [str(path) for path in config.data], "output": str(config.output)}
    record = DeviationRecord(FORMAT, settings, versions(), dataset.episodes, len(frames), rows)
    write_atomically(config.output, encode_record(record) + "\n")
    print_deviations(Console(), rows)
    print(f"results: {config.output}")
    return rows


def actions(policy: RsdPolicy, dataset: FrameDataset, frame: Tensor) -> NDArray[np.float32]:
    """The chunk [H, 7] that the policy gives at a frame [1], remembering the target's run one chunk before."""
    ops, entry = policy.core.ops, DECODERS[policy.decode]
    state = remembering(ops, entry, dataset, frame)
    result = entry.decode(ops, frames_seen(ops, dataset, frame), state)
    if result.pending and result.draft is not None:
        result = look(ops, frames_seen(ops, dataset, frame), result.draft)
    ops.check()
    chunk = policy.tokenizer.to_actions(result.value * policy.tokenizer.first_step, result.gripper)
    return chunk[0].float().cpu().numpy()


def spread(own: NDArray[np.float32], other: NDArray[np.float32]) -> dict[str, tuple[float, float, float]]:
    """Actions [N, H, 7] against others -> p50, p99 and max over all steps, by unit."""
    apart = (own - other)[..., :6].astype(np.float64)
    lengths = np.linalg.norm(apart[..., :3], axis=-1), np.linalg.norm(apart[..., 3:], axis=-1)
    by_unit = (np.abs(apart).max(-1), 1e3 * ACTION_METRES * lengths[0], np.degrees(ACTION_RADIANS * lengths[1]))
    found = {}
    for unit, values in zip(UNITS, by_unit, strict=True):
        p50, p99 = percentiles(values.ravel().tolist(), (50, 99))
        found[unit] = (round(p50, 4), round(p99, 4), round(float(values.max()), 4))
    return found


def print_deviations(console: Console, rows: list[Row]) -> None:
    header = ["decoder", "acceptance", "fine", "from ar, mm", "from ar, degrees", "from the expert, mm"]
    cells = []
    for row in rows:
        spreads = (row.from_ar["mm"], row.from_ar["degrees"], row.from_expert["mm"])
        written = (" / ".join(f"{x:.2f}" for x in spread) for spread in spreads)
        cells.append([row.decode, row.acceptance, row.fine, *written])
    print_table(console, "deviation of a step's command, p50 / p99 / max", header, cells, "rows")


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("deviation")
