"""The document and its plots, from the JSON files of a study and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from rsd.conventions import MAX_STEPS
from rsd.output import writing
from rsd.sim.suites import suite_tasks
from rsd.types import RsdError
from studies.tokenizers.tables import (
    EXPERT,
    Curves,
    is_ours,
    layer_norm_lines,
    other_suites_lines,
    point_table,
    prefix_table,
    rate_table,
    time_table,
    verdict,
)

FORMAT = 1
MADE_BY = "Made by `python -m studies.tokenizers`"
OTHERS = "suites"  # folder of the records that were measured on other suites, too
READING = ("<!-- reading: written by hand, kept when the rest is made anew -->", "<!-- end of reading -->")
PLOT_SIZE = (7.2, 4.6)  # inches
# curve -> colour and line of the plots; a curve that is not here is in the tables only
STYLE = {
    "ours, dct": ("#1f77b4", "-"),
    "ours, dct + refiner": ("#d62728", "-"),
    "ours, pca": ("#1f77b4", ":"),
    "ours, pca, budget": ("#ff7f0e", "-"),
    "FAST": ("#2ca02c", "-"),
    "RVQ 1024": ("#9467bd", "-"),
    "RVQ 256": ("#9467bd", "--"),
    "RVQ 1024 + refiner": ("#9467bd", ":"),
    "ResidualFSQ, 16 latents": ("#8c564b", "-"),
    "ResidualFSQ, 48 latents": ("#8c564b", "--"),
    "bins": ("#7f7f7f", "-"),
    "bins, min-max": ("#7f7f7f", "--"),
    "B-spline": ("#e377c2", "-"),
}


def read_records(folder: Path) -> list[dict[str, Any]]:
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise RsdError(f"{path}: not valid JSON ({error}); run the method again with --overwrite") from None
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise RsdError(f"{path}: expected a tokenizer study of format {FORMAT}, found {found}")
        records.append(record)
    if not records:
        raise RsdError(f"{folder}: found no results; run `python -m studies.tokenizers` first")
    studied = {json.dumps(record["data"], sort_keys=True) for record in records}
    if len(studied) > 1:
        raise RsdError(f"{folder}: its files were measured on different data; measure all methods on the same")
    return records


def write_report(folder: Path, document: Path) -> None:
    """folder of JSON files -> the Markdown document, and SVG plots in a folder of its name beside it."""
    elsewhere = read_records(folder / OTHERS) if (folder / OTHERS).is_dir() else []
    records = elsewhere if elsewhere and not any(folder.glob("*.json")) else read_records(folder)
    curves: Curves = {}
    for record in records:
        for point in record["points"]:
            curves.setdefault(point["curve"], []).append(point)
    for points in curves.values():
        points.sort(key=lambda point: point["nominal_bits"])
    plots = document.with_suffix("")
    with writing(plots):
        plots.mkdir(parents=True, exist_ok=True)
    reading = kept_reading(document)
    if curves:
        coded, nominal = "bits_order_1", "nominal_bits"
        plot_curves(curves, coded, "rmse", plots / "coded.svg", "entropy-coded bits a chunk")
        plot_curves(curves, nominal, "rmse", plots / "nominal.svg", "nominal bits a chunk")
        plot_prefixes(curves, plots / "prefixes.svg")
    with writing(document):
        document.write_text("\n".join(document_lines(records, elsewhere, curves, plots.name, reading)) + "\n")


def kept_reading(document: Path) -> str:
    start, end = READING
    text = document.read_text() if document.is_file() else ""
    if start in text and end in text:
        return text[text.index(start) : text.index(end) + len(end)]
    return f"{start}\n{end}"


def document_lines(
    records: list[dict[str, Any]], elsewhere: list[dict[str, Any]], curves: Curves, plots: str, reading: str
) -> list[str]:
    data, machine = records[0]["data"], records[0]["machine"]
    quick = [record["method"] for record in (*records, *elsewhere) if record["quick"]]
    used = dict(sorted({**records[0]["versions"]}.items()))
    lines = [
        "# Action tokenizers at matched rates",
        "",
        f"{MADE_BY} (`--report-only`, with `--output` and `--document`, makes it anew from "
        "`results/tokenizers/*.json`).",
        "",
    ]
    if quick:
        lines += [f"**Not a result: measured with `--quick`: {', '.join(quick)}.**", ""]
    lines += [
        reading,
        "",
        "## What was measured",
        "",
        f"Demonstrations of {' and '.join(data.get('recorded_by', [EXPERT]))}, "
        f"{len(data['tasks'])} tasks ({suites(data['tasks'])}): "
        f"{data['train_episodes']} episodes ({data['train_chunks']:,} chunks of {data['horizon']} steps) calibrate or "
        f"train every code, {data['held_out_episodes']} other episodes ({data['held_out_chunks']:,} chunks) are "
        "measured. Only the motion (6 of 7 dimensions): the gripper is a bit a step for all, in none of the rates.",
        "",
        "- *Normalised* error: the 1 % to 99 % range of a dimension in training is [-1, 1]. mm and mrad: of the "
        "controller's command for one step (action 1 = 50 mm or 0.5 rad). Every code's output is clipped to the "
        "actions' range.",
        "- *Nominal* bits: tokens times log2 of their alphabet. *Entropy-coded* bits: what two simple models, fitted "
        "on training chunks, charge for the held-out ones. Order 0: each symbol by position. Order 1: one earlier "
        "symbol as context, the one that helps most (the previous token for FAST). Of our codes a symbol is the value "
        "that a scalar's digits decode to, of ResidualFSQ the digits of a latent together.",
        "- *Within 1 %*: chunks with every number within 1 % of its dimension's range.",
        "",
    ]
    if curves:
        lines += [
            f"![Error against entropy-coded bits]({plots}/coded.svg)",
            f"![Error against nominal bits]({plots}/nominal.svg)",
            "",
            "## At matched rates",
            "",
            "Normalised RMSE x 1000, interpolated between measured points of a curve (log error, linear bits; the best "
            "points only; past its last point a curve keeps that error), empty below its first point. Bold: lowest. "
            "\\* : learned decoder.",
            "",
            "### Entropy-coded bits (order 1)",
            "",
            *rate_table(curves, "bits_order_1"),
            "",
            verdict(curves, "bits_order_1"),
            "",
            "### Entropy-coded bits (order 0)",
            "",
            *rate_table(curves, "bits_order_0"),
            "",
            verdict(curves, "bits_order_0"),
            "",
            "### Nominal bits",
            "",
            *rate_table(curves, "nominal_bits"),
            "",
            verdict(curves, "nominal_bits"),
            "",
            *(other_suites_lines(elsewhere) if elsewhere else []),
            "## Error of each prefix of levels",
            "",
            f"![Error of each prefix]({plots}/prefixes.svg)",
            "",
            *prefix_table(curves),
            "",
            "## All points",
            "",
            *point_table(curves),
            "",
            *layer_norm_lines(curves),
        ]
    times = [timing for record in records for timing in record["times"]]
    if times:
        lines += ["## Time on one core", "", *time_table(times), ""]
    lines += [
        f"Machine: {machine['cpu']}, {machine['cores']} cores (shared with other work), one thread. "
        + ", ".join(f"{name} {number}" for name, number in used.items() if number != "not installed")
        + ".",
    ]
    return lines


def suites(tasks: Sequence[str]) -> str:
    """The suites that hold the tasks, by name."""
    holding = [suite for suite in MAX_STEPS if {task.name for task in suite_tasks(suite)} & set(tasks)]
    return ", ".join(holding) or "no suite of LIBERO"


def plot_curves(curves: Curves, rate: str, error: str, path: Path, label: str) -> None:
    figure, axes = new_plot()
    for name, (colour, line) in STYLE.items():
        points = sorted(curves.get(name, []), key=lambda point: point[rate])
        if points:
            bits, errors = [point[rate] for point in points], [point[error] for point in points]
            axes.plot(bits, errors, line, color=colour, marker=".", label=name, linewidth=1.3)
    axes.set(xlabel=label, ylabel="RMSE, normalised", yscale="log", xlim=(0, 460))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_plot(figure, path)


def plot_prefixes(curves: Curves, path: Path) -> None:
    figure, axes = new_plot()
    for name in sorted(curves):
        points = sorted(curves[name], key=lambda point: point["levels"])
        if is_ours(name) and len(points) > 1 and "budget" not in name:
            levels, errors = [point["levels"] for point in points], [point["rmse"] for point in points]
            axes.plot(levels, errors, marker=".", label=name, linewidth=1.2)
    axes.set(xlabel="levels decoded", ylabel="RMSE, normalised", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    save_plot(figure, path)


def new_plot() -> tuple[Any, Any]:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rsd"  # the same data give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    return plt.subplots(figsize=PLOT_SIZE, layout="constrained")


def save_plot(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
