"""The figures of a report, drawn once with matplotlib: for the HTML page (themed SVG) and for a paper (SVG, PDF).

Every function takes the runs and returns a figure, or None where the runs have nothing to show in it. A figure is
narrow (5 inches), so that a phone shows it in full width with readable letters.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import wilson
from rsd.evaluation.summary import pooled, summarize_decoding
from rsd.output import shown
from rsd.reporting.tables import Run, task_labels

WIDTH = 5.0  # inches
INK, MUTED, LINE = "#1d232b", "#68727f", "#dde2e8"
# One hue a run, told apart by the colour-blind too; the page has a lighter set of them for dark screens.
SERIES = ("#2f6db5", "#d9772b", "#2a9d78", "#a552b3", "#b3870a", "#c8415d")
# One hue a stage of the policy, in the order in which they happen; a stage has the same one in every report.
AFTER = "verify-pending"  # while the chunk is executed: in no `total`
STAGES = (
    *("preprocess", "vision", "prefill", "draft", "target", "verify", "decode", "wait", "network", "queue", AFTER),
)
STAGE_COLOURS = (
    *("#9aa5b1", "#5b8fd0", "#31588f", "#e2954b", "#3d7f9e", "#2c9c85", "#8d64b8", "#bb5c74", "#7a8f3c", "#c27ba0"),
    *("#b9a13b", "#8a8f99"),
)
BINS = 10  # an episode's time, in tenths
STYLE: Any = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",  # letters stay letters: small, searchable, in the page's own font
    "pdf.fonttype": 42,
    "legend.frameon": False,
}


def series_colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def stage_colour(stage: str) -> str:
    """By the stage's name alone; those nobody knows share the last one."""
    return STAGE_COLOURS[STAGES.index(stage)] if stage in STAGES else STAGE_COLOURS[-1]


def success_figure(runs: Sequence[Run]) -> Figure | None:
    """Success of every task with its Wilson interval, one mark a run."""
    tasks = sorted({e.task for run in runs for e in run.episodes})
    names = task_labels(runs)
    pitch = 0.20 * len(runs) + 0.30
    figure, axes = new_figure(pitch * len(tasks) + 0.75)
    for row, task in enumerate(tasks):
        axes.text(0, row - 0.5 + 0.16 / pitch, names[task], fontsize=8, va="center", color=INK)
        for index, run in enumerate(runs):
            outcomes = [e.success for e in run.episodes if e.task == task]
            if not outcomes:
                continue
            low, high = wilson(sum(outcomes), len(outcomes))
            y = row - 0.5 + (0.36 + 0.20 * index) / pitch
            colour = series_colour(index)
            axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.45, solid_capstyle="round")
            axes.plot(sum(outcomes) / len(outcomes), y, "o", color=colour, markersize=5.5)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(-0.012, 1.012)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    rows_of(axes, "success, Wilson 95 % interval")
    run_legend(figure, axes, runs)
    return figure


def latency_figure(runs: Sequence[Run]) -> Figure | None:
    """Where the time of a chunk goes: mean milliseconds by stage, stacked."""
    by_run = [stage_samples(run) for run in runs]
    stages = [stage for stage in ordered_stages(by_run) if stage != AFTER]
    if not stages:
        return None
    figure, axes = new_figure(0.42 * len(runs) + 1.25)
    for row, samples in enumerate(by_run):
        left = 0.0
        for stage in stages:
            mean = float(np.mean(samples[stage])) if samples.get(stage) else 0.0
            axes.barh(row, mean, left=left, height=0.62, color=stage_colour(stage))
            left += mean
        said = f"not shown: {runs[row].queued}" if runs[row].queued else f"{left:.1f} ms"
        axes.text(left, row, f" {said}", va="center", color=INK)
    for stage in stages:
        axes.barh(0, 0, color=stage_colour(stage), label=stage)
    axes.set_yticks(range(len(runs)), [run.name for run in runs], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    rows_of(axes, "mean milliseconds per chunk")
    legend(figure, axes, columns=4)
    return figure


def spread_figure(runs: Sequence[Run]) -> Figure | None:
    """The distribution of each stage: p5 to p95 as a thin line, the middle half thick, the median a mark."""
    by_run = [stage_samples(run) for run in runs]
    stages = [*ordered_stages(by_run), "total"]
    if len(stages) == 1:
        return None
    figure, axes = new_figure((0.17 * len(runs) + 0.16) * len(stages) + 0.9)
    for row, stage in enumerate(stages):
        for index, samples in enumerate(by_run):
            values = samples.get(stage)
            if not values:
                continue
            p5, p25, p50, p75, p95 = np.percentile(values, [5, 25, 50, 75, 95])
            y = row + (index - (len(runs) - 1) / 2) * 0.8 / (len(runs) + 0.4)
            colour = series_colour(index)
            axes.plot([p5, p95], [y, y], color=colour, linewidth=1.4, alpha=0.6, solid_capstyle="round")
            axes.plot([p25, p75], [y, y], color=colour, linewidth=4.2, alpha=0.45, solid_capstyle="round")
            axes.plot(p50, y, "o", color=colour, markersize=4.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(stages)), stages, color=INK)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    rows_of(axes, "milliseconds per chunk, logarithmic")
    run_legend(figure, axes, runs)
    return figure


