"""`rsd submit`: an evaluation as SLURM jobs, one a shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from rsd.checks import between
from rsd.cli.eval import check_idle, check_names
from rsd.cli.parsing import UsageError
from rsd.cli.runs import MergeArguments, merge
from rsd.evaluation.config import EvalConfig
from rsd.output import terminal


@dataclass(frozen=True)
class SubmitArguments:
    """Run an evaluation as jobs of a cluster, a shard of the episodes each; options as for `rsd eval`."""

    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    shards: Annotated[int, between(1, 100_000)] = 4
    """Jobs."""
    cluster: Literal["slurm", "local"] = "slurm"
    """slurm, or local: processes of this machine, to try it out."""
    partition: str = ""
    """SLURM partition."""
    minutes: Annotated[int, between(1, 1e6)] = 240
    """Time limit of a job."""
    cpus: Annotated[int, between(1, 4096)] = 8
    """Cores of a job: as many workers."""
    gpus: Annotated[int, between(0, 64)] = 0
    """GPUs of a job."""
    wait: bool = False
    """Wait for the jobs and merge their results."""


def run(options: SubmitArguments) -> int:
    config = options.config
    if config.shard:
        raise UsageError("--shard is what the jobs get; ask for a number of --shards")
    check_idle(config)
    if options.partition and options.cluster == "local":
        raise UsageError(f"--partition {options.partition}: expected --cluster slurm with it, found local")
    from rsd.evaluation.backend import LIBERO, settle
    from rsd.evaluation.cautions import cautions
    from rsd.evaluation.evaluate import plan_episodes
    from rsd.evaluation.launchers import submit_shards, wait_for

    config, chosen = settle(config)
    check_names(config)
    if options.shards > (planned := len(plan_episodes(config, LIBERO))):
        raise UsageError(f"--shards {options.shards}: expected at most {planned}, as there are episodes")

    parameters: dict[str, object] = {"timeout_min": options.minutes, "cpus_per_task": options.cpus}
    parameters["gpus_per_node"] = options.gpus
    if options.partition:
        parameters["slurm_partition"] = options.partition
    jobs = submit_shards(config, options.shards, options.cluster, parameters)
    console = terminal(stderr=True, soft_wrap=True, highlight=False)
    if chosen:
        console.print(chosen)
    for caution in cautions(config):
        console.print(f"warning: {caution}", style="yellow", markup=False)
    console.print(f"jobs {', '.join(str(job.job_id) for job in jobs)}; logs in {config.output_dir / 'jobs'}")
    if not options.wait:
        console.print(f"when they are done: rsd merge {config.output_dir}")
        return 0
    wait_for(jobs)
    return merge(MergeArguments(config.output_dir))
