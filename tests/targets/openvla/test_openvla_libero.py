"""`rsd eval --policy DIR` with small random checkpoints in OpenVLA's format: the plumbing, not the success."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from openvla_checkpoint import write_checkpoint, write_heads, write_rsd_policy
from rsd.cli import dispatch
from rsd.evaluation.backend import LIBERO, libero_env
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, STEP_LIMIT, read_episodes, read_run_record
from rsd.sim.failures import WatchedLibero
from rsd.tokenizer.action_tokenizer import ActionTokenizer

STEPS = 10  # of the suite's 220


def short_env(suite: str, task_id: int, image_size: int) -> WatchedLibero:
    assert image_size == 256  # what the published evaluation renders
    env = libero_env(suite, task_id, image_size)
    env.max_steps = STEPS
    return env


SHORT_LIBERO = replace(LIBERO, make_env=short_env)


@pytest.mark.simulator
def test_oft_drives_a_closed_loop_and_its_run_can_be_continued(tmp_path: Path) -> None:
    directory = write_heads(write_checkpoint(tmp_path / "oft"))
    config = EvalConfig(
        num_trials=1, tasks="0", policy=str(directory), decode="l1", num_workers="1", output=str(tmp_path / "run")
    )
    console = Console(file=io.StringIO())
    summary = evaluate(config, backend=SHORT_LIBERO, console=console)
    (episode,) = read_episodes(Path(config.output) / EPISODES_FILE).values()
    assert (summary.errors, episode.failure) == (0, STEP_LIMIT)
    assert (episode.steps, episode.chunks, episode.prefills, episode.target_passes) == (STEPS, 2, 2, 0)
    assert {"preprocess", "vision", "prefill", "decode", "total"} <= set(episode.latency_ms)
    recorded = read_run_record(Path(config.output)).policy
    assert set(recorded) == {"policy", "engine", "checkpoint_fingerprint", "execute"}
    assert recorded["engine"] == "eager"
    assert evaluate(config, backend=SHORT_LIBERO, console=console).episodes == 1  # nothing is run again


@pytest.mark.simulator
def test_residual_tokens_on_openvla_drive_a_closed_loop(tmp_path: Path, tokenizer: ActionTokenizer) -> None:
    base = write_checkpoint(tmp_path / "openvla")
    directory = write_rsd_policy(tmp_path / "policy", base, tokenizer)
    config = EvalConfig(
        num_trials=1,
        tasks="0",
        policy=str(directory),
        decode="rsd-skip",
        skip_threshold_mm=1e9,
        max_skips=1,
        audit=True,
        num_workers="1",
        output=str(tmp_path / "run"),
    )
    summary = evaluate(config, backend=SHORT_LIBERO, console=Console(file=io.StringIO()))
    (episode,) = read_episodes(Path(config.output) / EPISODES_FILE).values()
    assert (summary.errors, episode.failure, episode.chunks) == (0, STEP_LIMIT, 2)
    assert (episode.prefills, episode.target_passes) == (
        1,
        0,
    )  # the first chunk as `rsd-fused`, the second without target
    assert episode.chunk_stats["skipped"] == [0.0, 1.0]
    recorded = read_run_record(Path(config.output)).policy
    assert recorded["checkpoint_sha256"]
    assert recorded["provenance"] == {"data": "random weights"}


def test_what_an_openvla_directory_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_checkpoint(tmp_path / "openvla")
    command = ["eval", "--policy", str(directory), "--num-trials", "1", "--tasks", "0", "--num-workers", "1"]
    output = ["--output", str(tmp_path / "run")]
    assert dispatch([*command, *output, "--use-speculative-decoding", "True"]) == 2
    assert "True: " + str(directory) + " decodes by ar alone, without a draft" in capsys.readouterr().err
    assert dispatch([*command, *output, "--compare"]) == 2
    assert "rsd train policy --backbone openvla for OpenVLA" in capsys.readouterr().err
    assert dispatch([*command, *output, "--decode", "rsd-fused"]) == 2
    assert "--decode 'rsd-fused': expected one of ar, l1, discrete" in capsys.readouterr().err
    assert dispatch([*command, *output, "--task-suite", "libero_goal"]) == 2  # `ar`, as its files say
    printed = capsys.readouterr().err
    assert "decodes by ar: what this OpenVLA checkpoint was trained for" in printed
    assert "no statistics of 'libero_goal'" in printed
    assert dispatch([*command, *output, "--decode", "l1"]) == 2
    assert "has no action_head--*_checkpoint.pt; it decodes with ar" in capsys.readouterr().err
