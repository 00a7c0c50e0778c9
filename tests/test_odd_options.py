"""Options that contradict themselves or do nothing where they stand: refused before anything begins.

A new fault of the kind is a new row.
"""

import errno
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refusals import check, tree
from rsd import manifest
from rsd.checks import last_line
from rsd.data.demonstrations import ActionEpisode
from rsd.decoding.calibration import FILE_NAME, FORMAT_VERSION, SkipCalibration
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.training.tokenizer import demonstration_chunks
from rsd.types import RsdError

COUNTERFACTUAL = "--loss.counterfactual 0.3 --tokenizer t --output out"
OPTIONS = {
    "expert run --seeds 1 1": "--seeds: expected each once, found 1 twice in",
    "expert run --video v.txt": "--video to name a file that ends in .mp4, found v.txt",
    "demos collect --out out --states-only --image-size 64": "--image-size without --states-only, which draws nothing",
    "train policy --loop.steps 0 --output out": "--loop.steps of at least 1 without --init, found 0",
    f"train policy {COUNTERFACTUAL}": "--policy.target.whole-block with --loss.counterfactual",
    "submit --cluster local --shards 9 --num-trials 2 --tasks 0 --decode l1": "--shards 9: expected at most 2, as the",
    "submit --cluster local --partition gpu": "--partition gpu: expected --cluster slurm with it, found local",
    "eval --shard 01/4": "--shard '01/4': expected i/n with 0 <= i < n, such as 0/4",
    "eval --videos all --max-videos 0": "--max-videos: expected an integer from 1 to",
    "eval --policy checkpoints/libero --decode target-only": "--decode 'target-only': expected one of ar, ",
    "bench latency --decode l1 --acceptance synthetic(0.5)": "a decoder that drafts among --decode with --acceptance",
    "drafter distil --target p:P --drafter.image-size 96 --drafter.visual.shrink 4": "a multiple of 16 x --drafter",
    "drafter distil --target p:P --loop.steps 0": "expected --loop.steps of at least 1, found 0",
    "drafter distil --target p:P --loss.grounding 1": "Unrecognized options: --loss.grounding",
    "drafter distil --target p:P --loss.blind 1": "expected no --loss.blind: this drafter has no memory, found 1.0",
    "train drafter --loss.committed 0.3": "Unrecognized options: --loss.committed",
    "train drafter --loss.blind 0.3": "expected no --loss with --kind feature, which does not read it",
    "train drafter --remembered-chunks 6": "expected no --remembered-chunks with --kind feature, which does not read",
    "train drafter --kind visual --own-prefix 0.2": "expected no --own-prefix with --kind visual, which does not",
    "train drafter --kind visual --resume-weights --visual-drafter.depth 1": "--resume-weights, which does not read it",
    "study scaling --sizes 10M 10M": "--sizes 10M: expected some of 10M, 18M, 32M, 104M, 312M, each once",
    "study scaling --rounds 0": "--warmup: expected 1 or more, and one of --sizes, found 0, 2, 3",
    "merge ws://127.0.0.1:8000 runs/a": "expected a path, found an address",
    "eval --output https://host/runs": "expected a path, found an address",
    "eval --max-skips-held 2": "a --skip-threshold-mm with --max-skips-held, as the checkpoint has its own, found none",
    "eval --decode rsd-skip --skip-threshold-mm 9 --max-skips 2 --max-skips-held 3": "of at most max_skips, 2, found 3",
    "serve --statistics nothing --port 0": "--statistics: expected a checkpoint in OpenVLA's format beside it, found",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_refused_at_the_start(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(command.replace(" out", f" {tmp_path}/out").split(), OPTIONS[command], tmp_path, capsys)


@pytest.mark.parametrize("option", ["eval --output", "train policy --output", "merge --output", "demos collect --out"])
def test_an_output_of_an_unset_variable_is_not_the_current_folder(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        check([*option.split(), empty], f"{option.split()[-1]}: expected a path, found an empty one", tmp_path, capsys)


def test_a_policy_of_an_unset_variable_is_not_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["inspect", ""], ["bench", "latency", "--policy", ""]):
        check(command, "policy '': expected a checkpoint directory or a hub id", tmp_path, capsys)


@pytest.mark.parametrize("name", ["episodes.jsonl", "config.json", "open_it_demo.hdf5"])
def test_a_tokenizer_among_files_of_something_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    for more in ([], ["--overwrite"]):
        command = ["tokenizer", "fit", "--output", tmp_path, "--data", "nothing", *more]
        check(command, f"expected a folder of its own, found {name} in it", tmp_path, capsys)


OTHERS = ["tokenizer.json", "config.json", "episodes.jsonl", "open_it_demo.hdf5"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("training", ["policy", "drafter"])
def test_a_training_among_files_of_something_else(
    training: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    command = ["train", training, "--output", tmp_path, "--device", "cpu"]
    check(command, f"expected a folder of its own, found {name} in it", tmp_path, capsys)


def test_a_tokenizer_that_cannot_be_written_leaves_what_was_there(
    tokenizer: ActionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    tokenizer.save(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(RsdError, match="cannot be written"):
        tokenizer.save(tmp_path)
    assert tree(tmp_path) == before


PROMISED: dict[str, Any] = {
    **{"threshold": 20.0, "max_skips": 3, "memory_chunks": 1, "score": "expected_deviation_mm", "epsilon_mm": 50.0},
    **{"alpha": 0.1, "delta": 0.1, "loss": "share", "test": "betting", "p_value": 0.05, "empirical_risk": 0.05},
    **{"skip_share": 0.5, "episodes": 9, "chunks": 90, "suites": "s", "acceptance": "margin"},
    "weights_sha256": "0" * 64,
}
CALIBRATION: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "suites": (lambda c: c.update(suites=""), "suites: expected names with commas between, found ''"),
    "suites-gap": (lambda c: c.update(suites="libero_10,,x"), "suites: expected"),
    "score": (lambda c: c.update(score="entropy"), "score: expected one of expected_deviation_mm, found 'entropy'"),
}


@pytest.mark.parametrize("case", CALIBRATION)
def test_a_calibration_of_something_else(case: str, tmp_path: Path) -> None:
    change, expected = CALIBRATION[case]
    content = {**PROMISED, "format_version": FORMAT_VERSION}
    change(content)
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(RsdError, match=expected):
        SkipCalibration.load(tmp_path)


def test_a_folder_in_the_place_of_a_checkpoints_file_is_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    manifest.seal(tmp_path)
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(RsdError, match=f"{FILE_NAME}: came later than manifest.json"):
        manifest.verify(tmp_path)
    with pytest.raises(RsdError, match=f"{FILE_NAME}: expected a file, found a folder"):
        manifest.seal(tmp_path)


def test_a_run_has_no_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "episodes.jsonl"):
        (tmp_path / name).touch()
    check(["inspect", tmp_path, "--keys"], "--keys: expected a checkpoint beside it, found the run", tmp_path, capsys)


def raised(error: Exception) -> str:
    try:
        raise error
    except type(error):
        return traceback.format_exc()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (raised(ValueError("a\nb\nTraceback (most recent call last): x")), "ValueError: a b Traceback (most"),
        (raised(RsdError("one line")), "RsdError: one line"),
        ("the worker died", "the worker died"),
        ("", "error"),
    ],
)
def test_an_attempt_is_told_with_its_type_and_all_that_it_says(log: str, expected: str) -> None:
    assert expected in last_line(log)
    assert "\n" not in last_line(log)


def test_chunks_longer_than_all_demonstrations_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "rsd.training.tokenizer.action_episodes", lambda _: [ActionEpisode("x", np.zeros((40, 7), np.float32))]
    )
    demonstration_chunks([tmp_path], 60)
    assert "none has more than 40 steps" in capsys.readouterr().err
    demonstration_chunks([tmp_path], 8)
    assert "warning" not in capsys.readouterr().err
