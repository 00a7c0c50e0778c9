"""`rsd report`: one HTML file that holds everything about one or more runs, and the same figures for a paper.

The page needs nothing but itself: styles, figures and (unless linked) videos are inside, no script, no network.
"""

from __future__ import annotations

import base64
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from rsd.evaluation.acceptance import accepted_cell
from rsd.evaluation.config import EvalConfig, option
from rsd.evaluation.merging import merge_shards, missing_parts
from rsd.evaluation.results import EpisodeResult, write_atomically
from rsd.evaluation.summary import success_rate, summarize_decoding, summarize_tasks
from rsd.evaluation.tables import ABSENT, plural
from rsd.evaluation.video import VIDEOS_DIR, video_name
from rsd.output import refuse_to_replace, writing
from rsd.reporting import strips
from rsd.reporting.figures import FIGURES, SERIES, STAGE_COLOURS, draw_all, save, themed_svg
from rsd.reporting.tables import (
    Run,
    difference_cell,
    interval_cell,
    load_runs,
    markdown_table,
    paired,
    run_directories,
    speedup,
    table_rows,
    task_labels,
    title,
    verdict,
)
from rsd.types import RsdError

REPORT_FILE, FIGURES_DIR = "report.html", "figures"
WRITTEN_BY, MADE_BY = b"Written by rsd-vla", b"Matplotlib"  # in what an earlier report may be replaced by its mark
Videos = Literal["embed", "link", "none"]
Labels = dict[tuple[str, int], str]  # of `task_labels`
# Lighter than SERIES and STAGE_COLOURS: the same hues on a dark page.
DARK_SERIES = ("#74ace8", "#f0a05e", "#54c9a2", "#d18fdd", "#dbb649", "#ec7a90")
DARK_STAGES = (
    *("#77828e", "#8db8ee", "#4f80bd", "#eda968", "#66a8c6", "#4bbfa6", "#ad8ad6", "#d97b92", "#a3b866", "#dba3c3"),
    *("#d3bd5c", "#9ba0a9"),
)


@dataclass(frozen=True)
class Shown:
    """An episode on the page. task: its label; src: of its video, a data URI or a path relative to the page."""

    run: str
    colour: int
    task: str
    episode: EpisodeResult
    src: str = ""


def write_report(
    directories: Sequence[Path], output: Path | None = None, videos: Videos = "embed", overwrite: bool = False
) -> Path:
    """Write the page and its figures; returns the page's path.

    output: default `report.html` in the run's directory, or in the directory that all the runs share.
    videos: inside the page, linked relative to it, or left out. overwrite: replace files that are no report's.
    Raises RsdError where a directory is no run, or runs share no episode.
    """
    directories = run_directories(directories)
    runs = load_runs(directories)
    if output is None:
        shared = Path(os.path.commonpath([Path(directory).absolute() for directory in directories]))
        output = shared / REPORT_FILE
    elif output.is_dir():
        raise RsdError(f"--output {output}: expected the name of an HTML file, found a directory")
    elif output.suffix.lower() not in (".html", ".htm"):
        raise RsdError(f"--output {output}: expected a name that ends in .html; another file would be written over")
    refuse_to_replace(output, overwrite, WRITTEN_BY)
    folder = output.parent / FIGURES_DIR
    if folder.exists() and not folder.is_dir():
        raise RsdError(f"{folder}: expected a folder, or nothing yet, found a file; choose another --output")
    for name in FIGURES:
        for suffix in (".svg", ".pdf"):
            refuse_to_replace(folder / f"{name}{suffix}", overwrite, MADE_BY)
    figures = draw_all(runs)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, folder / name)
    drawings = {name: Markup(themed_svg(figure, name, FIGURES[name][0])) for name, figure in figures.items()}
    write_atomically(output, render(runs, drawings, output.parent, videos))
    return output


def render(runs: Sequence[Run], drawings: dict[str, Markup], base: Path, videos: Videos) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rsd.reporting", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["plural"] = plural
    labels = task_labels(runs)
    tasks, drawn = task_rows(runs, labels), strips.strips(runs, labels)
    failures = [shown for shown in episodes(runs, labels) if not shown.episode.success]
    failures.sort(key=lambda shown: (*shown.episode.key, shown.colour))
    return environment.get_template("report.html.jinja").render(
        title=title(runs), names=[run.name for run in runs], tiles=[tile(runs[0], run, len(runs) > 1) for run in runs],
        rows=table_rows(runs), queued=any(run.queued for run in runs),
        real_time=any("pause_ms" in episode.chunk_stats for run in runs for episode in run.episodes), figures=drawings,
        figure_titles={name: heading for name, (heading, _) in FIGURES.items()}, strips=drawn,
        many_strips=sum(len(listed) for _, listed in drawn) > strips.MOST_OPEN, unrecorded=strips.unrecorded(runs),
        legend=strips.LEGEND, strip_height=strips.HEIGHT, bar_heights=strips.BARS, tasks=tasks,
        gaps=any(e is None for task in tasks for cell in task["cells"] for _, e in cell["episodes"]),
        clips=clips(runs, labels, base, videos), failures=failures, reasons=failure_reasons(runs),
        broken=episodes([replace(run, episodes=run.broken) for run in runs], labels), provenance=provenance(runs),
        commands=[command(run) for run in runs], written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        light=palette(SERIES, STAGE_COLOURS), dark=palette(DARK_SERIES, DARK_STAGES)
    )


