"""`rsd doctor` and `rsd inspect`: what they find in good and in damaged places."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scripted import episode

import rsd.evaluation.doctor as doctor
from foreign_server import foreign
from reporting.test_report import write_run
from rsd.cli import dispatch
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.doctor import Check, DoctorConfig, diagnose, preflight
from rsd.evaluation.results import append_episode
from rsd.policy import RsdPolicy
from rsd.types import RsdError


@pytest.fixture
def checkpoint(policy: RsdPolicy, tmp_path: Path) -> Path:
    provenance = {
        "data": {"sources": [{"seed": 1}, {"seed": 1}, {"seed": 2}]},
        "validation": {"frames": 10, "rsd": {"l1_error": 0.123}},
    }
    made = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, provenance)
    made.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.simulator
def test_all_is_well_here(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["doctor", "--policy", str(checkpoint), "--output", str(tmp_path / "new"), "--verbose"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        *("all is well", "130 tasks of 5 suites", "two cameras, by", "action error rsd 0.123"),
        *("observation.state                 float32 [8]", "uint8 [2, 32, 32, 3]", "[1, 8, 64]"),
        *("actions                           float32 [8, 7]", "stats.num_draft_tokens            [48, 48, 48]"),
    ):
        assert expected in printed, printed
    assert "RED" not in printed


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "missing"])
def test_a_checkpoint_that_does_not_belong_together_is_red_and_stops_an_evaluation(
    checkpoint: Path, damage: str
) -> None:
    if damage == "weights":
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "tokenizer":
        file = checkpoint / "tokenizer.json"
        file.write_text(file.read_text().replace('"rho": 2.0', '"rho": 3.0'))
    else:
        shutil.rmtree(checkpoint)
    with pytest.raises(RsdError, match=r"(sha256 differs|expected a checkpoint directory).*`rsd doctor`"):
        preflight(EvalConfig(policy=str(checkpoint)))


def test_a_sound_checkpoint_passes_the_cheap_checks(checkpoint: Path, tmp_path: Path) -> None:
    preflight(EvalConfig(policy=str(checkpoint), output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["lerobot:", "lerobot:--help", "ws://127.0.0.1:1", "json:JSONDecoder", "no.py:P"])
def test_a_policy_of_somebody_elses_is_reached_and_no_checkpoint_is_looked_for(policy: str, tmp_path: Path) -> None:
    assert "checkpoint files" not in found(doctor.cheap_checks(policy, "cpu", tmp_path))
    check = doctor.guarded("policy", partial(doctor.reach, EvalConfig(policy=policy)))
    assert (check.status, "expected" in check.found) == ("fail", True), check.found
    with foreign({}) as (address, _):
        assert doctor.reach(EvalConfig(policy=address)).status == "ok"


def test_red_lines_say_what_to_do(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.9.9")
    monkeypatch.setattr(doctor, "DISK_MIB", 10**9)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 0))
    checks = found(doctor.cheap_checks(str(checkpoint), "cuda", tmp_path))
    assert checks["mujoco"].remedy == "pip install mujoco==3.2.3"
    assert "3.9.9, expected 3.2.3" in checks["mujoco"].found
    assert checks["Python"].status == checks["disk"].status == "fail"
    assert "make room" in checks["disk"].remedy
    import torch

    if not torch.cuda.is_available():
        assert checks["device"] == Check(
            "device", "fail", "device cuda: no CUDA device is visible here; cpu always works"
        )


@pytest.mark.parametrize("output", ["/dev/null/results", "/etc/passwd", "file/results"])
def test_results_that_could_go_nowhere_are_red(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (check,) = [check for check in [doctor.disk(tmp_path / output)] if check.status == "fail"]
    assert check.found.startswith("expected a folder, found that")
    assert check.remedy == "choose another --output"


def test_a_policy_that_sees_nothing_is_red(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("libero_assets", "render_frame"):  # not what this is about
        monkeypatch.setattr(doctor, name, lambda name=name: Check(name, "ok", ""))
    seeing = RsdPolicy.predict
    monkeypatch.setattr(
        RsdPolicy, "predict", lambda self, observation: seeing(self, doctor.blank(self.image_size, 128))
    )
    checks, policy = diagnose(DoctorConfig(policy=str(checkpoint), output=tmp_path))
    assert policy is not None
    assert found(checks)["policy"].found == "a black and a white image give the same actions: it does not see"
    assert np.isfinite(policy.predict(doctor.blank(32, 0)).actions).all()


def test_a_checkpoint_is_shown(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["inspect", str(checkpoint), "--keys", "--provenance"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        *("8 x 7, steps shrink by rho = 2", "2, 2, 2, 2, 2, 1, 1, 0", "l1_error 0.123", "feature_drafter.level_head"),
        *("data.sources[0]       2 x", "data.sources[1].seed  2"),
    ):
        assert expected in printed, printed


def test_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run", "rsd", {2}, 40.0, range(3), trials=2)
    failed = episode(2, 1, success=False, failure="step limit", failure_detail="never moved")
    append_episode(directory / "episodes.jsonl", failed)
    append_episode(directory / "episodes.jsonl", episode(1, 1, success=False, failure="error: worker hung"))
    assert dispatch(["inspect", str(directory)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in ("2/4 = 50.0 %", "1 x step limit, 1 x", "error: libero_spatial task 1, initial state 1"):
        assert expected in printed, printed


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    assert dispatch(["inspect", str(tmp_path)]) == 2


def test_the_shipped_checkpoint_is_shown_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["inspect", "checkpoints/libero"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    for expected in ("total", "trained on", "spatial_permuted", "--provenance shows all"):
        assert expected in printed, expected
    assert "data.sources" not in printed


def test_a_folder_of_runs_is_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for decode, lost in (("ar", {0, 1}), ("l1", {1})):
        write_run(tmp_path / decode, decode, lost, 40.0, range(3))
    assert dispatch(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("1/3 = 33.3 %", "2/3 = 66.7 %", "success by task", f"rsd inspect {tmp_path / 'ar'}"):
        assert expected in printed, expected
    assert dispatch(["compare", str(tmp_path)]) == 0
    assert "paired difference" in capsys.readouterr().out
    assert dispatch(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
