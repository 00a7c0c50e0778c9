"""The whole path in the real simulator: an untrained checkpoint, worker processes, results, videos."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rsd.evaluation.backend import LIBERO, libero_env
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.report import load_runs, table_rows
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from rsd.evaluation.rollout import Environment
from rsd.models.main import MainConfig
from rsd.policy import PolicyConfig, RsdModel, save_checkpoint
from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig

STEPS = 20  # of the suite's 220


def short_env(suite: str, task_id: int, image_size: int) -> Environment:
    env = libero_env(suite, task_id, image_size)
    env.max_steps = STEPS  # type: ignore[attr-defined]
    return env


SHORT_LIBERO = replace(LIBERO, make_env=short_env)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    chunks = torch.rand(200, 8, 7).numpy() * 2 - 1
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig())
    config = PolicyConfig(main=MainConfig(image_size=64, channels=(16, 16, 32, 32), dim=64, layers=2, heads=2))
    save_checkpoint(RsdModel(config, tokenizer), tokenizer, config, {"data": "none"}, directory)
    return directory


def run(config: EvalConfig) -> list[EpisodeResult]:
    summary = evaluate(config, backend=SHORT_LIBERO, console=Console(file=io.StringIO()))
    assert summary.errors == 0, (config.output_dir / "errors.log").read_text()
    episodes = read_episodes(config.output_dir / EPISODES_FILE).values()
    return [replace(episode, wall_s=0.0, latency_ms={}) for episode in episodes]


@pytest.mark.simulator
def test_both_ways_of_decoding_in_the_simulator_and_videos_change_nothing(
    untrained: Path, tmp_path: Path
) -> None:
    config = EvalConfig(
        num_trials=1,
        tasks="3",
        init_states=4,
        policy=str(untrained),
        num_workers="1",
        output=str(tmp_path / "rsd"),
    )
    plain = run(config)
    filmed = run(replace(config, videos="all", output=str(tmp_path / "filmed")))
    assert filmed == plain
    videos = list((tmp_path / "filmed" / "videos").iterdir())
    assert [video.name for video in videos] == ["task03_init04_failure.mp4"]
    assert videos[0].stat().st_size > 10_000

    baseline = run(replace(config, decode="ar", output=str(tmp_path / "ar")))
    assert [episode.steps for episode in baseline + plain] == [STEPS, STEPS]
    assert baseline[0].main_passes > plain[0].main_passes
    rows = dict(table_rows(load_runs([tmp_path / "ar", tmp_path / "rsd"])))
    assert rows["success"][0].startswith("0/1")
    assert rows["accepted per level"][1].count("%") == len(plain[0].num_draft_tokens) > 0