def level_figure(runs: Sequence[Run]) -> Figure | None:
    """Share of the drafts that stand down to each level; not of rules that know only whole chunks."""
    found = {index: summarize_decoding(run.episodes).acceptance_per_level for index, run in enumerate(runs)}
    rates = {index: values for index, values in found.items() if values}
    if not rates:
        return None
    figure, axes = new_figure(2.5)
    width = min(0.8 / len(rates), 0.5)
    for slot, (index, values) in enumerate(rates.items()):
        x = np.arange(1, len(values) + 1) + (slot - (len(rates) - 1) / 2) * width
        axes.bar(x, values, width=width * 0.88, color=series_colour(index))
        for position, value in zip(x, values, strict=True):
            axes.text(position, value + 0.015, f"{100 * value:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(1, max(map(len, rates.values())) + 1))
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("drafted level, coarse to fine")
    axes.set_ylabel("drafts accepted")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if len(runs) > 1:
        run_legend(figure, axes, [runs[index] for index in rates], list(rates))
    return figure


def time_figure(runs: Sequence[Run]) -> Figure | None:
    """Accepted levels over the episode's time, in tenths of it: successes as a line, failures dashed."""
    figure, axes = new_figure(2.7)
    levels, shown = 0, []
    for index, run in enumerate(runs):
        drafted = [e for e in run.episodes if e.accepted_levels]
        if not drafted:
            continue
        shown.append(index)
        levels = max(levels, *(len(e.num_draft_tokens) for e in drafted))
        for success, line in ((True, "-"), (False, (0, (3, 2)))):
            middle = accepted_over_time([e for e in drafted if e.success == success])
            if middle is not None:
                axes.plot((np.arange(BINS) + 0.5) / BINS, middle, color=series_colour(index), linestyle=line)
    if not shown:
        return None
    for line, label in (("-", "successes"), ((0, (3, 2)), "failures")):
        axes.plot([], [], color=MUTED, linestyle=line, label=label)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, levels * 1.04)
    axes.set_yticks(range(levels + 1))
    axes.set_xlabel("time in the episode")
    axes.set_ylabel("levels accepted, mean")
    axes.grid(axis="y")
    run_legend(figure, axes, [runs[index] for index in shown], shown)
    return figure


def accepted_over_time(episodes: Sequence[EpisodeResult]) -> np.ndarray | None:
    """Mean accepted levels in each tenth of the episodes' drafted chunks; tenths without one are interpolated."""
    places = [(i + 0.5) / len(e.accepted_levels) for e in episodes for i in range(len(e.accepted_levels))]
    values = [accepted for e in episodes for accepted in e.accepted_levels]
    if not values:
        return None
    bins = np.minimum((np.asarray(places) * BINS).astype(int), BINS - 1)
    total, count = np.bincount(bins, values, BINS), np.bincount(bins, minlength=BINS)
    present = np.flatnonzero(count)
    return np.interp(np.arange(BINS), present, total[present] / count[present])


FIGURES: dict[str, tuple[str, Callable[[Sequence[Run]], Figure | None]]] = {
    "success": ("Success per task", success_figure),
    "latency": ("Where the time of a chunk goes", latency_figure),
    "latency_spread": ("Latency by stage", spread_figure),
    "acceptance_level": ("Acceptance by level", level_figure),
    "acceptance_time": ("Acceptance over the episode", time_figure),
}


def draw_all(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure that these runs have something for."""
    with mpl.rc_context(STYLE):
        figures = shown(FIGURES.items(), "figures drawn", len(FIGURES))
        drawn = {name: draw(runs) for name, (_, draw) in figures}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """As SVG and PDF beside each other, without a date: the same results give the same files."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        for suffix, dated, transparent in ((".svg", "Date", True), (".pdf", "CreationDate", None)):
            whole, temporary = path.with_suffix(suffix), path.with_name(f".{path.stem}{suffix}")
            figure.savefig(temporary, metadata={dated: None}, transparent=transparent, bbox_inches="tight")
            temporary.replace(whole)  # itself, if it is a link, and not what it leads to


def themed_svg(figure: Figure, name: str, title: str) -> str:
    """SVG to put into a page: its colours are the page's variables, its letters the page's font."""
    file = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would style the whole page
    # ids are unique within a figure only
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" ', r'<svg \1style="max-width: calc(\2px * 1.5)" ', text, count=1)
    text = re.sub(r'height="[\d.]+pt" ', "", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]+", r"font: \1 var(--font)", text)
    variables = {INK: "ink", MUTED: "muted", LINE: "line", "#000000": "ink"}
    variables.update({colour: f"series-{i}" for i, colour in enumerate(SERIES)})
    variables.update({colour: f"stage-{i}" for i, colour in enumerate(STAGE_COLOURS)})
    for colour, variable in variables.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def stage_samples(run: Run) -> dict[str, list[float]]:
    """Stage -> milliseconds of every chunk of the run; empty where they hold waiting for others."""
    return {} if run.queued else pooled(episode.latency_ms for episode in run.episodes)


def ordered_stages(by_run: Sequence[dict[str, list[float]]]) -> list[str]:
    """The stages that any run has, in the order of the computation; unknown ones last, `total` never."""
    found = dict.fromkeys(stage for samples in by_run for stage in samples if stage != "total")
    return [stage for stage in STAGES if stage in found] + [stage for stage in found if stage not in STAGES]


def new_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def rows_of(axes: Axes, label: str) -> None:
    """Something in each row; its amount to the right."""
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def run_legend(figure: Figure, axes: Axes, runs: Sequence[Run], colours: Sequence[int] | None = None) -> None:
    for index, run in zip(colours or range(len(runs)), runs, strict=True):
        axes.plot([], [], "o", color=series_colour(index), label=run.name, markersize=5.5)
    legend(figure, axes, columns=3)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Above the axes, from the left edge of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.3)
