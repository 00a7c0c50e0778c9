"""Results on disk: `config.json` (what the run is) and `episodes.jsonl` (one flushed line an episode).

Reading is strict. A file that is cut off, of another format version, of another run or with a number that is
not finite is refused with a message that says where; the one exception is the last line of `episodes.jsonl`,
which a killed run may leave half written: it is dropped with a warning and its episode is run again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rsd.checks import Count, Said, Some, Time, checked
from rsd.chunks import longest_stage
from rsd.decoding.course import Whose
from rsd.evaluation.config import EvalConfig, planned_tasks, stored_config
from rsd.json_files import from_json, parse_object, read_object, shown
from rsd.json_files import write_atomically as write_atomically
from rsd.locks import LOCK_FILE
from rsd.output import writing
from rsd.types import RsdError

FORMAT = 1
EPISODES_FILE = "episodes.jsonl"
CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
STEP_LIMIT = "step limit"
ERROR_PREFIX = "error: "
EDITED = "it was edited, or holds another run's; put back what `rsd eval` wrote, or run it again"

Record = TypeVar("Record")
EpisodeKey = tuple[str, int, int]


@dataclass(frozen=True)
class EpisodeResult:
    """One episode: what was run, how it ended, and how its chunks were decoded.

    steps: environment steps after the wait steps. chunks: predictions made.
    failure: "" on success, "step limit", or "error: ..." for an exception of policy or simulator: such an
        episode says nothing about the policy and is counted apart.
    latency_ms: per stage and `total`, one number a chunk in the order of the chunks (ms).
    num_draft_tokens / num_accepted_tokens: per level, summed over chunks; empty without a draft (see `acceptance`).
    num_drafts: chunks that drafted. accepted_levels: accepted prefix, one number a drafted chunk.
    prefills / target_passes: passes of the target, prefills and those after them, summed over chunks.
    wall_s: reset, predictions and simulation together.
    failure_detail: what the simulator saw of a failure, such as "bowl lifted, not at the goal".
    attempts: how often it was begun; a broken-off attempt (a crash, a hang) leaves nothing else here.
    chunk_stats: further numbers of `ChunkStats`, by name, one a chunk, null where a chunk has none.
    sources: in real time and with delays, for each chunk whose each executed step was: d, a draft's; r, of the target's
        answer in a draft's place; t, the target's own, without a draft or of the answer before; h, it stood still.
    """

    suite: Said
    task_id: Count
    task_name: Said
    instruction: Said
    init_state: Count
    seed: int
    decode: Said
    acceptance: str
    success: bool
    steps: Count
    chunks: Count
    failure: str
    latency_ms: dict[str, list[Time]]
    num_drafts: Count
    num_draft_tokens: list[Count]
    num_accepted_tokens: list[Count]
    accepted_levels: list[Count]
    prefills: Count
    target_passes: Count
    wall_s: Time
    failure_detail: str = ""
    attempts: Some = 1
    chunk_stats: dict[str, list[float | None]] = field(default_factory=dict)
    sources: list[Whose] = field(default_factory=list)

    @property
    def key(self) -> EpisodeKey:
        return (self.suite, self.task_id, self.init_state)

    @property
    def task(self) -> tuple[str, int]:
        return self.suite, self.task_id

    @property
    def is_error(self) -> bool:
        return self.failure.startswith(ERROR_PREFIX)

    def check(self, where: str) -> None:
        """Raises RsdError where the numbers of the episode contradict each other."""
        levels = len(self.num_draft_tokens)
        counts = {len(v) for v in self.latency_ms.values()} | {len(v) for v in self.chunk_stats.values()}
        tokens = zip(self.num_draft_tokens, self.num_accepted_tokens, strict=False)
        stages = zip(*self.latency_ms.values(), strict=False)  # of each chunk
        ran, skipped = self.prefills or self.target_passes, self.chunk_stats.get("skipped")
        contradictions = {
            "a success with a failure reason, or a failure without one": self.success == bool(self.failure),
            f"a failure that is neither '{STEP_LIMIT}' nor '{ERROR_PREFIX}...'": not (
                self.failure in ("", STEP_LIMIT) or self.is_error
            ),
            "a success without a step or a chunk": self.success and not (self.steps and self.chunks),
            "more prefills or drafts than chunks": max(self.prefills, self.num_drafts) > self.chunks,
            "a stage of a chunk longer than its total": any(
                longest_stage(dict(zip(self.latency_ms, chunk, strict=True))) for chunk in stages
            ),
            "passes of the target in chunks that all skipped it": bool(skipped) and all(skipped or ()) and ran,
            "latencies or statistics that are not one number a chunk": counts - {self.chunks},
            "drafted and accepted tokens of different numbers of levels": levels != len(self.num_accepted_tokens),
            "more accepted than drafted tokens": any(accepted > drafted for drafted, accepted in tokens),
            "accepted levels that are not one number a drafted chunk": len(self.accepted_levels) != self.num_drafts,
            "sources of another number of steps or chunks": self.sources
            and (sum(map(len, self.sources)) != self.steps or (len(self.sources) != self.chunks and not self.is_error)),
            "more accepted levels than there are": max(self.accepted_levels, default=0) > levels,
        }
        found = [name for name, holds in contradictions.items() if holds]
        if found:
            raise RsdError(f"{where}: the record holds {found[0]}; it was not written by this program as it stands")


@dataclass(frozen=True)
class RunRecord:
    """`config.json`: the options of a run, its hash, and what the episodes were made with.

    planned: how many episodes the run has when it is whole; 0 in results of before it was recorded."""

    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    policy: dict[str, Any]
    planned: Count = 0

    def check(self, episodes: Collection[EpisodeResult], where: Path) -> None:
        """Raises RsdError where there are more episodes than planned, or one that its options do not ask for."""
        options = stored_config(self.config, f"{where / CONFIG_FILE}", older=True)
        tasks, states = planned_tasks(options.tasks), frozenset(options.states)
        for episode in episodes:
            asked = tasks.get(episode.suite, tasks.get("", [episode.task_id]))
            compared = (
                ("task_suite", episode.suite, episode.suite in options.suites),
                ("tasks", f"task {episode.task_id}", episode.task_id in asked),
                ("num_trials", f"initial state {episode.init_state}", episode.init_state in states),
                ("seed", f"seed {episode.seed}", episode.seed == options.seed),
                ("decode", episode.decode, episode.is_error or episode.decode == options.decode),
            )
            for name, found, agrees in compared:
                if name in self.config and not agrees:
                    asked_for = f"{name} {shown(self.config[name])} of {CONFIG_FILE}"
                    raise RsdError(f"{where}: expected episodes by {asked_for}, found one of {found}; {EDITED}")
        if self.planned and len(episodes) > self.planned:
            planned = f"the {self.planned} episodes planned by {CONFIG_FILE}"
            raise RsdError(f"{where}: expected {planned}, found {len(episodes)}; {EDITED}")


def decode_record(kind: type[Record], text: str | bytes, where: str) -> Record:
    """Parse one JSON object written by `encode_record`; raises RsdError naming `where` for anything else."""
    return record_of(kind, parse_object(text, where), where)


def record_of(kind: type[Record], values: dict[str, Any], where: str) -> Record:
    """A record of its JSON object; a field that was added later has a default, so that older results stay readable."""
    version = values.get("format")
    if type(version) is not int or version != FORMAT:
        raise RsdError(f"{where}: results format {shown(version)}, this program reads format {FORMAT}; run it again")
    return from_json(kind, values, where, ignore=("format",))


def encode_record(record: Any, indent: int | None = None) -> str:
    """A dataclass as JSON with its format version; raises ValueError on NaN or infinity."""
    return json.dumps({"format": FORMAT, **asdict(record)}, allow_nan=False, indent=indent)


def read_run_record(directory: Path) -> RunRecord:
    path = directory / CONFIG_FILE
    if not path.exists() and (directory / LOCK_FILE).exists():
        raise RsdError(f"{directory}: another run is beginning here, or ended too early; wait, or begin it again")
    if not path.exists():
        raise RsdError(f"{directory}: not a results directory: it has no {CONFIG_FILE}; write one with `rsd eval`")
    record = record_of(RunRecord, read_object(path, "a results directory"), str(path))
    options = stored_config(record.config, str(path), older=True)
    # of older runs, which had other options, it cannot be made again
    if record.config.keys() == {field.name for field in fields(EvalConfig)} and record.config_hash != options.hash:
        raise RsdError(f"{path}: expected the config_hash of its options, found {shown(record.config_hash)}; {EDITED}")
    return record


def append_episode(path: Path, result: EpisodeResult) -> None:
    """Append one line and force it to the disk: once this returns, a kill cannot lose the episode."""
    line = encode_record(result) + "\n"
    with writing(path), path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_episodes(path: Path) -> dict[EpisodeKey, EpisodeResult]:
    """All episodes of a run by key. A rerun supersedes an error episode; any other repetition is refused.

    Warns (UserWarning) and leaves out a last line without its newline: that line was cut off.
    Raises RsdError for every other defect.
    """
    if not checked(Path, path, "episodes").exists():
        return {}
    if not path.is_file():  # reading a pipe would wait for ever
        raise RsdError(f"{path}: expected a file, found something else")
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        warnings.warn(f"{path}: the last line is cut off and left out; `rsd eval` runs its episode again", stacklevel=2)
    episodes: dict[EpisodeKey, EpisodeResult] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        result = decode_record(EpisodeResult, line, where)
        result.check(where)
        earlier = episodes.get(result.key)
        if earlier is not None and not earlier.is_error:
            raise RsdError(f"{where}: task {result.task_id}, initial state {result.init_state} is recorded twice")
        episodes[result.key] = result
    if len(decoders := {episode.decode for episode in scored(episodes.values())}) > 1:
        raise RsdError(f"{path}: expected the episodes of one run, found some of {' and '.join(sorted(decoders))}")
    return episodes


def read_run(directory: Path) -> tuple[RunRecord, dict[EpisodeKey, EpisodeResult]]:
    """A run's record and its episodes, held against each other; raises RsdError."""
    record = read_run_record(directory)
    return record, read_episodes_of(record, directory)


def read_episodes_of(record: RunRecord, directory: Path) -> dict[EpisodeKey, EpisodeResult]:
    """A run's episodes, held against its record; raises RsdError."""
    episodes = read_episodes(directory / EPISODES_FILE)
    record.check(episodes.values(), directory)
    return episodes


def drop_cut_off_line(path: Path) -> None:
    """Take off the half-written last line of an interrupted run, so that appending starts on a new one."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def scored(episodes: Iterable[EpisodeResult]) -> list[EpisodeResult]:
    """The episodes that say something about the policy: all but the errors."""
    return [episode for episode in episodes if not episode.is_error]


def by_task(episodes: Iterable[EpisodeResult]) -> dict[tuple[str, int], list[EpisodeResult]]:
    """(suite, task number) -> its episodes, both in order."""
    tasks: dict[tuple[str, int], list[EpisodeResult]] = {}
    for episode in sorted(episodes, key=lambda episode: episode.key):
        tasks.setdefault(episode.task, []).append(episode)
    return tasks
