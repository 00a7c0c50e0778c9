"""`python -m studies.scaling`: milliseconds per chunk against the size of the target. Where does speculation pay?

The visual drafter stays the same, the target grows. Weights are random (time does not depend on them: `regress` never
takes another pass), observations are the simulator's. The decoders of a size take turns on the same observation.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from rsd.decoding.gate import SkipRule
from rsd.decoding.state import Draft, EpisodeState
from rsd.devices import cpu_model
from rsd.evaluation.backend import available_cores
from rsd.evaluation.config import asked_rule
from rsd.evaluation.latency import observations, take_turns
from rsd.evaluation.results import encode_record, write_atomically
from rsd.evaluation.statistics import percentiles
from rsd.evaluation.tables import print_table
from rsd.models.bundle import RsdModel
from rsd.models.target import TargetModel
from rsd.policy import RsdPolicy
from rsd.types import AUTO, EAGER, RsdError
from rsd.versions import versions
from studies.config import TRUNKS, ScalingConfig

FORMAT = 1
SKIPPED = "draft alone"  # `rsd-skip` at a chunk without the target
DECODERS = ("ar", "l1", "rsd", "rsd-fused")


@dataclass(frozen=True)
class SizeRecord:
    """parameters: of the target; draft_parameters: of the visual drafter; milliseconds: by decoder, totals over
    time."""

    parameters: int
    draft_parameters: int
    target: dict[str, Any]
    milliseconds: dict[str, list[float]]

    def p50(self, decoder: str) -> float:
        return percentiles(self.milliseconds[decoder])[0]

    def skipping(self, share: float) -> float:
        """Mean milliseconds if that share of the chunks goes without the target, of the medians."""
        return share * self.p50(SKIPPED) + (1 - share) * self.p50("rsd-fused")


@dataclass(frozen=True)
class ScalingRecord:
    format: int
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    sizes: dict[str, SizeRecord]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ScalingRecord:
        return cls(
            **{
                **content,
                "sizes": {
                    name: SizeRecord(**size) for name, size in content["sizes"].items()
                },
            }
        )


@dataclass(frozen=True)
class AlwaysSkipping(SkipRule):
    """The target looks once, then never again: the time of a chunk without it."""

    threshold_mm: float = sys.float_info.max
    max_skips: int = 2**62
    memory_chunks: int = 2**62

    def forces(self, draft: Draft, state: EpisodeState) -> tuple[bool, ...]:
        return tuple(not seen for seen in state.seen)


def measure_scaling(config: ScalingConfig) -> ScalingRecord:
    """Run the measurement, print the table, write the JSON."""
    torch.set_num_threads(available_cores())
    shipped = RsdPolicy.from_pretrained(config.policy, decode="l1", device=config.device, engine=EAGER)
    if shipped.model.visual_drafter is None:
        raise RsdError(
            f"{config.policy}: expected a checkpoint with a visual drafter; train one (`policy.visual_drafter`)"
        )
    seen = observations("libero_spatial", config.num_tasks, shipped)
    start, sizes = time.perf_counter(), {}
    engine = (EAGER if config.device == "cpu" else AUTO) if config.engine == "default" else config.engine
    for name in config.sizes:
        model = resized(shipped, name)
        assert isinstance(model.target, TargetModel)
        same: dict[str, Any] = {"engine": engine, "acceptance": asked_rule(config.acceptance)}
        load = partial(RsdPolicy.of, model, shipped.tokenizer, shipped.config, **same)
        policies = {decode: load(decode=decode) for decode in DECODERS}
        policies[SKIPPED] = load(decode="rsd-skip", skip=AlwaysSkipping())
        times = take_turns(policies, seen, config.warmup, config.rounds)
        totals = {decode: by_stage["total"] for decode, by_stage in times.items()}
        sizes[name] = SizeRecord(count(model.target), count(model.visual_drafter), asdict(model.target.config), totals)
    machine = {
        "cpu": cpu_model(),
        "cores": str(available_cores()),
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else "cpu",
        "wall_s": f"{time.perf_counter() - start:.1f}",
    }
    settings = {**asdict(config), "engine": policies["l1"].engine, "output": str(config.output)}
    record = ScalingRecord(FORMAT, settings, versions(), machine, sizes)
    write_atomically(config.output, encode_record(record) + "\n")
    print_scaling(Console(), record)
    print(f"results: {config.output}")
    return record


def resized(shipped: RsdPolicy, size: str) -> RsdModel:
    """The checkpoint's architecture with another trunk and random weights, on its device."""
    dim, layers, heads = TRUNKS[size]
    torch.manual_seed(0)
    target = replace(shipped.config.target, dim=dim, layers=layers, heads=heads)
    return RsdModel.of(replace(shipped.config, target=target), shipped.tokenizer).to(shipped.device).eval()


def count(module: torch.nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def print_scaling(console: Console, record: ScalingRecord) -> None:
    """p50 by size and decoder, and the two ratios."""
    header = ["target", *DECODERS, SKIPPED, "ar / rsd-fused", "rsd-fused / l1"]
    rows = []
    for size in record.sizes.values():
        milliseconds = [f"{size.p50(name):.2f}" for name in (*DECODERS, SKIPPED)]
        ratios = size.p50("ar") / size.p50("rsd-fused"), size.p50("rsd-fused") / size.p50("l1")
        rows.append([f"{size.parameters / 1e6:.0f} M", *milliseconds, *(f"{ratio:.2f}" for ratio in ratios)])
    print_table(console, f"milliseconds per chunk, p50, {record.machine['device']}", header, rows, "rows")


if __name__ == "__main__":
    from studies.command import main  # which names this module

    main("scaling")
