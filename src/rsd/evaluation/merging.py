"""Shards of one run into one results directory: nothing lost, nothing twice, nothing of another run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rsd.checks import checked, each_once
from rsd.evaluation.backend import LIBERO, Backend
from rsd.evaluation.config import stored_config
from rsd.evaluation.evaluate import ERRORS_FILE, differences, plan_episodes, run_differences, sum_up
from rsd.evaluation.results import (
    CONFIG_FILE,
    EPISODES_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    encode_record,
    read_episodes,
    read_episodes_of,
    read_run_record,
    scored,
    write_atomically,
)
from rsd.evaluation.summary import RunSummary
from rsd.evaluation.video import VIDEOS_DIR
from rsd.locks import exclusive
from rsd.output import writing
from rsd.types import RsdError

SHARD_PATTERN = "shard-*-of-*"


def merge_shards(output: Path, shards: Sequence[Path] = (), backend: Backend = LIBERO) -> RunSummary:
    """Bring the shards' episodes and videos into `output` and sum up; may be called again as shards go on.

    shards: default all `shard-i-of-n` directories in `output` that have begun. What `output` holds already is kept.
    Raises RsdError where a directory is no run or of another one, two of them hold different results of one episode,
    or none holds any. What the run still lacks is for `missing_parts` to say.
    """
    output = checked(Path, output, "merge: output")
    shards = checked(list[Path] | tuple[Path, ...], shards, "merge: shards")
    begun = (part for part in sorted(output.glob(SHARD_PATTERN)) if (part / CONFIG_FILE).exists())
    parts = list(shards) or list(begun)
    if not parts:
        raise RsdError(f"{output}: holds no {SHARD_PATTERN} with results; name the shards' directories")
    each_once("output and shards", (output, *parts))
    with exclusive(output):
        records = {part: read_run_record(part) for part in parts}
        if not shards:
            require_named(output, records)
        return merge_locked(output, records, backend)


def require_named(output: Path, records: dict[Path, RunRecord]) -> None:
    """Raises RsdError where one of the shards is not what its name says, or they are of different divisions."""
    counts = set[str]()
    for part, record in records.items():
        shard = str(record.config.get("shard", ""))
        if part.name != f"shard-{shard.replace('/', '-of-')}":
            is_of = f"--shard {shard}" if shard else "a whole run"
            raise RsdError(f"{part}: expected the shard that its name says, found {is_of}; name what to merge")
        counts.add(shard.rpartition("/")[2])
    if len(counts) > 1:
        raise RsdError(f"{output}: expected shards of one division, found of {' and of '.join(sorted(counts))}")


def missing_parts(output: Path, backend: Backend = LIBERO) -> str:
    """What a merged run lacks of its suites' tasks and states, and the shards that hold nothing; "" for a whole run."""
    try:
        plan = planned_episodes(read_run_record(output), backend)
    except RsdError as error:
        return f"what is missing cannot be told on this machine: {error}"
    done = {episode.key for episode in scored(read_episodes(output / EPISODES_FILE).values())}
    missing = [key for key in plan if key not in done]
    if not missing:
        return ""
    seen = {shard.name for shard in output.glob(SHARD_PATTERN) if (shard / EPISODES_FILE).exists()}
    counts = {int(name.rpartition("-")[2]) for name in seen if name.rpartition("-")[2].isdecimal()}
    names = [f"shard-{part}-of-{count}" for count in sorted(counts) for part in range(count)]
    absent = [name for name in names if name not in seen]
    nothing = f"; nothing is there of {', '.join(absent)}" if absent else ""
    suite, task, state = missing[0]
    first = f"the first of them {suite} task {task}, initial state {state}"
    return f"{len(missing)} of {len(plan)} episodes are missing, {first}{nothing}"


def planned_episodes(record: RunRecord, backend: Backend) -> list[EpisodeKey]:
    """Of the whole run, by its suites' tasks; raises RsdError where they are not installed."""
    config = stored_config({**record.config, "shard": ""}, CONFIG_FILE, older=True)
    return [(*job.task, job.init_state) for job in plan_episodes(config, backend)]


def merge_locked(output: Path, records: dict[Path, RunRecord], backend: Backend) -> RunSummary:
    begin, first = next(iter(records.items()))
    for shard, other in records.items():
        require_same(first, other, begin, shard)
    record = replace(first, config={**first.config, "shard": "", "output": str(output)}, planned=0)
    with contextlib.suppress(RsdError):  # `missing_parts` tells it
        record = replace(record, planned=len(planned_episodes(record, backend)))
    if (output / CONFIG_FILE).exists():
        records = {output: read_run_record(output), **records}
        require_same(records[output], record, output, begin)
    merged: dict[EpisodeKey, EpisodeResult] = {}
    for source, kept in records.items():
        for key, result in read_episodes_of(kept, source).items():
            earlier = merged.get(key)
            if earlier is None or earlier.is_error:
                merged[key] = result
            elif not result.is_error and result != earlier:
                raise RsdError(
                    f"{source}: {result.suite} task {result.task_id}, initial state {result.init_state} is there with "
                    "another result than in a directory before it; these are not parts of one run"
                )
    if not merged:
        raise RsdError(f"{output}: no episode in {', '.join(source.name for source in records)}; nothing to merge yet")
    # the order in which one uninterrupted process would have begun them
    ordered = sorted(merged.values(), key=lambda e: (e.init_state, e.suite, e.task_id))
    write_atomically(output / CONFIG_FILE, encode_record(record, indent=2) + "\n")
    write_atomically(output / EPISODES_FILE, "".join(encode_record(result) + "\n" for result in ordered))
    for source in records:
        if source != output:
            with writing(output):
                copy_rest(source, output)
    return sum_up(output, workers=0, wall_time_s=0.0)


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
