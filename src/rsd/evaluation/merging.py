"""Shards of one run into one results directory: nothing lost, nothing twice, nothing of another run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rsd.evaluation.config import stored_config
from rsd.evaluation.evaluate import ERRORS_FILE, differences, run_differences, sum_up
from rsd.evaluation.results import (
    CONFIG_FILE,
    EPISODES_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    encode_record,
    read_episodes,
    read_run_record,
    write_atomically,
)
from rsd.evaluation.summary import RunSummary
from rsd.evaluation.video import VIDEOS_DIR
from rsd.types import RsdError

SHARD_PATTERN = "shard-*-of-*"


def merge_shards(output: Path, shards: Sequence[Path] = ()) -> RunSummary:
    """Bring the shards' episodes and videos into `output` and sum up; may be called again as shards go on.

    shards: default all `shard-i-of-n` directories in `output`. What `output` holds already is kept.
    Raises RsdError where a directory is no run or of another one, or two of them hold different results of one
    episode.
    """
    shards = list(shards) or sorted(output.glob(SHARD_PATTERN))
    if not shards:
        raise RsdError(f"{output}: holds no {SHARD_PATTERN}; name the shards' directories")
    records = [read_run_record(shard) for shard in shards]
    record = merged_record(output, shards, records)
    sources = [shard for shard in shards if shard.resolve() != output.resolve()]
    if (output / CONFIG_FILE).exists():
        existing = read_run_record(output)
        require_same(existing, record, output, shards[0])
        sources.insert(0, output)
    merged: dict[EpisodeKey, EpisodeResult] = {}
    for source in sources:
        for key, result in read_episodes(source / EPISODES_FILE).items():
            earlier = merged.get(key)
            if earlier is None or earlier.is_error:
                merged[key] = result
            elif not result.is_error and result != earlier:
                raise RsdError(
                    f"{source}: {result.suite} task {result.task_id}, initial state {result.init_state} is there with "
                    "another result than in a directory before it; these are not parts of one run"
                )
    output.mkdir(parents=True, exist_ok=True)
    # the order in which one uninterrupted process would have begun them
    ordered = sorted(merged.values(), key=lambda e: (e.init_state, e.suite, e.task_id))
    write_atomically(output / CONFIG_FILE, encode_record(record, indent=2) + "\n")
    write_atomically(output / EPISODES_FILE, "".join(encode_record(result) + "\n" for result in ordered))
    for source in sources:
        if source != output:
            copy_rest(source, output)
    return sum_up(output, workers=0, wall_time_s=0.0)


def merged_record(output: Path, shards: Sequence[Path], records: Sequence[RunRecord]) -> RunRecord:
    for shard, record in zip(shards[1:], records[1:], strict=True):
        require_same(records[0], record, shards[0], shard)
    return replace(records[0], config={**records[0].config, "shard": "", "output": str(output)})


def require_same(first: RunRecord, other: RunRecord, where: Path, there: Path) -> None:
    changed = run_differences(first, other.versions, other.policy)
    if first.config_hash != other.config_hash:
        identity = stored_config(first.config, str(where)).identity
        changed = differences(first.config, other.config, identity) or "another configuration"
    if changed:
        raise RsdError(f"{there} is no part of the run in {where}: {changed}")


def copy_rest(source: Path, output: Path) -> None:
    """Videos, which have a name of their own each, and the log of errors."""
    for video in sorted((source / VIDEOS_DIR).glob("*.mp4")):
        (output / VIDEOS_DIR).mkdir(exist_ok=True)
        if not (output / VIDEOS_DIR / video.name).exists():
            shutil.copy2(video, output / VIDEOS_DIR / video.name)
    log = source / ERRORS_FILE
    if log.is_file():
        text = log.read_text()
        target = output / ERRORS_FILE
        if not target.is_file() or text not in target.read_text():
            with target.open("a") as file:
                file.write(text)
