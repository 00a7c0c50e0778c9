"""The tables of the document, as lines of Markdown, from the points of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RATES = (40, 60, 80, 100, 150, 200, 250, 300, 350, 400, 450)  # bits a chunk
EXPERT = "the scripted expert"  # of files that do not say who recorded their data
Point = dict[str, Any]
Curves = dict[str, list[Point]]


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


def rate_table(curves: Curves, rate: str, rates: Sequence[int] = RATES) -> list[str]:
    rows = {name: [rmse_at(points, rate, bits) for bits in rates] for name, points in curves.items() if decodes(name)}
    best = [min((row[i] for row in rows.values() if row[i] is not None), default=None) for i in range(len(rates))]  # type: ignore[type-var]

    def cell(value: float | None, lowest: float | None) -> str:
        text = "" if value is None else f"{1000 * value:.1f}"
        return f"**{text}**" if value is not None and value == lowest else text

    lines = ["| bits | " + " | ".join(map(str, rates)) + " |", "|---|" + "---:|" * len(rates)]
    for name in sorted(rows, key=lambda name: (not is_ours(name), name)):
        if any(value is not None for value in rows[name]):
            label = name + ("*" if "refiner" in name or "autoencoder" in name or "ResidualFSQ" in name else "")
            cells = [cell(value, lowest) for value, lowest in zip(rows[name], best, strict=True)]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def verdict(curves: Curves, rate: str, rates: Sequence[int] = RATES) -> str:
    """At which rates the best of ours is below the best of the others, and who is below ours where it is not."""
    better, worse, open_rates = list[str](), list[str](), list[str]()
    for bits in rates:
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


OTHER_RATES = (60, 100, 150, 200, 300, 450)


def other_suites_lines(records: list[dict[str, Any]]) -> list[str]:
    """What the same codes do on suites that they were not fitted on, beside held-out episodes of their own."""
    data = records[0]["data"]
    sets: dict[str, list[Point]] = {"": [p for record in records for p in record["points"]]}
    for other in data["others"]:
        sets[other] = [p for record in records for p in record["others"][other]]
    lines = [
        "## On suites that no code was fitted on",
        "",
        f"Codes and entropy models fitted on {data['train_chunks']:,} chunks of the suite above, spread evenly over "
        f"its {data['train_episodes']} training episodes, and measured on whole episodes of other suites: "
        + " and ".join(
            f"{name} (by {told.get('recorded_by', EXPERT)}: {len(told['tasks'])} tasks, {told['episodes']} episodes, "
            f"{told['chunks']:,} chunks, "
            f"{100 * told['chunks_beyond_train_range']:.1f} % of them with a number beyond all that training had)"
            for name, told in data["others"].items()
        )
        + ". Normalised by the training data's range, as above. Fewer methods than above, and fewer training chunks: "
        "compare within this section (the shipped code is as it ships). Made with `--others` and `--train-chunks`.",
        "",
    ]
    for name, points in sets.items():
        curves: Curves = {}
        for point in sorted(points, key=lambda point: point["nominal_bits"]):
            curves.setdefault(point["curve"], []).append(point)
        where = name or "held-out episodes of the suite it was fitted on"
        for rate, called in (("bits_order_1", "entropy-coded bits, order 1"), ("nominal_bits", "nominal bits")):
            table = rate_table(curves, rate, OTHER_RATES)
            lines += [f"### {where}: {called}", "", *table, "", verdict(curves, rate, OTHER_RATES), ""]
    return lines
