"""The numbers that are typed by hand are what the committed raw results say: README.md, docs/results/README.md,
docs/openvla.md.

New results: change the paths below. Columns of a table are found by their header, rows by their first cell; "-" stands
where there is no raw number.
"""

import json
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rsd.evaluation.decoding_page import risk_of
from rsd.evaluation.report import Run, interval_cell, load_run
from rsd.evaluation.report import paired as runs_paired
from rsd.evaluation.statistics import PairedDifference, paired_difference, percentiles
from rsd.evaluation.summary import success_rate, summarize_decoding
from rsd.policy import FOLLOW_UP

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "results" / "libero_spatial_57M"
LIBERO = ROOT / "results" / "libero_spatial"  # of the policy of 18 M
README, OPENVLA = ROOT / "README.md", ROOT / "docs" / "openvla.md"
NOTES = ROOT / "docs" / "results" / "README.md"

DECODERS = ("ar", "l1", "rsd-fused", "rsd-skip", "rsd-ahead", "light-alone")  # header of the README's table
ON_H100 = {decode: SHIPPED / "h100" / decode for decode in (*DECODERS, "draft", "rsd")}
IN_TURN = {decode: SHIPPED / "cpu" / f"timed-{decode}" for decode in DECODERS[1:5]}
# the run of rsd-skip on the H200 is by the rule of before
RUNS = {decode: LIBERO / "h200" / decode for decode in DECODERS if decode != "rsd-skip"}
ON_CPU = {decode: LIBERO / "cpu" / f"{decode}-500" for decode in DECODERS[1:]}
LATENCIES = {  # row -> file of `rsd bench latency`
    "2 CPU cores, ONNX graphs, ms p50 / p95": SHIPPED / "cpu" / "latency.json",
    "H100, compiled, CUDA graphs, ms p50 / p95": SHIPPED / "h100" / "latency-compiled.json",
    "H100, CUDA graphs, ms p50 / p95": SHIPPED / "h100" / "latency.json",
}
SUITES = ROOT / "results" / "suites"
SUITE_DECODERS = ("l1", "light-alone", "rsd-fused", "rsd-ahead")  # header of the README's second table
SUITE_ROWS = {
    "libero_object": "libero_object",
    "libero_goal": "libero_goal, 8 tasks",
    "libero_10": "libero_10, 7 tasks",
}
CLOSED_LOOP = "2 CPU cores, closed loop, mean ms to the chunk"
TIMED = {decode: LIBERO / "cpu" / f"timed-{decode}" for decode in DECODERS[1:5]}

OPENVLA_BENCH = ROOT / "results" / "openvla" / "h200.json"
OPENVLA_ROWS = {  # row -> case of `rsd bench openvla`
    "OFT chunk with the L1 head": "l1",
    "OpenVLA, seven tokens": "ar7",
    "residual tokens, ar, 8 levels": "rfsq-ar",
    "rsd, everything accepted": "rsd",
    "rsd-fused, its light draft included": "rsd-fused",
    "light: a chunk without the main": "light",
}
OPENVLA_SECTIONS = {  # column -> section
    "published way, eager": "reference",
    "eager": "eager",
    "CUDA graph": "graph",
    "compiled, graph": "compiled",
    "FP8, compiled, graph": "fp8",
}
WITH_SHARE = ("reference", "eager", "graph", "compiled")  # FP8 is not held against the bfloat16 roofline

Table = dict[str, dict[str, str]]


def flat(file: Path) -> str:
    """A page's text on one line."""
    return " ".join(file.read_text().split())


def cells(line: str) -> list[str]:
    return [re.sub(r"[*`]", "", cell).strip() for cell in line.strip().strip("|").split("|")]


def table(file: Path, columns: tuple[str, ...]) -> Table:
    """The one table of a page with these columns: row -> column -> cell, without bold and code marks."""
    lines = file.read_text().splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("|") and cells(line) == ["", *columns])
    found: Table = {}
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = cells(line)
        found[name] = dict(zip(columns, values, strict=True))
    return found


@cache
def run(directory: Path) -> Run:
    return load_run(directory)


