"""`runs/pages/scaling.md` from committed raw results: what speculation gains as the target grows.

    python -m studies.scaling_page

Nothing on the page but its prose is typed in by hand; the prose names no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd.evaluation.results import write_atomically
from rsd.evaluation.summary import summarize_decoding
from rsd.evaluation.tables import markdown
from rsd.reporting.tables import load_run
from rsd.types import RsdError
from studies.archive import read_json
from studies.page_tables import rule_phrase, timed_table
from studies.scaling import DECODERS, SKIPPED, ScalingRecord, SizeRecord

PROSE = """\
# Does it scale? Time per chunk against the size of the target

Made by `python -m studies.scaling_page` from the raw results named below; run it again after replacing them.

The visual drafter stays as it is while the target's trunk grows; weights are random, which changes no time.
`draft-first` is its time to the action: the draft alone, the target's pass follows while the chunk is executed (in
OpenVLA's table without preparing the images, as in that of the others).
`rsd-fused / l1` is what one corrected pass costs over one plain pass. The last columns: which share of the chunks has
to go without the target before the mean of `rsd-skip` is below `l1` at all, and how many times below it is at the share
that the shipped policy of 57 M reached in closed loop (a mean of medians; another target needs its own calibration).
Where the target runs that is the time of `rsd-fused`, whose draft works beside the target on a GPU, while `rsd-skip`
asks its draft first. What that policy reaches is in [decoding.md](decoding.md). The compact targets on a CPU ran by
PyTorch operation by operation.

Small targets on a GPU are a chain of small kernels, and their times vary from run to run: at 18 M `rsd-fused / l1` came
out anywhere between a quarter and six tenths above 1, here and with a trained policy of that size, by more than the
acceptance rule moves it. Ratios compare within one table.

Speculation stops paying where a pass of the target costs little more than the draft: there `l1` is the better choice
unless success speaks for the tokens. It pays where the trunk is deep and its weights are what a pass waits for.
"""

CLOSED_LOOP = """\
## In closed loop, on a CPU

A target of 105 M parameters trained for it and one of 18 M, on 2 cores each of one
machine, side by side, as ONNX graphs: milliseconds from the observation to the chunk over an episode of each task of
libero_spatial, drawn by EGL. `rsd-skip` is calibrated for the weights (120 and 200 random placements, `--acceptance
residual`; with the small target no threshold failed, so there only gripper switches and the limit of six in a row call
it). The means say what the tables above only compute: the larger the target, the more it is worth to leave it
idle. Few episodes: about time, not about success.
"""


@dataclass(frozen=True)
class ScalingPageConfig:
    """Write the page about the size of the target."""

    records: tuple[Path, ...] = (
        Path("results/scaling/h200.json"),
        Path("results/scaling/h200-residual.json"),
        Path("results/scaling/cpu.json"),
    )
    """Raw milliseconds of `python -m studies.scaling`."""
    closed_loop: Path = Path("results/scaling/closed-loop")
    """Folder of timed runs."""
    timed: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("105 M", "timed-104M", ("l1", "rsd-fused", "rsd-skip", "draft-first")),
        ("18 M", "timed-18M", ("l1", "rsd-skip")),
    )
    """The target, how its directories in it begin, and the decoders; the first of each is compared against."""
    openvla: Path = Path("results/openvla/h200.json")
    """Raw milliseconds of `python -m studies.openvla`, for the largest target."""
    skipping: Path = Path("results/libero_spatial_57M/h100/rsd-skip")
    """Run of `rsd-skip` whose share of chunks without the target is taken."""
    output: Path = Path("runs/pages/scaling.md")
    """The page."""


def main(config: ScalingPageConfig) -> None:
    share = 1 - summarize_decoding(load_run(config.skipping).episodes).prefills_per_chunk
    parts = [PROSE]
    for path in config.records:
        record = ScalingRecord.from_json(read_json(path))
        machine = record.machine
        where = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
        graphs = "" if machine["device"] == "cpu" else ", every decoder replayed from CUDA graphs"
        count = len(next(iter(next(iter(record.sizes.values())).milliseconds.values())))
        parts.append(
            f"## Compact targets, {where}{rule_phrase(record.config)}\n\n"
            f"`{path}`: p50 of {count} predictions each, decoders taking turns, "
            f"torch {record.versions['torch']}{graphs}.\n\n" + size_table(list(record.sizes.values()), share)
        )
    parts.append(CLOSED_LOOP)
    for size, prefix, decoders in config.timed:
        runs = [load_run(config.closed_loop / f"{prefix}-{decode}") for decode in decoders]
        versions = runs[0].record.versions
        where = f"{size}, {versions['cpu']}, torch {versions['torch']}"
        parts.append(f"### {where}\n\n" + timed_table(decoders, runs))
    content = read_json(config.openvla)
    sections = [name for name in ("graph", "compiled", "fp8") if any(row["section"] == name for row in content["rows"])]
    rows = [(f"{name}, {cameras} camera{'s' * (cameras > 1)}", openvla_size(content, name, cameras))
            for name in sections for cameras in (1, 2)]
    known = [(name, size) for name, size in rows if size is not None]
    parts.append(
        f"## OpenVLA 7B, {content['device']}\n\n`{config.openvla}`: random weights in the published format, bfloat16, "
        f"torch {content['torch']}; `l1` is OFT's chunk with its L1 head, `ar` is `rfsq-ar` (eight levels).\n\n"
        + size_table([size for _, size in known], share, [name for name, _ in known])
    )
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, "\n".join(parts))


def size_table(sizes: list[SizeRecord], share: float, names: list[str] | None = None) -> str:
    rows = []
    for size, name in zip(sizes, names or [f"{size.parameters / 1e6:.0f} M" for size in sizes], strict=True):
        l1, fused, alone = (size.p50(decoder) for decoder in ("l1", "rsd-fused", SKIPPED))
        rows.append(
            [
                name,
                *(f"{size.p50(decoder):.1f}" for decoder in (*DECODERS, SKIPPED)),
                f"{size.p50('ar') / fused:.2f}x",
                f"{fused / l1:.2f}",
                f"{l1 / alone:.1f}x",
                f"{max(0.0, (fused - l1) / (fused - alone)):.0%}" if alone < l1 else "never",
                f"{l1 / size.skipping(share):.2f}x",
            ]
        )
    header = ["target", *(f"`{decoder}` ms" for decoder in DECODERS), "`draft-first` ms", "`ar` / `rsd-fused`"]
    header += ["`rsd-fused` / `l1`", "`l1` / `draft-first`", "`rsd-skip` breaks even at"]
    header += [f"`l1` / `rsd-skip` at {share:.0%}"]
    return markdown(header, rows)


def openvla_size(content: dict[str, object], section: str, cameras: int) -> SizeRecord | None:
    """A section's medians at batch 1 as a size; None if a decoder is missing there."""
    names = {"ar": "rfsq-ar", "l1": "l1", "rsd": "rsd", "rsd-fused": "rsd-fused", SKIPPED: "light"}
    rows = content["rows"]
    if not isinstance(rows, list):
        raise RsdError(f"OpenVLA bench: expected rows, found {type(rows).__name__}")
    times = {
        row["case"]: row["p50_ms"]
        for row in rows
        if row["section"] == section and row["cameras"] == cameras and row["batch"] == 1 and row["p50_ms"]
    }
    if not set(names.values()) <= times.keys():
        return None
    return SizeRecord(7_500_000_000, 0, {}, {name: [times[case]] for name, case in names.items()})


if __name__ == "__main__":
    from studies import command  # which names this module

    command.main("scaling_page")
