"""SIGKILL of workers and of the whole evaluation at random moments; `scripts/kill_test.py` does it in LIBERO."""

import functools
import io
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scripted import SCRIPTED

from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from scripts.kill_test import running_workers


def run(config: EvalConfig) -> None:
    evaluate(config, backend=SCRIPTED, console=Console(file=io.StringIO()))


def timeless(result: EpisodeResult) -> EpisodeResult:
    return replace(result, wall_s=0.0, latency_ms={}, attempts=0)


@pytest.mark.parametrize("batch", [0, 2])
def test_kills_lose_nothing_and_repeat_nothing(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    config = EvalConfig(num_trials=4, policy="slow", num_workers="2", batch=batch, output=str(tmp_path / "killed"))
    undisturbed = replace(config, output=str(tmp_path / "undisturbed"))
    run(undisturbed)
    choose = random.Random(3)
    context = multiprocessing.get_context("spawn")
    episodes_file = config.output_dir / EPISODES_FILE
    seen = 0
    for victim in ("worker", "evaluation"):
        process = context.Process(target=functools.partial(run, config))
        process.start()
        before = len(read_episodes(episodes_file)) if episodes_file.exists() else 0
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            lines = episodes_file.read_text().count("\n") if episodes_file.exists() else 0
            if lines >= before + choose.randint(1, 4):
                break
            time.sleep(0.01)
        workers = running_workers(process.pid or 0) if process.is_alive() else []
        seen += len(workers)
        if victim == "evaluation":
            process.kill()
        elif workers:
            os.kill(choose.choice(workers), signal.SIGKILL)
            time.sleep(0.2)
            process.kill()
        process.join()
        assert gone(workers), "workers outlived the evaluation"
    assert seen > 0
    assert not list((tmp_path / "tmp").iterdir()), "a killed run leaves nothing behind"
    run(config)
    expected = {key: timeless(result) for key, result in read_episodes(undisturbed.output_dir / EPISODES_FILE).items()}
    assert {key: timeless(result) for key, result in read_episodes(episodes_file).items()} == expected
    assert len(expected) == 24


def gone(pids: list[int]) -> bool:
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