def success(directory: Path, count: int = 500) -> str:
    rate = success_rate(run(directory).episodes)
    assert rate.n == count
    return f"{100 * rate.successes / rate.n:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def against_l1(decode: str) -> str:
    if decode == "l1":
        return "-"
    pair = pair_of(ON_H100["l1"], ON_H100[decode])
    assert pair.pairs == 500
    return f"{100 * pair.difference:+.1f} points (+{pair.only_second} -{pair.only_first}), p {pair.p_value:.2g}"


def passes(decode: str) -> str:
    decoding = summarize_decoding(run(ON_H100[decode]).episodes)
    return f"{decoding.prefills_per_chunk + decoding.main_passes_per_chunk:.2g}"


def latency(file: Path, decode: str) -> str:
    times = json.loads(file.read_text())["milliseconds"].get(decode)
    return " / ".join(f"{value:.1f}" for value in percentiles(times["total"])) if times else "-"


def mean_ms(directory: Path) -> float:
    return float(np.mean([ms for episode in run(directory).episodes for ms in episode.latency_ms["total"]]))


@pytest.mark.parametrize("decode", DECODERS)
def test_the_readmes_table(decode: str) -> None:
    found = {row: columns[decode] for row, columns in table(README, DECODERS).items()}
    assert found == {
        "success on an H100 [Wilson 95 %]": success(ON_H100[decode]),
        "against l1, paired": against_l1(decode),
        "main passes per chunk": passes(decode),
        **{row: latency(file, decode) for row, file in LATENCIES.items()},
        CLOSED_LOOP: f"{mean_ms(IN_TURN[decode]):.1f}" if decode in IN_TURN else "-",
    }


@pytest.mark.parametrize("decode", SUITE_DECODERS)
def test_the_readmes_table_of_several_suites(decode: str) -> None:
    found = {row: columns[decode] for row, columns in table(README, SUITE_DECODERS).items()}
    expected = {"together [Wilson 95 %]": success(SUITES / decode, 450)}
    for suite, row in SUITE_ROWS.items():
        own = [episode.success for episode in run(SUITES / decode).episodes if episode.suite == suite]
        expected[row] = f"{sum(own)}/{len(own)}"
    assert found == expected


def test_the_smaller_policys_speed_up_in_closed_loop() -> None:
    for decode, words in (("rsd-skip", "less than `l1` in"), ("rsd-ahead", "sooner than `l1`")):
        (said,) = re.findall(rf"\*\*([\d.]+) times\*\* {words}", flat(NOTES).split("## Earlier")[1])
        assert said == f"{mean_ms(TIMED['l1']) / mean_ms(TIMED[decode]):.2f}"


def test_how_long_the_robot_stands_still() -> None:
    text = flat(NOTES)
    ((ahead, bar, ratio, behind, count),) = re.findall(
        r"stands still for ([\d.]+) ms between chunks, with `l1` for ([\d.]+) \(p50, drawing not counted\): "
        r"([\d.]+) times.*?pass took (\d+) ms .*?none of (\d+) chunks waited",
        text,
    )
    found = {}
    for decode in ("l1", "rsd-ahead"):
        episodes = run(LIBERO / "cpu" / f"real-time-{decode}").episodes
        stats = {
            name: [value for episode in episodes for value in episode.chunk_stats.get(name, []) if value is not None]
            for name in ("pause_without_drawing_ms", "waited", "late_steps")
        }
        assert sum(stats["waited"]) == sum(stats["late_steps"]) == 0
        found[decode] = percentiles(stats["pause_without_drawing_ms"])[0], len(stats["waited"])
    follow_up = [ms for episode in episodes for ms in episode.latency_ms[FOLLOW_UP]]
    p50 = {decode: value for decode, (value, _) in found.items()}
    assert (ahead, bar) == (f"{p50['rsd-ahead']:.1f}", f"{p50['l1']:.1f}")
    assert (ratio, count) == (f"{p50['l1'] / p50['rsd-ahead']:.1f}", str(found["rsd-ahead"][1]))
    assert behind == f"{percentiles(follow_up)[0]:.0f}"


