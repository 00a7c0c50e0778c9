"""Evaluate a policy in closed loop: plan the episodes, run the missing ones, write each down, sum up."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rsd.checks import Time, checked, last_line
from rsd.evaluation.backend import LIBERO, Backend, settle
from rsd.evaluation.config import UNHASHED_FIELDS, EvalConfig
from rsd.evaluation.episodes import Job, JobQueue
from rsd.evaluation.lerobot import EVAL_INFO_FILE, write_eval_info
from rsd.evaluation.pools import Crew, Retry, worker_count
from rsd.evaluation.progress import EpisodeProgress
from rsd.evaluation.results import (
    CONFIG_FILE,
    EPISODES_FILE,
    SUMMARY_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    append_episode,
    drop_cut_off_line,
    encode_record,
    read_run,
    read_run_record,
    write_atomically,
)
from rsd.evaluation.summary import RunSummary, summarize
from rsd.evaluation.tables import plural, say
from rsd.evaluation.video import VIDEOS_DIR
from rsd.evaluation.workers import Ready
from rsd.locks import exclusive
from rsd.output import Faults, terminal, writing
from rsd.types import RsdError

ERRORS_FILE = "errors.log"
BESIDE_A_RUN = (ERRORS_FILE, SUMMARY_FILE, EVAL_INFO_FILE, VIDEOS_DIR, "jobs")  # of one that was begun or submitted
REMEDY = "choose another --output, or --overwrite to delete it"
MAX_EQUAL_FAULTS = 5  # episodes in a row that end in the same error
# A run may go on where these differ: they name the machine, not what computes the result.
MACHINE_VERSIONS = ("platform", "cpu", "cpu_cores")


def evaluate(
    config: EvalConfig,
    *,
    overwrite: bool = False,
    backend: Backend = LIBERO,
    console: Console | None = None,
    time_limit_s: float = math.inf,
    note: str = "",
    warned: set[str] | None = None,
    crew: Crew | None = None,
) -> RunSummary:
    """Run what is missing of `config` in `config.output_dir` and return (and write) the run's summary.

    Episodes already there are kept, so the same call continues an interrupted run; episodes that ended in an
    error are run again. overwrite: start from nothing. time_limit_s: after so long no episode is begun any more.
    note: printed first. warned: cautions that were printed already; those of this run are added.
    crew: whose workers run it, by default some of its own.
    Raises RsdError where the directory holds another run or damaged results, or the policy cannot be loaded.
    """
    config, overwrite = checked(EvalConfig, config, "evaluate: config"), checked(bool, overwrite, "evaluate: overwrite")
    if time_limit_s != math.inf:
        time_limit_s = checked(Time, time_limit_s, "evaluate: time_limit_s")
    console = console or terminal(stderr=True)
    start = time.perf_counter()
    config, chosen = settle(config, backend)
    plan = plan_episodes(config, backend)
    if note or chosen:
        say(console, note or chosen)
    warned = set() if warned is None else warned
    for caution in backend.cautions(config):
        if caution not in warned:
            say(console, f"warning: {caution}", "yellow")
            warned.add(caution)
    directory = config.output_dir
    refuse_mixture(directory, bool(config.shard))
    with exclusive(directory):
        finished = open_run(config, directory, overwrite, console)
        done = {key for key, result in finished.items() if not result.is_error}
        pending = [job for job in plan if (*job.task, job.init_state) not in done]
        alone = config.control_hz and config.num_workers == "auto"  # robots on one machine would wait for each other
        workers = worker_count("1" if alone else config.num_workers, len(pending))
        if pending:
            backend.preflight(config)
            if done:
                whole = plural(len(plan), "episode")
                say(console, f"{directory}: {len(done)} of {whole} done, {len(pending)} to go")
            queue = JobQueue(pending, time.monotonic() + time_limit_s)
            run_missing(config, backend, queue, finished, workers, console, crew or Crew())
        return sum_up(directory, workers, time.perf_counter() - start)


def sum_up(directory: Path, workers: int, wall_time_s: float) -> RunSummary:
    """Write summary.json and LeRobot's eval_info.json from a directory's episodes."""
    record, by_key = read_run(directory)
    episodes = list(by_key.values())
    summary = summarize(record, episodes, workers, wall_time_s)
    write_atomically(directory / SUMMARY_FILE, encode_record(summary, indent=2) + "\n")
    write_eval_info(directory, episodes)
    return summary


def plan_episodes(config: EvalConfig, backend: Backend) -> list[Job]:
    """All episodes of a run, trial by trial; raises RsdError for an unknown suite, task or state, an empty shard."""
    jobs: list[Job] = []
    states = config.states
    order = {state: trial for trial, state in enumerate(states)}
    for suite in config.suites:
        tasks = {task_id: (name, instruction) for task_id, name, instruction in backend.list_tasks(suite)}
        for task_id in config.task_ids(suite, list(tasks)):
            available = backend.count_init_states(suite, task_id)
            if max(states) >= available:
                row = config.init_states.isdecimal()
                some = row and states[0] < available
                raise RsdError(
                    f"{f'--num-trials {config.num_trials} from ' if row else ''}--init-states {config.init_states}: "
                    f"task {task_id} of {suite} has {available} initial states, 0 to {available - 1}"
                    f"{f'; a list such as {config.init_states}-{available - 1} takes what there is' if some else ''}"
                )
            jobs.extend(Job(suite, task_id, *tasks[task_id], state) for state in states)
    jobs.sort(key=lambda job: order[job.init_state])  # stable: trial by trial, the suites' own order within
    part, parts = config.shard_of()
    if part >= len(jobs):
        raise RsdError(f"--shard {config.shard}: expected at most {plural(len(jobs), 'part')}, as there are episodes")
    return jobs[part::parts]


def open_run(config: EvalConfig, directory: Path, overwrite: bool, console: Console) -> dict[EpisodeKey, EpisodeResult]:
    """The episodes that the directory already holds of this very run, its cut-off last line taken away."""
    episodes_file = directory / EPISODES_FILE
    if overwrite:
        remove_run(directory)
    if not (directory / CONFIG_FILE).exists():
        if episodes_file.exists():
            raise RsdError(f"{directory}: {EPISODES_FILE} without {CONFIG_FILE}; {REMEDY}")
        return {}
    record = read_run_record(directory)
    if not (episodes_file.exists() and episodes_file.stat().st_size):
        return {}  # it ended before its first episode: nothing of it can be mixed in
    if record.config_hash != config.hash:
        hashed = [name for name in asdict(config) if name not in UNHASHED_FIELDS]
        changed = differences({**asdict(EvalConfig()), **record.config}, asdict(config), hashed)
        raise RsdError(f"{directory} holds another run ({changed}); {REMEDY}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, episodes = read_run(directory)
    for warning in caught:
        say(console, f"warning: {warning.message}", "yellow")
    drop_cut_off_line(episodes_file)
    return episodes


def refuse_mixture(directory: Path, shard: bool) -> None:
    """Raises RsdError where a run would lie among others, in a folder of runs or inside of one (as shards do)."""
    deep = [path for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{EPISODES_FILE}")]
    inside = sorted(str(path.parent.relative_to(directory)) for path in deep)
    if inside and not (directory / CONFIG_FILE).exists():
        found = ", ".join(inside[:5])
        raise RsdError(f"{directory} is a folder of runs ({found}): choose one of them or another --output")
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    strange = [name for name in names if not name.startswith((".", "shard-")) and name not in BESIDE_A_RUN]
    if strange and not {CONFIG_FILE, EPISODES_FILE} & {*names}:
        raise RsdError(f"{directory}: expected a run, or an empty folder, found {strange[0]}; choose another --output")
    if not shard and (directory.parent / EPISODES_FILE).exists():
        raise RsdError(f"{directory} lies in a run, {directory.parent}; choose another --output")


def remove_run(directory: Path) -> None:
    """Delete what a run writes, and nothing else that may lie in the directory.

    Raises RsdError where config.json is something else's, such as a checkpoint's.
    """
    config = directory / CONFIG_FILE
    runs_own = not config.exists() or (config.is_file() and b'"config_hash"' in config.read_bytes())
    if not (runs_own or (directory / EPISODES_FILE).exists()):
        raise RsdError(f"{directory}: its {CONFIG_FILE} is no run's, so nothing is deleted; choose another --output")
    names = (EPISODES_FILE, SUMMARY_FILE, EVAL_INFO_FILE, ERRORS_FILE, CONFIG_FILE)
    with writing(directory):
        for path in [*(directory / name for name in names), *(directory / VIDEOS_DIR).glob("*task*_init*.mp4*")]:
            path.unlink(missing_ok=True)


def differences(old: dict[str, object], new: dict[str, object], fields: Collection[str]) -> str:
    changed = [field for field in fields if old.get(field) != new.get(field)]
    return ", ".join(f"{field} {old.get(field)!r} there, {new.get(field)!r} here" for field in changed)


def run_missing(
    config: EvalConfig,
    backend: Backend,
    queue: JobQueue,
    finished: dict[EpisodeKey, EpisodeResult],
    workers: int,
    console: Console,
    crew: Crew,
) -> None:
    """Run the pending episodes in worker processes; this process alone writes the results."""
    directory = config.output_dir
    # what ends every worker's episode at once, such as a server that begins anew, lasts no longer than that
    kept = f"finished episodes are kept in {directory}; the same command without --overwrite goes on"
    faults = Faults(kept, MAX_EQUAL_FAULTS + workers - 1)
    planned = len(queue) + sum(not result.is_error for result in finished.values())
    begun = bool(finished)
    videos = len(list((directory / VIDEOS_DIR).glob("*.mp4")))
    try:
        with (
            crew.pool(config, backend, workers) as pool,
            EpisodeProgress(config, finished.values(), len(queue), console) as progress,
        ):
            for message in pool.run(queue, videos_left=config.max_videos - videos):
                if isinstance(message, Ready):
                    if not begun:
                        (directory / CONFIG_FILE).unlink(missing_ok=True)  # of one that ended before its first episode
                    begun = True
                    record_run(config, directory, message, planned)
                elif isinstance(message, Retry):
                    log_error(directory, message.job, message.log)
                    progress.retry(message.job, message.log)
                    faults.failed((*message.job.task, message.job.init_state), last_line(message.log))
                else:
                    append_episode(directory / EPISODES_FILE, message.result)
                    if message.log:
                        log_error(directory, message.job, message.log)
                    progress.advance(message.result)
                    if message.result.is_error:
                        faults.failed(message.result.key, last_line(message.log or message.result.failure))
                    else:
                        faults.worked()
    except KeyboardInterrupt:
        say(console, f"interrupted: {kept}")
        raise


def record_run(config: EvalConfig, directory: Path, ready: Ready, planned: int) -> None:
    """Write config.json, or check that this worker runs what the episodes already there were made with."""
    if not (directory / CONFIG_FILE).exists():
        record = RunRecord(asdict(config), config.hash, ready.versions, ready.policy, planned)
        write_atomically(directory / CONFIG_FILE, encode_record(record, indent=2) + "\n")
        return
    changed = run_differences(read_run_record(directory), ready.versions, ready.policy)
    if changed:
        raise RsdError(f"{directory} was begun with something else ({changed}); {REMEDY}")


def run_differences(record: RunRecord, versions: dict[str, str], policy: dict[str, Any]) -> str:
    """What sets versions and weights apart from a record's, the machine's own names left out; "" if nothing does."""
    compared = [name for name in {**record.versions, **versions} if name not in MACHINE_VERSIONS]
    found = [differences({**record.versions}, {**versions}, compared)]
    before = {**{name: policy.get(name) for name in ("execute", "drafter_gate")}, **record.policy}  # recorded later
    found.append(differences(before, policy, {**before, **policy}))
    return ", ".join(filter(None, found))


def log_error(directory: Path, job: Job, text: str) -> None:
    with writing(directory / ERRORS_FILE), (directory / ERRORS_FILE).open("a") as log:
        log.write(f"{job}\n{text}\n")
