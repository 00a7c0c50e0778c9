"""Run folders that somebody edited, or whose lines were lost: refused in one line by every command that reads them."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.scripted import episode
from refusals import check
from rsd.cli import dispatch
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import sum_up
from rsd.evaluation.results import RunRecord, append_episode, encode_record, read_run_record
from rsd.types import RsdError

CONFIG = EvalConfig(decode="rsd-fused", num_trials=2, tasks="0,1")
READERS = {
    "compare": ["compare", "RUN"],
    "report": ["report", "RUN"],
    "inspect": ["inspect", "RUN"],
    "merge": ["merge", "OUT", "RUN"],
    "resume": ["eval", "--resume", "RUN"],
}
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four episodes, all that were planned, one of them a failure."""
    folder = tmp_path / "run"
    folder.mkdir()
    record = RunRecord(asdict(CONFIG), CONFIG.hash, {"cpu_cores": "2"}, {"sha256": "1"}, 4)
    (folder / "config.json").write_text(encode_record(record))
    for task, state in ((0, 0), (1, 0), (0, 1), (1, 1)):
        outcome = {} if state else {"success": False, "failure": "step limit"}
        append_episode(folder / "episodes.jsonl", episode(task, state, decode="rsd-fused", **outcome))
    sum_up(folder, 1, 1.0)
    return folder


def edit(path: Path, change: Edit) -> None:
    """The first line of a file, or all of one that is a single object, with something changed."""
    text = path.read_text()
    first, rest = (text, "") if path.suffix == ".json" else text.split("\n", 1)
    values = json.loads(first)
    change(values)
    path.write_text(json.dumps(values) + ("\n" + rest if rest else ""))


def set_option(**changed: object) -> Edit:
    """Options of another run together with the hash of those."""
    config = replace(CONFIG, **changed)
    return lambda values: values.update(config=asdict(config), config_hash=config.hash)


# (file, change, what the line says)
EDITS: dict[str, tuple[str, Edit, str]] = {
    "attempts": ("episodes.jsonl", lambda e: e.update(attempts=0), "field attempts"),
    "task-name": ("episodes.jsonl", lambda e: e.update(task_name=""), "field task_name"),
    "instruction": ("episodes.jsonl", lambda e: e.update(instruction=" "), "field instruction"),
    "prefills": ("episodes.jsonl", lambda e: e.update(prefills=9), "more prefills or drafts than chunks"),
    "drafts": ("episodes.jsonl", lambda e: e.update(num_drafts=2, accepted_levels=[1, 1]), "more prefills or drafts"),
    "suite": ("episodes.jsonl", lambda e: e.update(suite="libero_10"), "found one of libero_10"),
    "task": ("episodes.jsonl", lambda e: e.update(task_id=9), "by tasks '0,1' of config.json, found one of task 9"),
    "state": ("episodes.jsonl", lambda e: e.update(init_state=7), "found one of initial state 7"),
    "seed": ("episodes.jsonl", lambda e: e.update(seed=8), "by seed 7 of config.json, found one of seed 8"),
    "option": ("config.json", lambda c: c["config"].update(audit=True), "expected the config_hash of its options"),
    "hash": ("config.json", lambda c: c.update(config_hash="0" * 64), "expected the config_hash of its options"),
    "decode": ("config.json", set_option(decode="l1"), "by decode 'l1' of config.json, found one of rsd-fused"),
    "other-tasks": ("config.json", set_option(tasks="1,2"), "found one of task 0"),
    "other-states": ("config.json", set_option(num_trials=1), "found one of initial state 1"),
    "planned": ("config.json", lambda c: c.update(planned=3), "the 3 episodes planned by config.json, found 4"),
    "planned-odd": ("config.json", lambda c: c.update(planned=-1), "field planned"),
    "versions": ("config.json", lambda c: c.update(versions=[]), "field versions"),
}
SUMMARIES: dict[str, tuple[str, Edit, str]] = {
    "successes": ("summary.json", lambda s: s["success"].update(successes=4), "found 2 successes of 4 episodes"),
    "lost": ("summary.json", lambda s: s.update(episodes=5), "rsd eval --resume"),
    "odd": ("summary.json", lambda s: s.update(errors="none"), "delete it"),
    "no-success": ("summary.json", lambda s: s.update(success=None), "delete it"),
}


def test_the_run_itself_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reader in ("compare", "inspect"):
        assert dispatch([reader, str(run)]) == 0, capsys.readouterr().err
    read_run_record(run)


@pytest.mark.parametrize(
    ("case", "reader"),
    # merge and resume count anew, whatever summary.json says
    [(case, reader) for case in (*EDITS, *SUMMARIES) for reader in list(READERS)[: 3 if case in SUMMARIES else None]],
)
def test_an_edited_run_is_refused(
    case: str, reader: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change, expected = {**EDITS, **SUMMARIES}[case]
    edit(run / file, change)
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    check([places.get(word, word) for word in READERS[reader]], expected, tmp_path, capsys)


@pytest.mark.parametrize("reader", ["compare", "report", "inspect"])
def test_a_run_that_lost_a_line_says_so(
    reader: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "episodes.jsonl").read_text().splitlines(keepends=True)
    (run / "episodes.jsonl").write_text("".join(lines[:-1]))
    check([reader, str(run)], "successes of 4 episodes that summary.json counted, found 1", tmp_path, capsys)


def test_what_went_on_after_its_summary_is_read(run: Path) -> None:
    """A run that was killed after more episodes than its last summary counted."""
    edit(run / "summary.json", lambda s: s.update(episodes=3, success={"successes": 1}))
    assert dispatch(["compare", str(run)]) == 0


def test_options_of_before_keep_their_hash(run: Path) -> None:
    """A record with other options than today's cannot be hashed again."""
    edit(run / "config.json", lambda c: (c["config"].pop("motion"), c.update(config_hash="of before")))
    assert read_run_record(run).config_hash == "of before"
    edit(run / "config.json", lambda c: c["config"].update(motion="none"))
    with pytest.raises(RsdError, match="config_hash"):
        read_run_record(run)