def openvla_rows() -> dict[tuple[str, str], dict[str, float]]:
    """(section, case) -> two cameras, batch 1."""
    rows = json.loads(OPENVLA_BENCH.read_text())["rows"]
    return {(row["section"], row["case"]): row for row in rows if (row["cameras"], row["batch"]) == (2, 1)}


def test_openvlas_table() -> None:
    raw, expected = openvla_rows(), dict[str, dict[str, str]]()
    for name, case in OPENVLA_ROWS.items():
        expected[name] = {}
        for column, section in OPENVLA_SECTIONS.items():
            row = raw.get((section, case))
            text = f"{row['p50_ms']:.1f}" if row else ""
            if row and row["share"] is not None and section in WITH_SHARE:
                text += f" ({100 * row['share']:.0f} %)"
            expected[name][column] = text
    assert table(OPENVLA, tuple(OPENVLA_SECTIONS)) == expected


def test_openvlas_ratios() -> None:
    ms = {case: row["p50_ms"] for (section, case), row in openvla_rows().items() if section == "graph"}
    (said,) = re.findall(r"costs ([\d.]+) times the OFT chunk and is ([\d.]+) times faster", OPENVLA.read_text())
    assert said == (f"{ms['rsd-fused'] / ms['l1']:.2f}", f"{ms['rfsq-ar'] / ms['rsd-fused']:.1f}")


def pair_of(before: Path, after: Path, suite: str = "") -> PairedDifference:
    """Over one suite, or over all."""
    first, second = (
        {key: value for key, value in run(directory).successes.items() if suite in ("", key[0])}
        for directory in (before, after)
    )
    return paired_difference(first, second)


def paired(before: Path, after: Path, suite: str) -> tuple[str, ...]:
    """What goes up, what goes down, p; over one suite."""
    found = pair_of(before, after, suite)
    return str(found.only_second), str(found.only_first), f"{found.p_value:.2g}"


def test_what_the_mains_memory_earns() -> None:
    said = re.findall(r"\+([\d.]+) points \(\+(\d+) -(\d+), p = ([\d.]+)\) on\s+the", flat(NOTES))
    for runs, (points, *rest) in zip((ON_CPU, RUNS), said, strict=True):
        pair = paired_difference(run(runs["light-alone"]).successes, run(runs["rsd-ahead"]).successes)
        assert points == f"{100 * pair.difference:.1f}"
        assert tuple(rest) == paired(runs["light-alone"], runs["rsd-ahead"], "libero_spatial")


def test_what_the_main_costs_in_libero_spatial() -> None:
    (said,) = re.findall(r"\+(\d+) -(\d+), p = ([\d.]+) on the H200\)\. What", flat(NOTES))
    assert said == paired(RUNS["light-alone"], RUNS["rsd-fused"], "libero_spatial")


def test_what_the_main_earns_in_libero_10() -> None:
    (passage,) = re.findall(r"`rsd-fused` solves 122 of 126, .*?Acting first", flat(NOTES), re.DOTALL)
    said = re.findall(r"\(\+(\d+) -(\d+),\s+p = ([\d.]+)\)", passage)
    others = ("light-alone", "rsd-ahead", "l1")
    assert said == [paired(SUITES / other, SUITES / "rsd-fused", "libero_10") for other in others]


def difference(before: Path, after: Path, suite: str = "") -> tuple[str, str]:
    """Points and p; over one suite, or over all."""
    found = pair_of(before, after, suite)
    return f"{100 * found.difference:+.1f}", f"{found.p_value:.2g}"


def times_l1(file: str, decode: str) -> str:
    times = json.loads((LIBERO / file).read_text())["milliseconds"]
    return f"{percentiles(times[decode]['total'])[0] / percentiles(times['l1']['total'])[0]:.2f}"


def solved(directory: Path) -> str:
    return str(success_rate(run(directory).episodes).successes)


