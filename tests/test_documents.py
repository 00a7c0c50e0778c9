"""The tables of docs/results.md hold what the summaries beside the raw results say."""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.statistics import percentiles
from rsd.reporting.tables import load_run
from studies import delay_page, permuted_suites_page
from studies.page_tables import latency_record
from studies.permuted_page import ROWS, permuted_table

ROOT = Path(__file__).resolve().parent.parent
# document, its section, the column of successes, the summary of the raw results, and the folder of the runs there
TABLES = {
    "stock": ("docs/results.md", "Stock libero_spatial", "success [Wilson 95 %]", "libero_spatial_57M", "h100/"),
}

BOTH = ("permuted_suites/A", "permuted_suites/B")
AFTER = ("permuted_dagger/after", "permuted_dagger/after_more")
MEMBERS = {  # of the first mean, and what they were run on
    "before": ("one_policy/permuted", "two_trainings/first", "two_trainings/second"),
}


def rows(document: str, section: str) -> list[dict[str, str]]:
    """The rows of a section's first table by its header; the first column is `decoder`, without notes."""
    text = (ROOT / document).read_text()
    body = re.split(rf"^## {re.escape(section)}.*$", text, flags=re.MULTILINE)[1]
    table = re.search(r"^\|.*?(?=^[^|])", body, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *lines = (
        [cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table[0].strip().splitlines()
    )
    found = [dict(zip(["decoder", *header[1:]], cells, strict=True)) for cells in lines]
    return [{**row, "decoder": row["decoder"].split("`")[1]} for row in found]


def summary(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())["runs"]
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_successes_is_that_of_the_raw_results(name: str) -> None:
    document, section, column, raw, folder = TABLES[name]
    runs, table = summary(raw), rows(document, section)
    assert len(table) >= 4
    for row in table:
        success = runs[folder + row["decoder"]]["success"]
        share = 100 * success["successes"] / success["n"]
        interval = f"{share:.1f} % [{100 * success['low']:.1f}, {100 * success['high']:.1f}]"
        assert interval in row[column], (row, interval)
        if counted := re.match(r"(\d+)(?:/(\d+))? =", row[column]):
            assert (int(counted[1]), int(counted[2] or 500)) == (success["successes"], success["n"]), row


def test_the_tables_of_the_permuted_scenes_are_rows_of_those_made_from_the_raw_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permuted_suites_page, "load_run", functools.cache(permuted_suites_page.load_run))
    text = (ROOT / "docs" / "results.md").read_text().split("## Permuted scenes")[1].split("\n## ")[0]
    together, shipped, mean, _, two, driven, suites, _ = re.split(r"^### .*$", text, flags=re.MULTILINE)
    parts = "averaged_drafter/tuned averaged/permuted one_policy/permuted two_trainings/first permuted_dagger/after"
    parts += " permuted_dagger/after_more"
    assert all(part in together for part in parts.split())
    table = permuted_suites_page.table(ROOT / "results", tuple(parts.split()))
    for name, solved in (("fused_moving", "2771 of 3072"), ("skip_own_5", "1939 of 2240")):
        row = next(line for line in table.splitlines() if line.startswith(f"| {ROWS[name]} |"))
        against = re.search(r"([+-][\d.]+) .*(\[[^]]*\]) \| [\d.]+ \| [\d.]+ \|$", row)
        assert against, row
        assert solved.replace(" of ", "/") in row
        assert solved in together
        assert f"{against[1]} {against[2]}" in " ".join(together.split())
    for part, others in MEMBERS.items():
        for other in others:
            told = permuted_suites_page.against(ROOT / "results", other, (f"averaged/{part}",))
            assert re.sub(r" .* \[", " [", told) in " ".join(mean.split()), (part, other, told)
    for section, part, names in (
        (mean, ("averaged/permuted",), "l1 alone fused_moving skip_own_5"),
        (two, ("two_trainings/first", "two_trainings/second"), "l1 alone fused_moving skip_own_3 skip_own_5"),
        (driven, AFTER, "l1 alone fused_moving skip_reset_3 skip_forecast_100"),
        (suites, BOTH, "l1 alone fused_blind skip_reset_3"),
    ):
        found = permuted_suites_page.load(ROOT / "results", part)
        for name in names.split():
            assert re.search(rf"\b{permuted_suites_page.solved(found[name], found[name])}\b", section), (part, name)
    for section, part, names in (
        (driven, AFTER, "fused_moving skip_reset_3"),
        (suites, BOTH, "fused_blind skip_reset_3"),
    ):
        found = permuted_suites_page.load(ROOT / "results", part)
        for name in names.split():
            told = permuted_suites_page.compared(found["l1"], found[name])
            assert re.sub(r" .* \[", " [", told) in " ".join(section.split()), (part, name, told)
    table = permuted_suites_page.table(ROOT / "results" / "averaged_drafter", ("permuted",))
    shown = [line for line in shipped.splitlines() if line.startswith("|")]
    assert shown[:2] == table.splitlines()[:2]
    assert len(shown) > 5
    assert set(shown) <= set(table.splitlines())
    runs = permuted_suites_page.load(ROOT / "results" / "averaged_drafter", ("permuted",))
    better = permuted_suites_page.compared(runs["single"], runs["skip_own_5"])
    for text in (shipped, (ROOT / "README.md").read_text()):
        assert re.sub(r"\+([\d.]+) .* \[", r"\1 [", better) in " ".join(text.split()), better
    fewer = runs["skip_own_3"]
    more = permuted_suites_page.solved(runs["skip_own_5"], fewer)
    told = f"{permuted_suites_page.solved(fewer, fewer)} of {len(fewer)} (5 skips {more})"
    assert told in " ".join(shipped.split()), told
    every = permuted_suites_page.load(ROOT / "results" / "averaged_drafter", ("all_states",))["fused_moving"]
    told = f"all {len(every)} states of spatial {permuted_suites_page.solved(every, every)}"
    assert told in " ".join(shipped.split()), told


def test_what_asking_sooner_while_something_is_held_brought_is_what_the_raw_results_say() -> None:
    folder, names = ROOT / "results" / "held", ("spatial/skip_8_held_2", "spatial/skip_8_held_2_more")
    held, rare, target = (
        {(each.task_id, each.init_state): each for name in runs for each in load_run(folder / "next" / name).episodes}
        for runs in (names, ("skip_own_5/spatial",), ("l1/spatial",))
    )
    assert held.keys() == rare.keys() == target.keys()
    solved = [sum(each.success for each in run.values()) for run in (held, rare, target)]
    more, fewer = (sum(held[key].success == found != rare[key].success for key in held) for found in (True, False))

    def share(episodes: Iterable[EpisodeResult]) -> float:
        return sum(each.prefills for each in episodes) / sum(each.chunks for each in episodes)

    told = f"{solved[0]} of {len(held)} at {share(held.values()):.2f} of the passes, with 5 skips {solved[1]}"
    told += f" (+{more} -{fewer}), its `l1` {solved[2]}; "
    gated = load_run(folder / "next" / "spatial" / "threshold_100_skip_9").episodes
    same = [held[each.task_id, each.init_state].success for each in gated]
    found = sum(each.success for each in gated)
    told += f"under 100 mm, {share(gated):.2f}, {found} of {len(gated)} (held {sum(same)})."
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert told in text, told
    alone = load_run(folder / "next" / "spatial" / "drafter_alone").episodes
    assert f"drafter alone {sum(each.success for each in alone)}/{len(alone)})" in text
    shipped = load_run(folder / "shipped" / "spatial" / "skip_6_held_2").episodes
    keys = {(each.task_id, each.init_state) for each in shipped}
    before = load_run(ROOT / "results" / "averaged_drafter" / "permuted" / "skip_own_5" / "spatial").episodes
    rare_of = [each.success for each in before if (each.task_id, each.init_state) in keys]
    told = f"(6, 2) {sum(each.success for each in shipped)} of {len(rare_of)}, with 5 skips {sum(rare_of)}."
    assert told in text, told
    for name, most in (("next/spatial/skip_8_held_2_more", 8), ("shipped/spatial/skip_6_held_2", 6)):
        config = load_run(folder / name).record.config
        assert (config["max_skips"], config["max_skips_held"]) == (most, 2)


def test_successes_of_the_policies_before_are_those_of_the_raw_results() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.split("### The first policies")[1].split("\n#")[0]
    table = permuted_table(ROOT / "results" / "permuted_object")
    for name in ("l1", "alone", "skip_reset_3", "skip_noreset_3_mem99"):
        counted = re.search(rf"^\| {re.escape(ROWS[name])} \| (\d+)/", table, re.MULTILINE)
        assert counted, (name, table)
        assert re.search(rf"\b{counted[1]}\b", section), (name, counted[1])


def test_the_table_of_delayed_answers_is_that_of_the_raw_results() -> None:
    section = (ROOT / "docs" / "results.md").read_text().split("## Delayed answers")[1].split("\n## ")[0]
    runs = delay_page.load(ROOT / "results" / "delayed" / "moving")
    made = delay_page.table(runs, 8, "hold").splitlines() + delay_page.overview(runs).splitlines()
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 13
    assert set(shown) <= set(made)
    for name in ("l1", "rsd-async"):
        assert f"`{name}` {delay_page.solved_of(runs[0][name]).replace('/', ' of ')}" in section, name
    for delay, other in ((4, "rsd-skip"), (8, "rsd-skip"), (12, "rsd-skip")):
        better = permuted_suites_page.compared(runs[delay][other], runs[delay]["rsd-async"])
        found = re.fullmatch(r"\+([\d.]+) .* (\[.*\])", better)
        assert found, better
        assert f"{found[1]} {found[2]}" in " ".join(section.split()), (delay, other, better)
    for name in ("rsd-skip", "rsd-async"):
        better = permuted_suites_page.compared(runs[8]["draft-first"], runs[8][name]).removeprefix("+")
        rounded = re.sub(r"\d+\.\d", lambda number: f"{float(number[0]):.0f}", better)
        assert re.sub(r" .* \[", " [", rounded) in section, (name, rounded)
    static = delay_page.load(ROOT / "results" / "delayed" / "static")
    text = next(part for part in section.split("\n- ") if part.startswith("Static scenes"))
    told = {name: static[8][name] for name in ("rsd-async", "rsd-skip", "hold", "tail")}
    states = set.intersection(*(set(run) for run in told.values()))
    solved = [sum(told[name][key].success for key in states) for name in told]
    named = "of {} `rsd-async` {}, `rsd-skip` {}, `l1` standing still {}, tail {}".format(len(states), *solved)
    assert named in " ".join(text.split()), named
    for delay in (4, 8):
        run, at_once = static[delay]["rsd-async"], static[0]["l1"]
        assert run.keys() <= at_once.keys()
        assert f"{delay} steps late {delay_page.solved_of(run).replace('/', ' of ')}" in " ".join(text.split())
        better = permuted_suites_page.compared({key: at_once[key] for key in run}, run)
        assert re.sub(r" .* \[", " [", better) in " ".join(text.split()), better


def test_what_8_bit_products_cost_and_save_is_what_was_measured() -> None:
    text = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    before, now = (latency_record(ROOT / f"results/int8/cpu/latency-{name}.json") for name in ("float", "int8"))
    for name in ("l1", "rsd-fused"):
        took, takes = (percentiles(record.milliseconds[name]["total"])[0] for record in (before, now))
        assert f"`{name}` {takes:.1f}{' ms' * (name == 'l1')}, not {took:.1f}" in text, (name, takes, took)
    in_float = permuted_suites_page.load(ROOT / "results" / "averaged_drafter", ("permuted",))
    told_of = {"l1": ("l1", "solves {}, in float (H200) {}"), "rsd-skip": ("skip_own_5", "`rsd-skip` {}, {}")}
    for name, (other, told) in told_of.items():
        episodes = load_run(ROOT / "results/int8" / name).episodes
        run = {(each.suite, each.task_id, each.init_state): each for each in episodes}
        same = [each for each in in_float[other].values() if (each.suite, each.task_id, each.init_state) in run]
        assert len(same) == len(run) == 140
        solved = [sum(each.success for each in found) for found in (run.values(), same)]
        assert told.format(*solved) in text, (name, solved)
