"""Ray on one node, submitit on this machine, the Modal app's import; and what each refuses."""

import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scripted import SCRIPTED

import rsd.evaluation.launchers as launchers
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.evaluate import evaluate
from rsd.evaluation.launchers import cloud_config, shard_configs, submit_shards, wait_for
from rsd.evaluation.results import EPISODES_FILE, EpisodeResult, read_episodes
from rsd.reporting.html_report import merge_and_report
from rsd.types import RsdError


def run(config: EvalConfig) -> str:
    console = Console(file=io.StringIO(), width=200)
    evaluate(config, backend=SCRIPTED, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def timeless(config: EvalConfig) -> set[str]:
    episodes: list[EpisodeResult] = list(read_episodes(config.output_dir / EPISODES_FILE).values())
    return {str(replace(e, wall_s=0.0, latency_ms={}, attempts=1)) for e in episodes}


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    return EvalConfig(num_trials=2, tasks="0,2", policy="good", num_workers="2", output=str(tmp_path / "run"))


def test_ray_gives_the_episodes_that_processes_give(config: EvalConfig, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="an extra: pip install 'rsd-vla[ray]'")
    run(config)
    path = {"env_vars": {"PYTHONPATH": ":".join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    try:
        on_ray = replace(config, launcher="ray", output=str(tmp_path / "ray"))
        run(on_ray)
        assert timeless(on_ray) == timeless(config)
        flaky = replace(on_ray, policy=f"once:{tmp_path}/marker:dies:0.1", output=str(tmp_path / "flaky"))
        log = run(flaky)
        assert "Ray actor died; begun anew" in log
        assert timeless(flaky) == timeless(config)
        with pytest.raises(RsdError, match="expected a checkpoint directory"):
            run(replace(on_ray, policy="missing", output=str(tmp_path / "missing")))
    finally:
        ray.shutdown()


def test_ray_refuses_what_its_actors_cannot_do(config: EvalConfig) -> None:
    with pytest.raises(RsdError, match="--launcher ray"):
        replace(config, launcher="ray", batch=4)
    with pytest.raises(RsdError, match="launcher: expected one of local, ray"):
        replace(config, launcher="rya")  # type: ignore[arg-type]


def scripted_shard(config: EvalConfig) -> str:
    evaluate(config, backend=SCRIPTED)
    return str(config.output_dir)


def test_jobs_of_submitits_local_executor_make_one_run(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own that find their task in a file, as SLURM's do."""
    monkeypatch.setattr(launchers, "run_shard", scripted_shard)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    config = replace(config, num_workers="1")
    jobs = submit_shards(config, 2, "local", {"timeout_min": 2})
    fails = submit_shards(replace(config, policy="missing", output=f"{config.output}2"), 1, "local", {"timeout_min": 2})
    wait_for(jobs)
    assert [Path(job.result()).name for job in jobs] == ["shard-0-of-2", "shard-1-of-2"]
    assert "4/4 = 100.0 %" in merge_and_report(config.output_dir)
    assert len(timeless(config)) == 4
    assert (config.output_dir / "report.html").is_file()
    line = r"job .* failed, see .*\.err \(.*RsdError: missing: expected a checkpoint"
    with pytest.raises(RsdError, match=line) as raised:
        wait_for(fails)
    assert "\n" not in str(raised.value)


def scheduler(folder: Path, says: str) -> None:
    for name in ("srun", "sbatch"):
        (folder / name).write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
        (folder / name).chmod(0o755)


def test_a_cluster_that_is_not_there_or_refuses_is_a_line(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RsdError, match=r"expected SLURM's srun and sbatch, found none here; .* --cluster local"):
        submit_shards(config, 2)
    assert not config.output_dir.exists()
    scheduler(tmp_path, "sbatch: error: invalid partition specified")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RsdError, match=r"the jobs were refused \(.*invalid partition specified\)"):
        submit_shards(config, 2)
    assert not config.output_dir.exists()
    (config.output_dir / "jobs").mkdir(parents=True)
    (config.output_dir / "jobs" / "earlier").touch()
    with pytest.raises(RsdError, match="the jobs were refused"):
        submit_shards(config, 2)
    assert [path.name for path in config.output_dir.rglob("*")] == ["jobs", "earlier"]


def test_the_cloud_run_is_the_one_that_was_asked_for() -> None:
    config = cloud_config("libero_spatial", 3, "False", "checkpoints/libero", "none", Path("/results"))
    assert (config.decode, config.num_trials, str(config.output_dir)) == ("ar", 3, "/results/libero_spatial-ar")
    parts = shard_configs(config, 2)
    assert [str(part.output_dir) for part in parts] == [
        "/results/libero_spatial-ar/shard-0-of-2",
        "/results/libero_spatial-ar/shard-1-of-2",
    ]
    assert {part.hash for part in parts} == {config.hash}
    with pytest.raises(RsdError, match="expected True or False"):
        cloud_config("libero_spatial", 3, "maybe", "checkpoints/libero", "none", Path("/results"))
    with pytest.raises(RsdError, match="--shards 0"):
        shard_configs(config, 0)


def test_the_modal_app_imports() -> None:
    modal = pytest.importorskip("modal", reason="an extra: pip install 'rsd-vla[modal]'")
    path = Path(__file__).parents[2] / "deploy" / "modal_app.py"
    spec = importlib.util.spec_from_file_location("modal_app", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.app, modal.App)
    assert isinstance(module.evaluate_shard, modal.Function)
    assert isinstance(module.merge, modal.Function)
    assert set(module.VOLUMES) == {"/results", "/checkpoints"}
