"""The document and its plots, from the JSON files of a study and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsd.types import RsdError

FORMAT = 1
RATES = (40, 60, 80, 100, 150, 200, 250, 300, 350, 400, 450)  # bits a chunk
READING = ("<!-- reading: written by hand, kept when the rest is made anew -->", "<!-- end of reading -->")
PLOT_SIZE = (7.2, 4.6)  # inches
Point = dict[str, Any]
Curves = dict[str, list[Point]]
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
            raise RsdError(f"{path}: not valid JSON ({error}); delete it and run the method again") from None
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise RsdError(f"{path}: expected a tokenizer study of format {FORMAT}, found {found}")
        records.append(record)
    if not records:
        raise RsdError(f"{folder}: found no results; run `rsd tokenizer bench` first")
    studied = {json.dumps(record["data"], sort_keys=True) for record in records}
    if len(studied) > 1:
        raise RsdError(f"{folder}: its files were measured on different data; measure all methods on the same")
    return records


def write_report(folder: Path, document: Path) -> None:
    """folder of JSON files -> the Markdown document, and SVG plots in a folder of its name beside it."""
    records = read_records(folder)
    curves: Curves = {}
    for record in records:
        for point in record["points"]:
            curves.setdefault(point["curve"], []).append(point)
    for points in curves.values():
        points.sort(key=lambda point: point["nominal_bits"])
    document.parent.mkdir(parents=True, exist_ok=True)
    plots = document.with_suffix("")
    plots.mkdir(exist_ok=True)
    reading = kept_reading(document)
    if curves:
        coded, nominal = "bits_order_1", "nominal_bits"
        plot_curves(curves, coded, "rmse", plots / "coded.svg", "entropy-coded bits a chunk")
        plot_curves(curves, nominal, "rmse", plots / "nominal.svg", "nominal bits a chunk")
        plot_prefixes(curves, plots / "prefixes.svg")
    document.write_text("\n".join(document_lines(records, curves, plots.name, reading)) + "\n")


def kept_reading(document: Path) -> str:
    start, end = READING
    text = document.read_text() if document.is_file() else ""
    if start in text and end in text:
        return text[text.index(start) : text.index(end) + len(end)]
    return f"{start}\n{end}"


def document_lines(records: list[dict[str, Any]], curves: Curves, plots: str, reading: str) -> list[str]:
    data, machine = records[0]["data"], records[0]["machine"]
    quick = [record["method"] for record in records if record["quick"]]
    used = dict(sorted({**records[0]["versions"]}.items()))
    lines = [
        "# Action tokenizers at matched rates",
        "",
        "Made by `rsd tokenizer bench` (`--report-only` makes it anew from `results/tokenizers/*.json`).",
        "",
    ]
    if quick:
        lines += [f"**Not a result: measured with `--quick`: {', '.join(quick)}.**", ""]
    lines += [
        reading,
        "",
        "## What was measured",
        "",
        f"Demonstrations of the scripted expert, {len(data['tasks'])} tasks ({suites(data['tasks'])}): "
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
    from rsd.conventions import MAX_STEPS
    from rsd.sim.suites import suite_tasks

    holding = [suite for suite in MAX_STEPS if {task.name for task in suite_tasks(suite)} & set(tasks)]
    return ", ".join(holding) or "no suite of LIBERO"


def envelope(points: Sequence[Point], rate: str) -> tuple[np.ndarray, np.ndarray]:
    """bits, log2 rmse of the points that no cheaper point of the curve beats, by rising bits."""
    bits, errors = list[float](), list[float]()
    for point in sorted(points, key=lambda each: (each[rate], each["rmse"])):
        if not errors or point["rmse"] < errors[-1]:
            bits.append(point[rate])
            errors.append(point["rmse"])
    return np.array(bits), np.log2(np.maximum(errors, 1e-9))


def rmse_at(points: Sequence[Point], rate: str, wanted: float) -> float | None:
    """RMSE of a curve at `wanted` bits; None below its first point. Past its last it stays: bits may be left unused."""
    bits, errors = envelope(points, rate)
    if wanted < bits[0]:
        return None
    return float(2 ** np.interp(wanted, bits, errors))


def is_ours(curve: str) -> bool:
    return curve.startswith("ours")


def decodes(curve: str) -> bool:
    return curve != "LayerNorm RFSQ"  # its tokens do not decode, it has a paragraph of its own


def rate_table(curves: Curves, rate: str) -> list[str]:
    rows = {name: [rmse_at(points, rate, bits) for bits in RATES] for name, points in curves.items() if decodes(name)}
    best = [min((row[i] for row in rows.values() if row[i] is not None), default=None) for i in range(len(RATES))]  # type: ignore[type-var]

    def cell(value: float | None, lowest: float | None) -> str:
        text = "" if value is None else f"{1000 * value:.1f}"
        return f"**{text}**" if value is not None and value == lowest else text

    lines = ["| bits | " + " | ".join(map(str, RATES)) + " |", "|---|" + "---:|" * len(RATES)]
    for name in sorted(rows, key=lambda name: (not is_ours(name), name)):
        if any(value is not None for value in rows[name]):
            label = name + ("*" if "refiner" in name or "autoencoder" in name or "ResidualFSQ" in name else "")
            cells = [cell(value, lowest) for value, lowest in zip(rows[name], best, strict=True)]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def verdict(curves: Curves, rate: str) -> str:
    """At which rates the best of ours is below the best of the others, and who is below ours where it is not."""
    better, worse, open_rates = list[str](), list[str](), list[str]()
    for bits in RATES:
        found = {name: rmse_at(points, rate, bits) for name, points in curves.items() if decodes(name)}
        own = {name: value for name, value in found.items() if value is not None and is_ours(name)}
        others = {name: value for name, value in found.items() if value is not None and not is_ours(name)}
        if not own or not others:
            open_rates.append(str(bits))
            continue
        ours, rival = min(own.values()), min(others, key=lambda name: others[name])
        ratio = others[rival] / ours
        if ratio > 1:
            better.append(f"{bits} ({ratio:.2f}x)")
        else:
            worse.append(f"{bits} ({rival}: {1 / ratio:.2f}x)")
    parts = []
    if better:
        parts.append(f"Ours is lowest at {', '.join(better)} bits (in brackets: the best other's error over ours).")
    if worse:
        parts.append(f"Ours is NOT lowest at {', '.join(worse)} bits (in brackets: our error over that code's).")
    if open_rates:
        parts.append(f"Only one side has a point at {', '.join(open_rates)} bits.")
    return " ".join(parts)


def prefix_table(curves: Curves) -> list[str]:
    names = [name for name in curves if is_ours(name) and len({point["levels"] for point in curves[name]}) > 1]
    count = max((point["levels"] for name in names for point in curves[name]), default=0)
    header = " | ".join(map(str, range(1, count + 1)))
    lines = [f"| RMSE x 1000 after level | {header} |", "|---|" + "---:|" * count]
    for name in sorted(names):
        by_level = {point["levels"]: point["rmse"] for point in curves[name]}
        cells = [f"{1000 * by_level[level]:.1f}" if level in by_level else "" for level in range(1, count + 1)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def point_table(curves: Curves) -> list[str]:
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("code", lambda p: p["curve"]),
        ("setting", lambda p: p["setting"]),
        ("levels", lambda p: str(p["levels"])),
        ("tokens", lambda p: f"{p['tokens']:.1f}"),
        ("nominal", lambda p: f"{p['nominal_bits']:.0f}"),
        ("order 0", lambda p: f"{p['bits_order_0']:.1f}"),
        ("order 1", lambda p: f"{p['bits_order_1']:.1f}"),
        ("digits, order 0", digits),
        ("RMSE", lambda p: f"{p['rmse']:.4f}"),
        ("max", lambda p: f"{p['max_error']:.3f}"),
        ("RMSE mm", lambda p: f"{p['rmse_mm']:.3f}"),
        ("RMSE mrad", lambda p: f"{p['rmse_mrad']:.2f}"),
        ("max mm", lambda p: f"{p['max_mm']:.2f}"),
        ("max mrad", lambda p: f"{p['max_mrad']:.1f}"),
        ("within 1 %", lambda p: f"{100 * p['within_1_percent']:.1f} %"),
        ("utilisation", lambda p: f"{100 * p['utilisation']:.0f} %"),
        ("undecodable after one wrong token", undecodable),
    ]
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in sorted(curves, key=lambda name: (not is_ours(name), name)):
        lines += ["| " + " | ".join(show(point) for _, show in columns) + " |" for point in curves[name]]
    return lines


def digits(point: Point) -> str:
    bits = point["extra"].get("digits_order_0")
    return "" if bits is None else f"{bits:.1f}"


def undecodable(point: Point) -> str:
    share = point["extra"].get("undecodable_after_one_error")
    return "" if share is None else f"{100 * share:.0f} %"


def layer_norm_lines(curves: Curves) -> list[str]:
    found = [point for point in curves.get("LayerNorm RFSQ", []) if point["extra"]]
    if not found:
        return []
    extra = found[0]["extra"]
    return [
        "*Per-sample LayerNorm RFSQ* ("
        + found[0]["setting"]
        + f"): RMSE {extra['rmse_forward']:.4f} through its own forward pass, which knows each sample's mean and "
        f"standard deviation at every level, and {extra['rmse_decode']:.4f} from the tokens alone, with the training "
        "data's mean statistics in their place. Those statistics are not in the tokens: it is no code, and is in no "
        "comparison above.",
        "",
    ]


def time_table(times: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Microseconds per chunk, p50 (p95) of rounds in which the codes take turns.",
        "",
        "| code | batch | encode | decode | encode + decode |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in times:
        encode = f"{each['encode_p50']:.1f} ({each['encode_p95']:.1f})"
        decode = f"{each['decode_p50']:.1f} ({each['decode_p95']:.1f})"
        lines.append(f"| {each['name']} | {each['batch']} | {encode} | {decode} | {each['both_p50']:.1f} |")
    return lines


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
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rsd"  # the same data give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    return plt.subplots(figsize=PLOT_SIZE, layout="constrained")


def save_plot(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
