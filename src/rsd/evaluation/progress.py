"""What the user sees while episodes run: a bar on a terminal, one line an episode in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsd.checks import last_line
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.episodes import Job
from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.tables import plural, say


class EpisodeProgress:
    """Success so far, episodes per minute, time left. Episodes with an error are counted apart."""

    def __init__(self, config: EvalConfig, finished: Iterable[EpisodeResult], pending: int, console: Console) -> None:
        done = [result for result in finished if not result.is_error]
        self._successes, self._scored, self._errors = sum(result.success for result in done), len(done), 0
        self._pending, self._new, self._start = pending, 0, time.perf_counter()
        self._console, self._label = console, f"{config.task_suite} {config.decode}"
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            self._label, total=len(done) + pending, completed=len(done), status="starting workers"
        )

    def __enter__(self) -> EpisodeProgress:
        self._bar.start()
        if not self._console.is_terminal:
            say(self._console, f"{self._label}: {plural(self._pending, 'episode')} to run, starting workers")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def retry(self, job: Job, log: str) -> None:
        """An attempt that ended in an error and will be repeated."""
        say(self._console, f"{self._label}: {job}: {last_line(log)}; begun anew")

    def advance(self, result: EpisodeResult) -> None:
        self._new += 1
        self._errors += result.is_error
        self._scored += not result.is_error
        self._successes += result.success
        per_minute = 60 * self._new / max(time.perf_counter() - self._start, 1e-9)
        status = f"{self._successes}/{self._scored} succeeded, {per_minute:.1f} a minute"
        if self._errors:
            status += f", {plural(self._errors, 'error')}"
        self._bar.update(self._task, advance=1, status=status)
        if result.is_error or not self._console.is_terminal:
            where = "task" if result.suite == self._label.split()[0] else f"{result.suite} task"
            outcome = "success" if result.success else result.failure
            place = f"{self._label} {self._new}/{self._pending}: {where} {result.task_id}, initial state"
            took = plural(result.steps, "step")
            say(self._console, f"{place} {result.init_state}: {outcome} after {took}; {status}")
