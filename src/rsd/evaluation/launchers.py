"""An evaluation in shards: as jobs of a SLURM cluster, or on Modal."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsd.evaluation.backend import LIBERO
from rsd.evaluation.config import EvalConfig
from rsd.extras import extra
from rsd.types import BEST, RsdError


def run_shard(config: EvalConfig) -> str:
    """One shard of a run, as a cluster's job runs it; returns its directory."""
    from rsd.evaluation.evaluate import evaluate

    evaluate(config, backend=LIBERO)
    return str(config.output_dir)


def shard_configs(config: EvalConfig, shards: int) -> list[EvalConfig]:
    """The parts of a run; all write into directories of their own in `config.output_dir`."""
    if shards < 1:
        raise RsdError(f"--shards {shards}: expected at least 1")
    return [replace(config, shard=f"{part}/{shards}", output=str(config.output_dir)) for part in range(shards)]


def submit_shards(
    config: EvalConfig, shards: int, cluster: str = "slurm", parameters: dict[str, Any] | None = None
) -> Sequence[Any]:
    """Submit one job a shard by submitit and return the jobs; `merge_shards` puts the results together afterwards.

    cluster: slurm, or local for processes of this machine (to try it out). parameters: submitit's, such as
    slurm_partition, timeout_min, cpus_per_task.
    """
    with extra("slurm"):
        import submitit
    if cluster == "slurm" and shutil.which("srun") is None:
        found = "--cluster slurm: expected SLURM's srun and sbatch, found none here"
        raise RsdError(f"{found}; run this on the cluster's login node, or try it with --cluster local")
    folder = config.output_dir / "jobs"
    with nothing_left(folder), refusals("the jobs were refused"):
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name="rsd-eval", **(parameters or {}))
        return executor.map_array(run_shard, shard_configs(config, shards))


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """What fails inside leaves the folder, and those above it, as they were: without the jobs that nobody will run."""
    before = set(folder.glob("*"))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in set(folder.glob("*")) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in new:
                path.rmdir()
        raise


def wait_for(jobs: Sequence[Any]) -> None:
    """Raises RsdError where a job failed, once all have ended."""
    for job in jobs:
        job.wait()
    for job in jobs:
        with refusals(f"job {job.job_id} failed, see {job.paths.stderr}"):
            job.result()


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """What submitit raises, with the output of SLURM or the traceback of a job in it, as one line."""
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError  # an extra

    try:
        yield
    except (FailedSubmissionError, UncompletedJobError) as error:
        told = str(error).partition("You can check full logs")[0]
        lines = [line.strip() for line in told.splitlines() if line.strip(" -")]
        raise RsdError(f"{what} ({lines[-1]:.300})") from error


def cloud_config(
    task_suite: str, num_trials: int, use_speculative_decoding: str, policy: str, videos: str, root: Path
) -> EvalConfig:
    """The run that `deploy/modal_app.py` is asked for. Raises RsdError for what cannot be run."""
    decodes = {"true": BEST, "false": "ar"}  # which one is best is seen where the checkpoint is
    decode = decodes.get(use_speculative_decoding.lower())
    if decode is None:
        raise RsdError(f"--use-speculative-decoding '{use_speculative_decoding}': expected True or False")
    options: dict[str, Any] = {"policy": policy, "decode": decode, "videos": videos, "device": "cuda"}
    config = EvalConfig(task_suite=task_suite, num_trials=num_trials, **options)
    return replace(config, output=str(root / f"{'+'.join(config.suites)}-{decode}"))
