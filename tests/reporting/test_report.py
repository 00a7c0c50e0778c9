import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaluation.scripted import episode
from rsd.evaluation.results import RunRecord, append_episode, encode_record
from rsd.reporting.tables import load_runs, markdown_table, print_runs, run_directories, table_rows, title
from rsd.types import RsdError

PLAN = {"tasks": "all", "num_trials": 1}


def write_run(
    directory: Path, decode: str, failures: set[int], p50: float, tasks: range = range(10), trials: int = 1
) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(encode_record(RunRecord({**PLAN, "num_trials": trials}, "hash", {}, {})))
    draft = (
        {}
        if decode != "ar"
        else {
            "num_drafts": 0,
            "num_draft_tokens": [],
            "num_accepted_tokens": [],
            "accepted_levels": [],
            "acceptance": "",
            "target_passes": 7,
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
    assert rows["target passes per chunk"] == ["1 prefill + 7", "1 prefill + 1"]
    assert rows["draft tokens accepted"] == ["-", "76.7 %"]
    assert rows["accepted per level"] == ["-", "100 % / 80 % / 50 %"]
    assert rows["mean acceptance length"] == ["-", "3.30"]  # by the rule `margin` each scalar is a draft
    assert rows["chunks accepted"] == ["-", "0.0 %"]
    assert "episodes with an error" not in rows
    assert "episodes not run" not in rows
    assert "episodes in common with the first" not in rows


def test_an_interrupted_run_says_how_much_is_missing(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", "rsd", set(), 40.0, range(7))
    for planned, missing in ((20, ["13"]), (7, None)):
        (directory / "config.json").write_text(encode_record(RunRecord({"num_trials": 2}, "hash", {}, {}, planned)))
        assert dict(table_rows(load_runs([directory]))).get("episodes not run") == missing


def test_both_renderings_show_every_cell(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a", "ar", set(), 80.0), write_run(tmp_path / "b", "rsd", set(), 40.0)])
    texts = [markdown_table(runs)]
    for width in (40, 80, 120):  # one run under another, where they do not fit side by side
        console = Console(width=width, record=True, file=io.StringIO())
        print_runs(console, runs)
        texts.append(console.export_text())
    markdown = texts[0]
    for label, cells in table_rows(runs):
        for text in texts:
            assert label in text
            assert all(cell in text for cell in cells if cell != "-")
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


def with_config(directory: Path, cores: int = 2, **config: object) -> Path:
    record = RunRecord({**PLAN, **config}, "hash", {"cpu_cores": str(cores)}, {})
    (directory / "config.json").write_text(encode_record(record))
    return directory


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"batch": 16}, "batch of 16"),
        ({"num_workers": "4"}, "4 workers of 1 thread on 2 cores"),
        ({"num_workers": "2", "threads": 2}, "2 workers of 2 threads on 2 cores"),
        ({"num_workers": "auto", "threads": 2}, "2 workers of 2 threads on 2 cores"),
        ({"num_workers": "2", "device": "cuda"}, "2 workers on one GPU"),
        ({"num_workers": "2", "policy": "ws://127.0.0.1:8000"}, "2 workers, one server"),
        ({"num_workers": "auto"}, ""),
        ({"num_workers": "2"}, ""),
        ({"num_workers": "1", "threads": 2}, ""),
        ({"num_workers": "1", "device": "cuda"}, ""),
        ({"num_workers": "auto", "threads": 2, "control_hz": 20.0}, ""),  # one worker in real time
    ],
)
def test_what_waited_for_others_has_no_speed(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    first = with_config(write_run(tmp_path / "a", "ar", set(), 80.0), num_workers="1")
    second = with_config(write_run(tmp_path / "b", "rsd", set(), 40.0), **config)
    for order in ([first, second], [second, first]):
        runs = load_runs(order)
        rows = dict(table_rows(runs))
        assert {run.queued for run in runs} == {"", why}
        speeds = rows.get("speed-up of p50", ["-", "-"])[1]
        assert (speeds == "-") == bool(why)
        assert rows["latency per chunk, p50"].count("-") == bool(why)
        assert (why in rows["latency not shown, it holds waiting"]) if why else (len(rows) > 5)


def test_an_audited_run_tells_its_realised_risk_and_the_gripper_apart(tmp_path: Path) -> None:
    audited, plain = write_run(tmp_path / "a", "rsd-skip", set(), 40.0, range(0)), tmp_path / "b"
    write_run(plain, "l1", set(), 40.0, range(2))
    for task in range(2):
        stats = {
            "skipped": [1.0, 1.0, 1.0, 0.0],
            "deviation_mm": [80.0, 10.0, 10.0, 90.0],
            "gripper_differs": [0.0, float(task == 0), 0.0, 1.0],
        }
        result = episode(task, decode="rsd-skip", chunks=4, latency_ms={"total": [1.0] * 4}, chunk_stats=stats)
        append_episode(audited / "episodes.jsonl", result)
    rows = dict(table_rows(load_runs([audited, plain])))
    assert rows["realised risk (bound at 90 %)"][0].startswith("0.500 (<= ")
    assert rows["drafts beyond epsilon"] == ["2 of 6 (75 mm)", "-"]
    assert rows["drafts whose gripper alone differs"] == ["1 of 6", "-"]
    assert rows["chunks without the target"] == ["75.0 %", "-"]
    assert rows["deviation of the draft, mean"] == ["47.5 mm", "-"]
    assert not any("_" in label for label in rows)


def test_drafts_that_were_compared_but_not_executed_make_no_risk(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "rsd-fused", set(), 40.0, range(0))
    stats = {"skipped": [0.0], "deviation_mm": [80.0], "unheard_of": [3.0]}
    append_episode(run / "episodes.jsonl", episode(0, decode="rsd-fused", chunk_stats=stats))
    rows = dict(table_rows(load_runs([run])))
    assert rows["drafts beyond epsilon"] == ["1 of 1 (75 mm)"]
    assert "realised risk (bound at 90 %)" not in rows
    assert "drafts whose gripper alone differs" not in rows  # nobody recorded it
    assert rows["unheard of, mean"] == ["3"]


def test_a_distilled_drafter_is_held_to_its_own_epsilon(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "rsd-skip", set(), 40.0, range(0))
    gates = {"drafter_gate": {"epsilon_mm": 229.0}, "skip_calibration": {"epsilon_mm": 60.0}}  # the target's is not it
    (run / "config.json").write_text(encode_record(RunRecord(PLAN, "hash", {}, gates)))
    stats = {"skipped": [1.0, 0.0], "deviation_mm": [None, 100.0], "stood": [None, 1.0]}
    result = episode(0, decode="rsd-skip", chunks=2, latency_ms={"total": [1.0] * 2}, chunk_stats=stats)
    append_episode(run / "episodes.jsonl", result)
    rows = dict(table_rows(load_runs([run])))
    assert rows["drafts beyond epsilon"] == ["0 of 1 (229 mm)"]
    assert "realised risk (bound at 90 %)" not in rows  # of what was executed nobody asked the target
    stats["deviation_mm"] = [300.0, 100.0]
    append_episode(run / "episodes.jsonl", replace(result, task_id=1, task_name="task_1", chunk_stats=stats))
    assert dict(table_rows(load_runs([run])))["drafts beyond epsilon"] == ["1 of 1 (229 mm)"]


def test_the_verdict_and_both_intervals_say_of_what_they_speak(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", "ar", set(range(8)), 80.0), write_run(tmp_path / "b", "l1", set(), 40.0)
    rows = dict(table_rows(load_runs([first, second])))
    assert rows["verdict on success"] == ["-", "better"]
    one_task = [tmp_path / "c", tmp_path / "d"]
    for directory, success in zip(one_task, (False, True), strict=True):
        write_run(directory, "ar" if success else "l1", set(), 40.0, range(0), 12)
        for state in range(12):
            outcome = {"success": success or state > 9, "failure": "" if success or state > 9 else "step limit"}
            append_episode(directory / "episodes.jsonl", episode(0, state, decode="ar", acceptance="", **outcome))
    rows = dict(table_rows(load_runs(one_task)))
    assert rows["verdict on success"] == ["-", "better on these tasks, open for others"]
    assert "bootstrap 95 %, states drawn anew" in rows
    assert "bootstrap 95 %, tasks drawn anew" not in rows


def test_the_shipped_runs_by_tasks_hold_zero_and_the_counts_of_the_page() -> None:
    folder = Path("results/libero_spatial_57M/h100")
    rows = dict(table_rows(load_runs([folder / name for name in ("l1", "draft-first", "rsd-skip")])))
    assert rows["bootstrap 95 %, tasks drawn anew"][1] == "[-0.4, +6.4] points"
    assert rows["verdict on success"][1] == "better on these tasks, open for others"
    assert rows["drafts beyond epsilon"][2] == "405 of 4,275 (75 mm)"
    assert rows["drafts whose gripper alone differs"][2] == "34 of 4,275"
    assert "speed-up of p50" not in rows
    assert not [label for label in rows if "_" in label]  # words for people, no keys of a record


def test_a_folder_of_runs_is_all_of_them(tmp_path: Path) -> None:
    for name in ("rsd", "ar"):
        write_run(tmp_path / name, name, set(), 40.0)
    (tmp_path / "figures").mkdir()
    assert run_directories([tmp_path]) == [tmp_path / "ar", tmp_path / "rsd"]
    assert run_directories([tmp_path / "rsd", tmp_path]) == [tmp_path / "rsd", tmp_path / "ar"]
    assert [run.name for run in load_runs([tmp_path])] == ["ar", "rsd (margin)"]


def test_shards_are_not_a_folder_of_runs(tmp_path: Path) -> None:
    for part in range(2):
        write_run(tmp_path / f"shard-{part}-of-2", "rsd", set(), 40.0)
    with pytest.raises(RsdError, match=r"holds 2 parts of one run; bring them together: rsd merge"):
        load_runs([tmp_path])
    write_run(tmp_path / "merged", "rsd", set(), 40.0)
    (tmp_path / "merged" / "shard-0-of-2").mkdir()
    assert run_directories([tmp_path / "merged"]) == [tmp_path / "merged"]


def test_counts_have_their_number(tmp_path: Path) -> None:
    one = load_runs([write_run(tmp_path / "a", "ar", set(), 80.0, range(1))])
    many = load_runs([write_run(tmp_path / name, name, set(), 80.0) for name in ("b", "c")])
    assert title(one) == "libero_spatial: 1 task, 1 episode"
    assert title(many) == "libero_spatial: 10 tasks, 10 episodes a run"
