"""The whole path in the real simulator: an untrained checkpoint, worker processes, results, videos."""

import io
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from rich.console import Console

from rsd.checkpoint import save_checkpoint
from rsd.evaluation.backend import LIBERO, libero_env
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.realtime import RealTime
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from rsd.evaluation.rollout import run_episode
from rsd.evaluation.video import FRAME_STEPS
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.target import TargetConfig
from rsd.sim.failures import WatchedLibero
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig

STEPS = 12  # of the suite's 220


def short_env(suite: str, task_id: int, image_size: int) -> WatchedLibero:
    env = libero_env(suite, task_id, image_size)
    env.max_steps = STEPS
    return env


SHORT_LIBERO = replace(LIBERO, make_env=short_env)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    chunks = torch.rand(200, 8, 7).numpy() * 2 - 1
    chunks[..., -1] = np.sign(chunks[..., -1])
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig())
    target = TargetConfig(image_size=64, channels=(16, 16, 32, 32), dim=64, layers=2, heads=2)
    config = PolicyConfig(target=target)
    save_checkpoint(RsdModel.of(config, tokenizer), tokenizer, config, {"data": "none"}, directory)
    return directory


def timeless(result: EpisodeResult) -> EpisodeResult:
    return replace(result, wall_s=0.0, latency_ms={})


@pytest.mark.simulator
def test_both_ways_of_decoding_alone_in_a_worker_and_with_a_video(untrained: Path, tmp_path: Path) -> None:
    config = EvalConfig(num_trials=1, tasks="3", init_states="4", policy=str(untrained), num_workers="1", videos="all")
    runs = [replace(config, decode=decode, output=str(tmp_path / decode)) for decode in ("ar", "rsd")]
    env = short_env(config.task_suite, 3, 64)
    alone = []
    for run in runs:
        rollout = run_episode(
            env,
            LIBERO.make_policy(run),
            suite=run.task_suite,
            task_id=3,
            task_name=env.task.name,  # type: ignore[attr-defined]
            init_state=4,
            seed=run.seed,
            decode=run.decode,
        )
        alone.append(timeless(rollout.result))
    env.close()
    assert [result.steps for result in alone] == [STEPS, STEPS], alone
    assert alone[0].target_passes > alone[1].target_passes

    summary = evaluate(runs[1], backend=SHORT_LIBERO, console=Console(file=io.StringIO()))
    assert summary.errors == 0, (tmp_path / "rsd" / "errors.log").read_text()
    (episode,) = read_episodes(tmp_path / "rsd" / EPISODES_FILE).values()
    assert timeless(episode) == alone[1]
    (video,) = (tmp_path / "rsd" / "videos").iterdir()
    assert video.name == "libero_spatial_task03_init04_failure.mp4"
    assert len(imageio.mimread(video, memtest=False)) == 1 + STEPS // FRAME_STEPS
    assert summary.versions["mujoco"] == "3.2.3"
    assert len(summary.policy["checkpoint_sha256"]) == 64
    assert len(summary.decoding.acceptance_per_level) == PolicyConfig().feature_drafter.levels


@pytest.mark.simulator
def test_in_real_time_an_episode_is_the_same(untrained: Path) -> None:
    env = short_env("libero_spatial", 3, 64)
    for decode in ("l1", "rsd-fused", "draft-first"):
        policy = LIBERO.make_policy(EvalConfig(policy=str(untrained), decode=decode))
        names = {"suite": "libero_spatial", "task_id": 3, "task_name": "", "init_state": 4, "seed": 7, "decode": decode}
        turns = run_episode(env, policy, **names, warmup=1)  # type: ignore[arg-type]
        real = run_episode(env, policy, **names, warmup=1, pace=RealTime(20.0))  # type: ignore[arg-type]
        assert all(np.array_equal(a, b) for a, b in zip(real.actions, turns.actions, strict=True))
        motion = real.result.chunk_stats
        stats = {name: values for name, values in motion.items() if name in turns.result.chunk_stats}
        assert replace(timeless(real.result), chunk_stats=stats, sources=[]) == timeless(turns.result)
        assert (real.result.steps, real.result.chunks) == (STEPS, 2)
        assert ("verify-pending" in real.result.latency_ms) == (decode == "draft-first")
        pause, undrawn = motion["pause_ms"][1], motion["pause_without_drawing_ms"][1]
        assert pause is not None
        assert undrawn is not None
        assert pause >= undrawn >= real.result.latency_ms["total"][1]
        assert real.result.wall_s > STEPS / 20
    env.close()