def test_what_a_draft_costs_beside_l1() -> None:
    (said,) = re.findall(
        r"`rsd-fused` takes ([\d.]+) times the time of `l1` on 2 CPU cores and ([\d.]+) on an H200, `rsd` ([\d.]+) and "
        r"([\d.]+)\..*?it is ([\d.]+) and ([\d.]+) on the CPU .*?`rsd`, (\d+) of 500 on the H200 "
        r"\((-[\d.]+) points, p ([\d.e-]+)\); `rsd-fused` solves (\d+) there \((-[\d.]+), p ([\d.]+)\) and (\d+) on "
        r"the CPU \((-[\d.]+), p ([\d.]+)\)",
        flat(NOTES),
    )
    on_gpu, on_cpu, both = LIBERO / "h200", LIBERO / "cpu", ("rsd-fused", "rsd")
    pairs = (
        (on_gpu / "rsd", on_gpu / "rsd-residual"),
        (on_gpu / "rsd-fused", on_gpu / "rsd-fused-residual"),
        (on_cpu / "rsd-fused-500", on_cpu / "rsd-fused-residual-500"),
    )
    assert said == (
        *(times_l1(f"{where}/latency.json", decode) for decode in both for where in ("cpu", "h200")),
        *(times_l1("cpu/latency-residual.json", decode) for decode in both),
        *(part for margin, residual in pairs for part in (solved(residual), *difference(margin, residual))),
    )


def test_one_recipe_for_four_suites() -> None:
    four, text = SUITES / "four", flat(NOTES)
    (said,) = re.findall(
        r"`l1` solves (\d+), `rsd-fused` (\d+), `light-alone` (\d+) of 525, .*?its `rsd-fused` solves (\d+) where that "
        r"of the first solved (\d+) of the same 105 \(\+(\d+) -(\d+), p = ([\d.]+)\)",
        text,
    )
    first, second = (run(folder / "rsd-fused").successes for folder in (SUITES, four))
    both = [key for key in second if key[0] == "libero_10"]
    assert len(both) == 105
    assert said == (
        *(solved(four / decode) for decode in ("l1", "rsd-fused", "light-alone")),
        *(str(sum(one[key] for key in both)) for one in (second, first)),
        *paired(SUITES / "rsd-fused", four / "rsd-fused", "libero_10"),
    )


def test_a_larger_main() -> None:
    (said,) = re.findall(
        r"\*\*([\d.]+) times less than `l1`\*\* in the mean \(([\d.]+) against ([\d.]+) ms, (\d+) % without the main",
        flat(NOTES),
    )
    bar, skip = (ROOT / "results" / "scaling" / "closed-loop" / f"timed-104M-{name}" for name in ("l1", "rsd-skip"))
    share = 1 - summarize_decoding(run(skip).episodes).prefills_per_chunk
    ratio = f"{mean_ms(bar) / mean_ms(skip):.2f}"
    assert said == (ratio, f"{mean_ms(skip):.1f}", f"{mean_ms(bar):.1f}", f"{100 * share:.0f}")
    assert all(episode.success for name in (bar, skip) for episode in run(name).episodes)


def p50(file: Path, decode: str) -> float:
    return percentiles(json.loads(file.read_text())["milliseconds"][decode]["total"])[0]


def longest_ms(directory: Path) -> float:
    return max(ms for episode in run(directory).episodes for ms in episode.latency_ms["total"])


def test_correcting_a_draft_in_short() -> None:
    (said,) = re.findall(
        r"\*\*([\d.]+) times\*\* faster than `ar` at ([\d.]+) times the time of `l1` on an H100 \(compiled; ([\d.]+) "
        r"and ([\d.]+) by CUDA graphs alone\), ([\d.]+) and ([\d.]+) on 2 CPU cores\. It solves (\d+) of 500, "
        r"`ar` (\d+), `l1` (\d+), an uncorrected draft (\d+)",
        flat(README),
    )
    files = [SHIPPED / name for name in ("h100/latency-compiled.json", "h100/latency.json", "cpu/latency.json")]
    ratios = [(p50(f, "ar") / p50(f, "rsd-fused"), p50(f, "rsd-fused") / p50(f, "l1")) for f in files]
    assert said == (
        *(f"{ratio:.2f}" for pair in ratios for ratio in pair),
        *(solved(ON_H100[decode]) for decode in ("rsd-fused", "ar", "l1", "draft")),
    )


