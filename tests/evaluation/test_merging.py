"""Shards of one run become one directory, as if one process had run it all."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console
from scripted import SCRIPTED, episode

from rsd.cli import dispatch
from rsd.evaluation.config import EvalConfig, stored_config
from rsd.evaluation.evaluate import evaluate, plan_episodes
from rsd.evaluation.launchers import shard_configs
from rsd.evaluation.merging import merge_shards, missing_parts
from rsd.evaluation.results import (
    EPISODES_FILE,
    EpisodeKey,
    EpisodeResult,
    RunRecord,
    append_episode,
    encode_record,
    read_episodes,
    read_run_record,
)
from rsd.locks import exclusive
from rsd.reporting.tables import load_run
from rsd.types import RsdError


def write(config: EvalConfig) -> Path:
    """The directory that an evaluation of `config` leaves: a line an episode, all of them successes."""
    directory = config.output_dir
    directory.mkdir(parents=True)
    record = RunRecord(asdict(config), config.hash, {"simulator": "scripted 1", "cpu": config.shard}, {"sha256": "1"})
    (directory / "config.json").write_text(encode_record(record))
    for job in plan_episodes(config, SCRIPTED):
        append_episode(directory / EPISODES_FILE, episode(job.task_id, job.init_state, steps=5 + job.init_state))
    return directory


def read(directory: Path) -> dict[EpisodeKey, EpisodeResult]:
    return read_episodes(directory / EPISODES_FILE)


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    return EvalConfig(num_trials=2, tasks="0,1,2", decode="rsd", output=str(tmp_path / "whole"))


@pytest.fixture
def whole(config: EvalConfig) -> Path:
    return write(config)


@pytest.fixture
def sharded(config: EvalConfig, tmp_path: Path) -> Path:
    """The same run in two shards."""
    config = replace(config, output=str(tmp_path / "sharded"))
    for shard in shard_configs(config, 2):
        write(shard)
    return config.output_dir


def test_shards_give_what_one_process_gives(
    config: EvalConfig, whole: Path, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = sharded / "shard-1-of-2" / "videos"
    videos.mkdir(exist_ok=True)
    (videos / "libero_spatial_task01_init00_failure.mp4").write_bytes(b"film")
    assert dispatch(["merge", str(sharded)]) == 0
    assert "6/6 = 100.0 %" in capsys.readouterr().out
    assert read(sharded) == read(whole)
    assert read_run_record(sharded).config_hash == read_run_record(whole).config_hash
    assert (sharded / "videos" / "libero_spatial_task01_init00_failure.mp4").read_bytes() == b"film"
    before = (sharded / EPISODES_FILE).read_bytes()
    merge_shards(sharded)
    assert (sharded / EPISODES_FILE).read_bytes() == before
    # whole, so nothing is left to run
    evaluate(replace(config, output=str(sharded)), backend=SCRIPTED, console=Console(file=io.StringIO()))
    assert (sharded / EPISODES_FILE).read_bytes() == before


def test_a_merge_has_its_folder_for_itself(sharded: Path) -> None:
    with exclusive(sharded), pytest.raises(RsdError, match="another run is writing here"):
        merge_shards(sharded)
    assert not (sharded / EPISODES_FILE).exists()


def test_a_shard_that_is_not_done_is_merged_as_far_as_it_is_and_again_later(whole: Path, sharded: Path) -> None:
    late = sharded / "shard-1-of-2" / EPISODES_FILE
    lines = late.read_text().splitlines(keepends=True)
    late.write_text(lines[0])
    assert merge_shards(sharded).episodes == 4
    late.write_text("".join(lines))
    assert merge_shards(sharded).episodes == 6
    assert read(sharded) == read(whole)


def test_a_run_is_no_shard_of_itself_and_no_shard_counts_twice(whole: Path, sharded: Path) -> None:
    before = (whole / "episodes.jsonl").read_bytes()
    for shards in ([whole], [sharded, sharded]):
        with pytest.raises(RsdError, match="output and shards: expected each once"):
            merge_shards(whole, shards)
    assert (whole / "episodes.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("shard-1-of-2", "shard-x-of-y", "x-of-y: expected the shard that its name says, found --shard 1/2; name what"),
        ("whole", "shard-0-of-3", "shard-0-of-3: expected the shard that its name says, found a whole run"),
        ("shard-0-of-1", "shard-0-of-1", "expected shards of one division, found of 1 and of 2"),
    ],
)
def test_shards_are_what_their_names_say(
    config: EvalConfig, whole: Path, sharded: Path, part: str, name: str, message: str
) -> None:
    if part == "shard-0-of-1":
        (only,) = shard_configs(replace(config, output=str(sharded)), 1)
        write(only)
    else:
        shutil.copytree(whole if part == "whole" else sharded / part, sharded / name)
    with pytest.raises(RsdError, match=message):
        merge_shards(sharded)
    assert not (sharded / EPISODES_FILE).exists()


def test_an_error_gives_way_to_a_result_from_wherever(whole: Path, sharded: Path) -> None:
    first = next(iter(read(sharded / "shard-1-of-2").values()))
    broken = replace(first, success=False, failure="error: worker died")
    append_episode(sharded / "shard-0-of-2" / EPISODES_FILE, broken)
    assert merge_shards(sharded).errors == 0
    assert read(sharded) == read(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"seed": 7', '"seed": 8'), "seed 7 there, 8 here"),
        (lambda text: text.replace("scripted 1", "scripted 2"), "simulator 'scripted 1' there, 'scripted 2' here"),
    ],
)
def test_what_is_no_part_of_the_run_stays_out(sharded: Path, change: Callable[[str], str], message: str) -> None:
    record = sharded / "shard-1-of-2" / "config.json"
    old = read_run_record(sharded / "shard-1-of-2")
    text = change(record.read_text())
    changed = stored_config(json.loads(text)["config"], "here")
    record.write_text(text.replace(old.config_hash, changed.hash))
    with pytest.raises(RsdError, match=message):
        merge_shards(sharded)
    assert not (sharded / EPISODES_FILE).exists()


def test_two_results_of_one_episode_are_refused(sharded: Path) -> None:
    first = next(iter(read(sharded / "shard-1-of-2").values()))
    append_episode(sharded / "shard-0-of-2" / EPISODES_FILE, replace(first, steps=first.steps + 1))
    with pytest.raises(RsdError, match="is there with another result"):
        merge_shards(sharded)


def test_nothing_to_merge_is_an_error(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="holds no shard"):
        merge_shards(tmp_path)
    for shard in sharded.iterdir():
        (shard / EPISODES_FILE).unlink()
    with pytest.raises(RsdError, match="no episode in shard-0-of-2, shard-1-of-2; nothing to merge yet"):
        merge_shards(sharded)


def test_episodes_and_shards_that_are_missing_are_named(
    sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = sharded / "shard-1-of-2"
    for gone in (EPISODES_FILE, "config.json"):  # it has run nothing, it has not begun
        (absent / gone).unlink()
        assert dispatch(["merge", str(sharded)]) == 1
        said = capsys.readouterr().err
        assert "3 of 6 episodes are missing, the first of them libero_spatial task 1, initial state 0" in said
        assert "nothing is there of shard-1-of-2" in said
        assert load_run(sharded).not_run == 3


def test_an_early_stop_is_counted_from_the_suites_tasks(sharded: Path) -> None:
    """Of `--tasks all` the tasks that were never begun are missing, too."""
    for shard in sharded.iterdir():
        record = read_run_record(shard)
        whole = replace(EvalConfig(**record.config), tasks="all", num_trials=10)
        text = encode_record(replace(record, config=asdict(whole), config_hash=whole.hash))
        (shard / "config.json").write_text(text)
    (sharded / "shard-0-of-2" / EPISODES_FILE).unlink()
    merge_shards(sharded, backend=SCRIPTED)
    assert missing_parts(sharded, SCRIPTED).startswith("57 of 60 episodes are missing")
    assert load_run(sharded).not_run == 57
