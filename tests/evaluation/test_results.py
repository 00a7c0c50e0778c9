import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import episode

from rsd.evaluation.results import (
    EpisodeResult,
    append_episode,
    decode_record,
    drop_cut_off_line,
    encode_record,
    read_episodes,
    read_run_record,
)
from rsd.locks import exclusive
from rsd.types import RsdError

times = st.floats(0, 1e9)  # ms


texts = st.text().filter(lambda text: text.strip() and "\0" not in text)


@given(texts, st.lists(times, max_size=5), st.integers(0, 99))
def test_a_record_comes_back_as_it_was(text: str, latencies: list[float], init_state: int) -> None:
    result = episode(init_state=init_state, instruction=text, latency_ms={"total": latencies})
    assert decode_record(EpisodeResult, encode_record(result), "here") == result


def test_not_a_number_is_neither_written_nor_read() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_record(episode(wall_s=float("nan")))
    text = encode_record(episode(wall_s=1.5)).replace("1.5", "NaN")
    with pytest.raises(RsdError, match="here: holds NaN"):
        decode_record(EpisodeResult, text, "here")
    # 1e999 is valid JSON that Python reads as infinity
    with pytest.raises(RsdError, match="wall_s"):
        decode_record(EpisodeResult, text.replace("NaN", "1e999"), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this program reads format 1"),
        ({"format": None}, "format None"),
        ({"steps": "8"}, "field steps"),
        ({"steps": True}, "field steps"),
        ({"steps": 10**30}, "field steps"),
        ({"wall_s": 10**400}, "field wall_s"),
        ({"format": True}, "format True"),
        ({"success": 1}, "field success"),
        ({"latency_ms": {"total": ["fast"]}}, "field latency_ms"),
        ({"surplus": 1}, r"unknown \['surplus'\]"),
    ],
)
def test_a_record_of_another_shape_is_refused(change: dict, message: str) -> None:
    text = json.dumps({**json.loads(encode_record(episode())), **change})
    with pytest.raises(RsdError, match=message):
        decode_record(EpisodeResult, text, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"failure": "step limit"},
        {"success": False},
        {"success": False, "failure": "tired"},
        {"latency_ms": {"total": [1.0, 2.0]}},
        {"num_accepted_tokens": [11, 8, 5]},
        {"num_accepted_tokens": [10, 8]},
        {"accepted_levels": []},
        {"accepted_levels": [99]},
        {"steps": -1},
        {"steps": 0},
        {"attempts": 0},
        {"suite": " "},
        {"task_name": ""},
        {"decode": ""},
        {"latency_ms": {"total": [1.0], "draft": [2.0]}},
        {"chunk_stats": {"skipped": [1.0]}},
        {"prefills": -1},
        {"prefills": 2},
        {"num_drafts": 2, "accepted_levels": [1, 1]},
        {"instruction": " "},
        {"num_accepted_tokens": [-1, 8, 3]},
        {"latency_ms": {"total": [-1.0]}},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episode(path, episode(**change))
    expected = r"episodes\.jsonl:1: (the record holds|field .*: expected .*(from [01] to|not blank))"
    with pytest.raises(RsdError, match=expected):
        read_episodes(path)


def test_every_cut_loses_at_most_the_last_episode(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    results = [episode(task_id=task) for task in range(3)]
    for result in results:
        append_episode(path, result)
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(ends[1] + 1, ends[2]):
        path.write_bytes(content[:length])
        with pytest.warns(UserWarning, match="cut off"):
            assert list(read_episodes(path).values()) == results[:2]
    drop_cut_off_line(path)
    append_episode(path, results[2])
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episode(path, episode(0))
    path.write_text(path.read_text()[:40] + "\n" + encode_record(episode(1)) + "\n")
    with pytest.raises(RsdError, match=r"episodes\.jsonl:1: not valid JSON"):
        read_episodes(path)


def test_episodes_of_two_decoders_are_of_two_runs(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episode(path, episode())
    append_episode(path, replace(episode(), init_state=1, decode="other", success=False, failure="error: worker died"))
    assert len(read_episodes(path)) == 2  # an error may have had no decoder yet
    append_episode(path, replace(episode(), init_state=2, decode="other"))
    with pytest.raises(RsdError, match=r"expected the episodes of one run, found some of .* and "):
        read_episodes(path)


def test_only_an_error_episode_may_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    append_episode(path, replace(episode(), success=False, failure="error: worker died"))
    append_episode(path, episode())
    assert list(read_episodes(path).values()) == [episode()]
    append_episode(path, episode())
    with pytest.raises(RsdError, match="recorded twice"):
        read_episodes(path)


def test_a_directory_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="rsd eval"):
        read_run_record(tmp_path)
    with exclusive(tmp_path), pytest.raises(RsdError, match="another run is beginning here"):
        read_run_record(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "episodes.jsonl")
    with pytest.raises(RsdError, match=r"episodes\.jsonl: expected a file, found something else"):
        read_episodes(tmp_path / "episodes.jsonl")
