"""`rsd eval` from its arguments to its table, on the scripted backend."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import SCRIPTED

import rsd.evaluation.backend as backend
import rsd.evaluation.evaluate as evaluation
from rsd.cli import dispatch
from rsd.cli.eval import check_paths
from rsd.evaluation.config import EvalConfig
from rsd.types import RsdError


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scripted = functools.partial(evaluation.evaluate, backend=SCRIPTED)
    monkeypatch.setattr(evaluation, "evaluate", scripted)
    monkeypatch.setattr(backend, "settle", functools.partial(backend.settle, backend=SCRIPTED))
    return tmp_path / "run"


def command(output: Path, *options: str) -> list[str]:
    defaults = {"--num-trials": "2", "--tasks": "1", "--num-workers": "1", "--output": str(output)}
    kept = [word for name, value in defaults.items() if name not in options for word in (name, value)]
    return ["eval", *kept, *options]


def test_compare_ends_with_the_paired_table(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(command(output, "--compare", "--policy", "good")) == 0
    printed = capsys.readouterr()
    assert "McNemar p" in printed.out
    assert "2/2 = 100.0 %" in printed.out
    assert str(output / "rsd-fused") in printed.err
    assert "good decodes by rsd-fused: as scripted\n" in printed.err
    assert "| speed-up of p50 | - | " in (output / "comparison.md").read_text()

    folders = [str(output / name) for name in ("l1", "rsd-fused", "drafter-only")]
    assert dispatch(["compare", *folders, "--markdown"]) == 0
    assert capsys.readouterr().out == (output / "comparison.md").read_text()


def test_an_error_episode_makes_the_exit_status_1(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(command(output, "--policy", "raises:1.1", "--report")) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(f"report: {output.absolute() / 'report.html'}\n")
    assert "the policy broke" in (output / "report.html").read_text()
    assert "1 of 2 episodes ended in an error" in printed.err
    assert "1/1 = 100.0 %" in printed.out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tasks", "9", "--tasks 9: libero_spatial has tasks 0 to 5"),
        ("--num-trials", "11", "--num-trials 11 from --init-states 0: task 1"),
        ("--shard", "3/4", "--shard 3/4: expected at most 2 parts, as there are episodes"),
        ("--max-videos", "3", "--max-videos 3: expected --videos with it, found none"),
        ("--batch-wait-ms", "5", "--batch-wait-ms 5.0: expected --batch with it, found none"),
        ("--init-states", "10", "--num-trials 2 from --init-states 10: task 1"),
    ],
)
def test_what_the_suite_does_not_have_is_a_bad_command_line(
    output: Path, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(command(output, option, value)) == 2
    assert capsys.readouterr().err.startswith(f"rsd eval: error: {message}")
    assert not output.exists()


def test_ctrl_c_keeps_what_is_finished(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = evaluation.append_episode

    def interrupt(*arguments: object) -> None:
        record(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "append_episode", interrupt)
    monkeypatch.chdir(output.parent)
    assert dispatch(command(Path(output.name), "--policy", "good")) == 130
    assert "finished episodes are kept" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "append_episode", record)
    assert dispatch(["eval", "--resume", str(output)]) == 0
    assert "1 of 2 episodes done, 1 to go" in capsys.readouterr().err
    assert dispatch(["eval", "--resume", str(output), "--num-trials", "9"]) == 2
    assert "leave --num-trials out" in capsys.readouterr().err
    assert dispatch(["eval", "--resume", str(output.parent)]) == 2
    assert "not a results directory" in capsys.readouterr().err


def test_a_run_whose_policy_is_relative_goes_on_where_it_was_begun(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dispatch(command(Path("run"), "--policy", "good")) == 0
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert dispatch(["eval", "--resume", str(output)]) == 2
    assert f"its --policy good is relative to {tmp_path}; go on from there" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert dispatch(["eval", "--resume", "run"]) == 0
    config = EvalConfig(output=str(tmp_path / "elsewhere"))  # from where, it does not say
    for lost in ({"policy": "runs/x/checkpoint"}, {"policy": "x"}, {"policy": "x.py:P"}, {"drafter": "drafters/x"}):
        (name, text), *_ = lost.items()
        with pytest.raises(RsdError, match=f"its --{name} {text} is relative to the folder in which it was begun"):
            check_paths(replace(config, **{"policy": "checkpoints/libero", "decode": "rsd-skip", **lost}), output)
    for found in ("owner/name", "ws://127.0.0.1:1", "json:JSONDecoder", "/nowhere/x"):
        check_paths(replace(config, policy=found), output)