def test_leaving_the_main_idle_in_short() -> None:
    (said,) = re.findall(
        r"in (\d+) % of the chunks: \*\*([\d.]+) times\*\* less than `l1` in the mean on 2 CPU cores, at most (\d+) ms "
        r"where `l1` takes at most (\d+), and (\d+) of 500 solved; promised was a risk of ([\d.]+), realised ([\d.]+) "
        r"\(at most ([\d.]+) at 0\.9\)",
        flat(README),
    )
    skips = run(ON_H100["rsd-skip"])
    calibration = skips.record.policy["skip_calibration"]
    risk = risk_of(skips, calibration["epsilon_mm"], delta=0.1)
    assert said == (
        f"{100 * (1 - summarize_decoding(skips.episodes).prefills_per_chunk):.0f}",
        f"{mean_ms(IN_TURN['l1']) / mean_ms(IN_TURN['rsd-skip']):.2f}",
        *(f"{longest_ms(IN_TURN[decode]):.0f}" for decode in ("rsd-skip", "l1")),
        solved(ON_H100["rsd-skip"]),
        f"{calibration['alpha']:g}",
        f"{risk.share:.3f}",
        f"{risk.share_upper:.3f}",
    )


def test_acting_first_in_short() -> None:
    (said,) = re.findall(
        r"\*\*([\d.]+) times\*\* sooner than `l1` on 2 CPU cores, and ([\d.]+) points more often successful "
        r"\(p ([\d.]+)\)",
        flat(README),
    )
    points, p = difference(ON_H100["l1"], ON_H100["rsd-ahead"])
    assert said == (f"{mean_ms(IN_TURN['l1']) / mean_ms(IN_TURN['rsd-ahead']):.2f}", points.lstrip("+"), p)
    first, second = run(ON_H100["l1"]), run(ON_H100["rsd-ahead"])
    interval = interval_cell(runs_paired(first, second).clustered_interval()).removesuffix(" points")
    assert f"with whole tasks drawn anew the 95 % interval holds zero, {interval}" in flat(README)
    assert f"`light-alone` solves {solved(ON_H100['light-alone'])} of 500" in flat(README)


def test_two_grasps_in_short() -> None:
    (said,) = re.findall(
        r"`rsd` solves (\d+) of 150, `l1` (\d+) \(\+(\d+) -(\d+), p ([\d.]+)\), `ar` (\d+), `rsd-fused` (\d+)",
        flat(README),
    )
    runs = {decode: SHIPPED / "two_sided_late" / decode for decode in ("rsd", "l1", "ar", "rsd-fused")}
    assert all(len(run(directory).episodes) == 150 for directory in runs.values())
    assert said == (
        *(solved(runs[decode]) for decode in ("rsd", "l1")),
        *paired(runs["l1"], runs["rsd"], "libero_spatial"),
        *(solved(runs[decode]) for decode in ("ar", "rsd-fused")),
    )


def test_the_other_suites_in_short() -> None:
    (above,) = re.findall(r"In libero_10 `rsd-fused` was ([\d.]+) points above", flat(README))
    assert above == difference(SUITES / "light-alone", SUITES / "rsd-fused", "libero_10")[0].lstrip("+")


def test_perturbed_scenes() -> None:
    folder, notes = ROOT / "results" / "libero_pro", flat(NOTES)
    decoders = ("l1", "light-alone", "rsd-fused", "rsd-skip", "rsd-ahead")
    counts = ", ".join(f"`{decode}` {solved(folder / decode)}" for decode in decoders)
    assert f"{counts}, none distinguishable" in notes
    assert all(len(run(folder / decode).episodes) == 150 for decode in decoders)
    successes = [run(folder / decode).successes for decode in decoders]
    assert min(paired_difference(*pair).p_value for pair in combinations(successes, 2)) > 0.05
    skips = run(folder / "rsd-skip")
    risk = risk_of(skips, skips.record.policy["skip_calibration"]["epsilon_mm"], delta=0.1)
    for text in (notes, flat(README)):
        assert re.search(r"breaks (there, |\()([\d.]+)", text)[2] == f"{risk.share:.3f}"  # type: ignore[index]
