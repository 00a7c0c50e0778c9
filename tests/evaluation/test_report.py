from pathlib import Path

import pytest
from rich.console import Console
from scripted import episode

from rsd.evaluation.report import load_runs, markdown_table, rich_table, table_rows
from rsd.evaluation.results import RunRecord, append_episode, encode_record
from rsd.types import RsdError

PLAN = {"tasks": "all", "num_trials": 1}


def write_run(directory: Path, decode: str, failures: set[int], p50: float, tasks: range = range(10)) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(encode_record(RunRecord(PLAN, "hash", {}, {})))
    draft = (
        {}
        if decode != "ar"
        else {
            "num_drafts": 0,
            "num_draft_tokens": [],
            "num_accepted_tokens": [],
            "accepted_levels": [],
            "acceptance": "",
            "main_passes": 7,
        }
    )
    for task in tasks:
        outcome = {"success": False, "failure": "step limit"} if task in failures else {}
        result = episode(task, decode=decode, latency_ms={"total": [p50]}, **draft, **outcome)
        append_episode(directory / "episodes.jsonl", result)
    return directory


def test_the_table_holds_every_run_against_the_first(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a", "ar", {1, 2}, 80.0), write_run(tmp_path / "b", "rsd", {2}, 40.0)])
    rows = dict(table_rows(runs))
    assert rows["success"] == ["8/10 = 80.0 % [49.0, 94.3]", "9/10 = 90.0 % [59.6, 98.2]"]
    assert rows["paired difference"] == ["-", "+10.0 points (+1 -0)"]
    assert rows["McNemar p"] == ["-", "1 (n = 10)"]
    assert rows["latency per chunk, p50"] == ["80.0 ms", "40.0 ms"]
    assert rows["speed-up of p50"] == ["-", "2.00x"]
    assert rows["main passes per chunk"] == ["1 prefill + 7", "1 prefill + 1"]
    assert rows["draft tokens accepted"] == ["-", "76.7 %"]
    assert rows["accepted per level"] == ["-", "100 % / 80 % / 50 %"]
    assert rows["mean acceptance length"] == ["-", "2.0"]
    assert "episodes with an error" not in rows
    assert "episodes not run" not in rows
    assert "episodes in common with the first" not in rows


def test_an_interrupted_run_says_how_much_is_missing(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", "rsd", set(), 40.0, range(7))
    plan = {"tasks": ",".join(map(str, range(10))), "num_trials": 2}
    (directory / "config.json").write_text(encode_record(RunRecord(plan, "hash", {}, {})))
    assert dict(table_rows(load_runs([directory])))["episodes not run"] == ["13"]
    (directory / "config.json").write_text(encode_record(RunRecord({**plan, "shard": "0/3"}, "hash", {}, {})))
    assert "episodes not run" not in dict(table_rows(load_runs([directory])))  # a third of 20 are 7
    listed = {**plan, "num_trials": 50, "init_states": "3,7-8"}
    (directory / "config.json").write_text(encode_record(RunRecord(listed, "hash", {}, {})))
    assert dict(table_rows(load_runs([directory])))["episodes not run"] == ["23"]


def test_both_renderings_show_every_cell(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a", "ar", set(), 80.0), write_run(tmp_path / "b", "rsd", set(), 40.0)])
    console = Console(width=120, record=True)
    console.print(rich_table(runs))
    drawn, markdown = console.export_text(), markdown_table(runs)
    for label, cells in table_rows(runs):
        for text in (drawn, markdown):
            assert label in text
            assert all(cell in text for cell in cells)
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {4}
    assert "rsd (margin)" in markdown


def test_pairs_are_the_common_episodes(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "ar", {0}, 80.0, range(5))
    rows = dict(table_rows(load_runs([first, write_run(tmp_path / "b", "rsd", set(), 40.0, range(3, 9))])))
    assert rows["paired difference"] == ["-", "+0.0 points (+0 -0)"]
    assert rows["McNemar p"] == ["-", "1 (n = 2)"]
    assert rows["episodes in common with the first"] == ["-", "2"]
    apart = load_runs([first, write_run(tmp_path / "c", "rsd", set(), 40.0, range(6, 9))])
    with pytest.raises(RsdError, match="in common"):
        table_rows(apart)


def test_runs_of_the_same_decoding_are_told_apart(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / name, "rsd", set(), 40.0) for name in ("old", "new")])
    assert [run.name for run in runs] == ["old: rsd (margin)", "new: rsd (margin)"]


def test_errors_are_shown_and_count_for_nothing(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", "rsd", set(), 40.0, range(3))
    failed = episode(7, success=False, failure="error: the simulator broke")
    append_episode(directory / "episodes.jsonl", failed)
    rows = dict(table_rows(load_runs([directory])))
    assert rows["success"][0].startswith("3/3")
    assert rows["episodes with an error"] == ["1"]
