"""A run says where it asks for what the policy was not made for; what it was made for passes without a word."""

import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from scripted import SCRIPTED
from test_backend import calibrate

from rsd.checkpoint import CALIBRATION_FILE, CONFIG_FILE, seal
from rsd.cli.eval import EvalArguments, plan_runs
from rsd.cli.parsing import parse
from rsd.collection import collect
from rsd.evaluation.backend import LIBERO
from rsd.evaluation.cautions import cautions
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate, plan_episodes
from rsd.sim.suites import suite_tasks

SHIPPED, OTHERS = "checkpoints/libero", "few_suites"
TAUGHT = "trained on libero_10, libero_goal, libero_goal_permuted, "
UNSEEN = "its training data holds no demonstration of "


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"decode": "rsd-skip"}, []),
        ({"control_hz": 20.0}, []),
        ({"policy": OTHERS, "task_suite": "libero_object"}, []),
        ({"policy": OTHERS, "task_suite": "libero_10", "tasks": "0,1"}, []),
        ({"task_suite": "libero_spatial_permuted,libero_object"}, []),
        ({"decode": "rsd-skip", "task_suite": "libero_object"}, []),  # by a schedule, which promises nothing anywhere
        (
            {"policy": OTHERS, "task_suite": "libero_spatial"},
            [f"{OTHERS}: trained on libero_10, libero_goal, libero_object, not on libero_spatial; expect it to fail"],
        ),
        ({"task_suite": "libero_90"}, [f"{SHIPPED}: {TAUGHT}"]),
        (
            {"policy": OTHERS, "task_suite": "libero_10"},
            [f"{OTHERS}: {UNSEEN}tasks 3, 5, 9 of libero_10; --tasks 0,1,2,4,6,7,8"],
        ),
        (
            {"policy": OTHERS, "task_suite": "libero_10,libero_goal", "tasks": "libero_10:3;libero_goal:1"},
            [f"{OTHERS}: {UNSEEN}task 3 of libero_10"],
        ),
        ({"control_hz": 10.0}, [f"{SHIPPED}: --control-hz 10: it was taught at 20 actions a second"]),
        ({"decode": "rsd-skip", "skip_threshold_mm": 20.0, "max_skips": 2}, []),
        ({"decode": "rsd-skip", "skip_threshold_mm": 20.0, "memory_chunks": 4}, []),
        (
            {"decode": "rsd-skip", "skip_threshold_mm": 20.0, "memory_chunks": 99},
            [f"{SHIPPED}: its drafter was trained to remember 1 to 6 chunks, asked to remember 99"],
        ),
        ({"policy": "ws://127.0.0.1:1", "task_suite": "libero_goal"}, []),  # the server's own affair
    ],
)
def test_what_was_not_taught_or_promised_is_said(
    options: dict[str, object], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.get("policy") == OTHERS:
        (tmp_path / OTHERS).mkdir()
        (tmp_path / OTHERS / CONFIG_FILE).write_text(json.dumps({"provenance": {"data": few_suites()}}))
        monkeypatch.chdir(tmp_path)
    found = cautions(EvalConfig(**{"decode": "l1", **options}))  # type: ignore[arg-type]
    assert len(found) == len(expected), found
    assert all(part in caution for part, caution in zip(expected, found, strict=True)), found


def few_suites() -> dict[str, object]:
    """Data of three suites, without three tasks of libero_10."""
    suites = {"libero_object": range(10), "libero_goal": range(10), "libero_10": (0, 1, 2, 4, 6, 7, 8)}
    told = [task.language for suite, tasks in suites.items() for task in suite_tasks(suite) if task.task_id in tasks]
    return {"sources": [{"settings": {"suite": suite}} for suite in suites], "instructions": told}


def test_collecting_sealing_and_serving_say_what_the_drafter_does_not_remember(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = "its drafter was trained to remember 1 to 6 chunks, asked to remember 99"
    monkeypatch.setattr(collect, "driving_policy", lambda config: SimpleNamespace(image_size=128))
    driven = collect.CollectConfig(tmp_path, policy=SHIPPED, policy_decode="rsd-skip", image_size=128)
    collect._check_policy(driven)
    assert capsys.readouterr().err == ""
    collect._check_policy(replace(driven, policy_skip_threshold_mm=20.0, policy_memory_chunks=99))
    assert capsys.readouterr().err == f"warning: {SHIPPED}: {expected}\n"
    shutil.copytree(SHIPPED, tmp_path / "copy")
    calibrate(tmp_path / "copy", "libero_goal")
    path = tmp_path / "copy" / CALIBRATION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "memory_chunks": 99}))
    seal(tmp_path / "copy")
    assert expected in caplog.text
    served = EvalConfig(policy=str(tmp_path / "copy"), task_suite="libero_goal", decode="rsd-skip")
    assert cautions(served, suites=False) == [f"{tmp_path / 'copy'}: {expected}"]


