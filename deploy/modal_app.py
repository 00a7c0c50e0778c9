"""Evaluation on Modal (modal.com): shards of one run side by side, merged into one results directory.

    pip install modal && modal setup
    modal run deploy/modal_app.py --task-suite libero_spatial --num-trials 50 --use-speculative-decoding True
    modal run deploy/modal_app.py --num-trials 3                      # a quick look
    modal volume get rsd-results libero_spatial-best results/         # results, videos and report to here

An interrupted run continues with the same command. The bodies below only call what the package tests.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import modal

ROOT = Path(__file__).resolve().parent.parent
SOURCE, RESULTS, CHECKPOINTS = "/opt/rsd-vla", "/results", "/checkpoints"

image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("libegl1", "libgl1", "libglib2.0-0", "libosmesa6")
    .add_local_dir(ROOT / "src", f"{SOURCE}/src", copy=True)
    .add_local_dir(ROOT / "checkpoints", f"{SOURCE}/checkpoints", copy=True)
    .add_local_file(ROOT / "pyproject.toml", f"{SOURCE}/pyproject.toml", copy=True)
    .add_local_file(ROOT / "requirements.lock", f"{SOURCE}/requirements.lock", copy=True)
    .add_local_file(ROOT / "README.md", f"{SOURCE}/README.md", copy=True)
    .add_local_file(ROOT / "LICENSE", f"{SOURCE}/LICENSE", copy=True)
    .run_commands(f"pip install -c {SOURCE}/requirements.lock -e '{SOURCE}[openvla]'")
    .env({"NVIDIA_DRIVER_CAPABILITIES": "all"})  # without `graphics` EGL does not draw
    .workdir(SOURCE)
)
app = modal.App("rsd-eval", image=image)
results = modal.Volume.from_name("rsd-results", create_if_missing=True)
checkpoints = modal.Volume.from_name("rsd-checkpoints", create_if_missing=True)
VOLUMES: dict[str, modal.Volume] = {RESULTS: results, CHECKPOINTS: checkpoints}


@app.function(gpu="L4", cpu=8.0, memory=16384, timeout=4 * 3600, volumes=VOLUMES, retries=1)
def evaluate_shard(options: dict[str, object]) -> str:
    from rsd.evaluation.config import EvalConfig
    from rsd.evaluation.launchers import run_shard

    try:
        return run_shard(EvalConfig(**options))
    finally:
        results.commit()


@app.function(timeout=1800, volumes=VOLUMES)
def merge(output: str) -> str:
    from rsd.reporting.html_report import merge_and_report

    results.reload()
    table = merge_and_report(Path(output))
    results.commit()
    return table


@app.local_entrypoint()
def main(
    task_suite: str = "libero_spatial",
    num_trials: int = 50,
    use_speculative_decoding: str = "True",
    policy: str = "checkpoints/libero",
    videos: str = "failures",
    shards: int = 4,
) -> None:
    """policy: a directory of this repository, of the volume (/checkpoints/...), or a hub id."""
    from rsd.evaluation.launchers import cloud_config, shard_configs

    config = cloud_config(task_suite, num_trials, use_speculative_decoding, policy, videos, Path(RESULTS))
    for directory in evaluate_shard.map([asdict(part) for part in shard_configs(config, shards)]):
        print(f"finished: {directory}")
    print(merge.remote(str(config.output_dir)))