def palette(series: Sequence[str], stages: Sequence[str]) -> str:
    pairs = [(f"series-{i}", c) for i, c in enumerate(series)] + [(f"stage-{i}", c) for i, c in enumerate(stages)]
    return " ".join(f"--{name}: {colour};" for name, colour in pairs)


def tile(first: Run, run: Run, several: bool) -> dict[str, Any]:
    """A run in four numbers. low, high: the interval of the success rate, in percent."""
    rate, decoding = success_rate(run.episodes), summarize_decoding(run.episodes)
    total = decoding.latency_ms.get("total")
    sentence = "the others are held against this one" if several else ""
    if run is not first:
        pair = paired(first, run)
        tasks = pair.clustered_interval()
        interval = interval_cell(pair.interval() if tasks is None else tasks)
        unit = "" if tasks is None else ", tasks drawn anew"
        sentence = f"{difference_cell(pair)} against {first.name}, bootstrap {interval}{unit}: {verdict(pair)}"
        faster = speedup((first, summarize_decoding(first.episodes)), (run, decoding))
        sentence += "" if faster == ABSENT else f"; {faster} the speed per chunk"
    low, high = 100 * rate.low, 100 * rate.high
    return {
        "name": run.name,
        "success": f"{100 * rate.successes / rate.n:.1f}",
        "low": round(low, 2),
        "high": round(high, 2),
        "interval": f"{rate.successes} of {rate.n}, 95 % interval {low:.1f} to {high:.1f}",
        "latency": f"{total['p50']:.1f} ms" if total and not run.queued else "",
        "acceptance": accepted_cell(decoding),
        "sentence": sentence,
        "corrections": strips.corrections(run),
    }


def task_rows(runs: Sequence[Run], labels: Labels) -> list[dict[str, Any]]:
    """For every task its label and, run by run, the success and the outcome of each initial state, run or not."""
    summaries = [{s.task: s for s in summarize_tasks(run.episodes)} for run in runs]
    rows = []
    for task, label in sorted(labels.items()):
        cells = []
        for index, (run, by_task) in enumerate(zip(runs, summaries, strict=True)):
            if task in by_task:
                states = {e.init_state: e for e in run.episodes if e.task == task}
                episodes = [(state, states.get(state)) for state in sorted({*states, *run.planned_states})]
                cells.append({"run": run.name, "colour": index, "summary": by_task[task], "episodes": episodes})
        rows.append({"label": label, "cells": cells})
    return rows


def episodes(runs: Sequence[Run], labels: Labels) -> list[Shown]:
    return [
        Shown(run.name, colour, labels.get(e.task, str(e.task_id)), e)
        for colour, run in enumerate(runs)
        for e in run.episodes
    ]


def clips(runs: Sequence[Run], labels: Labels, base: Path, videos: Videos) -> dict[str, list[Shown]]:
    """The videos there are, failures apart from successes."""
    found: dict[str, list[Shown]] = {"failures": [], "successes": []}
    for shown in episodes(runs, labels) if videos != "none" else ():
        path = runs[shown.colour].directory / VIDEOS_DIR / video_name(shown.episode)
        if path.is_file():
            src = os.path.relpath(path.absolute(), base.absolute())
            if videos == "embed":
                src = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
            found["successes" if shown.episode.success else "failures"].append(replace(shown, src=src))
    return found


def failure_reasons(runs: Sequence[Run]) -> list[tuple[str, list[int]]]:
    """What failures look like in the simulator: (reason, count in each run), the most frequent first."""
    counts = [Counter(e.failure_detail or e.failure for e in run.episodes if not e.success) for run in runs]
    reasons = sorted({reason for count in counts for reason in count}, key=lambda r: (-sum(c[r] for c in counts), r))
    return [(reason, [count[reason] for count in counts]) for reason in reasons]


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(what, one value a run, whether the runs differ in it): options, versions, weights."""
    rows = []
    sections = [
        ("", [run.record.config for run in runs]),
        ("version of ", [run.record.versions for run in runs]),
        ("", [{k: v for k, v in run.record.policy.items() if k not in ("provenance", "policy")} for run in runs]),
    ]
    for prefix, columns in sections:
        for name in dict.fromkeys(name for column in columns for name in column):
            values = [str(column.get(name, "")) for column in columns]
            if any(values):
                rows.append((f"{prefix}{name.replace('_', ' ')}", values, len(set(values)) > 1))
    return rows


def command(run: Run) -> str:
    """The command line that makes the run again; only what differs from the defaults."""
    defaults = {entry.name: entry.default for entry in fields(EvalConfig)}
    given = {name: value for name, value in run.record.config.items() if value != defaults.get(name, value)}
    return " ".join(["rsd eval", *(f"{option(name)} {shlex.quote(str(value))}" for name, value in given.items())])


def merge_and_report(output: Path) -> str:
    """Merge the shards in `output`, write the HTML report there, and return what is missing and the table, Markdown."""
    merge_shards(output)
    write_report([output])
    return "\n\n".join(filter(None, [missing_parts(output), markdown_table(load_runs([output]))]))