def test_an_image_size_that_the_data_did_not_have(checkpoint: Path) -> None:
    path = checkpoint / CONFIG_FILE
    content = json.loads(path.read_text())
    size = content["policy"]["target"]["image_size"]
    content["provenance"] = {"data": {"sources": [{"rendering": {"image_size": size}}]}}
    path.write_text(json.dumps(content))
    config = EvalConfig(policy=str(checkpoint), decode="l1", task_suite="libero_goal")
    assert cautions(config) == []  # nothing is known of suites and tasks, so nothing is said of them
    content["provenance"]["data"]["sources"][0]["rendering"]["image_size"] = 2 * size
    path.write_text(json.dumps(content))
    assert cautions(config) == [f"{checkpoint}: looks at images of {size} pixels, trained on {2 * size}"]


def test_a_run_says_where_its_calibration_promises_nothing(checkpoint: Path) -> None:
    calibrate(checkpoint, "libero_goal,libero_10")
    config = EvalConfig(policy=str(checkpoint), decode="rsd-skip", task_suite="libero_10,libero_90,libero_object")
    expected = "calibrated for libero_goal, libero_10, not for libero_90, libero_object, where it promises nothing"
    assert f"{checkpoint}: rsd-skip: {expected}; --audit" in cautions(config)[-1]
    goal, given = replace(config, task_suite="libero_goal"), replace(config, skip_threshold_mm=20.0)
    for silent in (goal, given, replace(config, decode="l1")):
        assert not any("calibrated" in caution for caution in cautions(silent))


def told(config: EvalConfig) -> list[str]:
    return ["taught [something] else"]


def test_an_evaluation_prints_each_caution_once(tmp_path: Path) -> None:
    backend = replace(SCRIPTED, cautions=told)
    console, warned = Console(file=io.StringIO(), record=True), set[str]()
    for name in ("a", "b"):
        config = EvalConfig(num_trials=1, tasks="1", policy="good", num_workers="1", output=str(tmp_path / name))
        evaluate(config, backend=backend, console=console, warned=warned)
    assert console.export_text().count("warning: taught [something] else\n") == 1


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md"])
def test_the_examples_ask_for_what_the_policies_can_do(page: str) -> None:
    text = Path(page).read_text().replace("\\\n", " ")
    lines = [line.split("#")[0].split(" ", 2)[2] for line in re.findall(r"^rsd eval .*$", text, re.MULTILINE)]
    assert len(lines) >= {"README.md": 2, "docs/evaluation.md": 5}[page]
    for line in lines:
        elsewhere = any(policy in line for policy in ("ws://", "DIR", "--policy runs/"))  # not of a policy that ships
        options = parse(EvalArguments, [] if elsewhere else shlex.split(line), "rsd eval")
        for config, _ in plan_runs(options):
            assert len(plan_episodes(config, LIBERO)) <= 500, line
            foreign = [caution for caution in cautions(config) if "_lan" not in caution]
            assert not foreign, (line, foreign)
