"""`rsd expert run`: the scripted expert on random placements of one task, and why it fails where it does."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rsd.checks import Checked, Rules, Seed, between
from rsd.cli.parsing import check_output
from rsd.output import shown, writing
from rsd.types import RsdError

if TYPE_CHECKING:  # help and mistakes in the command line start no simulator
    from numpy.typing import NDArray

    from rsd.sim.libero import LiberoEnv

FRAME_STEPS = 2  # of the video, as of an evaluation's


@dataclass(frozen=True)
class ExpertRunConfig(Checked):
    """Run the scripted expert on placements of one task; exit status 1 if it fails on one."""

    suite: str = "libero_spatial"
    """Suite."""
    task: Annotated[int, between(0, 1000)] = 0
    """Task id."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Placement seeds, one episode each."""
    video: Path | None = None
    """Write the first seed's episode as an mp4 here; nothing that is there is replaced."""

    def rules(self) -> Rules:
        yield bool(self.seeds), "--seeds to be at least one placement seed", "none"
        mp4 = self.video is None or self.video.suffix.lower() == ".mp4"
        yield mp4, "--video to name a file that ends in .mp4", str(self.video)


def run(config: ExpertRunConfig) -> int:
    from rsd.expert.goals import task_goals
    from rsd.sim.libero import LiberoEnv

    if config.video is not None:
        check_output(f"--video {config.video}", config.video, "file")
        if config.video.exists():
            raise RsdError(f"--video {config.video}: expected a new file; name another or remove it")
    task_goals(config.suite, config.task)  # refuses before the simulator starts
    print(f"{config.suite} task {config.task}: starting the simulator", file=sys.stderr)
    env = LiberoEnv(config.suite, config.task, cameras=config.video is not None)
    failed = 0
    try:
        for number, seed in enumerate(shown(config.seeds, "seeds done", len(config.seeds))):
            failed += not _episode(env, seed, config.video if number == 0 else None)
    finally:
        env.close()
    print(f"{len(config.seeds) - failed} of {len(config.seeds)}: {env.instruction}")
    return int(failed > 0)


def _episode(env: LiberoEnv, seed: int, video: Path | None) -> bool:
    """One episode, a line about it; whether it succeeded."""
    from rsd.expert.expert import run as run_expert
    from rsd.expert.failures import failure_class

    env.reset(options={"placement_seed": seed})
    images: list[NDArray[Any]] = []
    steps = itertools.count()

    def keep(env: LiberoEnv, *_: object) -> None:
        """The third-person camera's picture."""
        if next(steps) % FRAME_STEPS == 0:
            images.append(env.render())

    result = run_expert(env, record=None if video is None else keep, draw=video is not None)
    why = "" if result.success else f": {failure_class(env, result.steps)}"
    print(f"seed {seed}: {'success' if result.success else 'failure'} after {result.steps} steps{why}", flush=True)
    if video is not None:
        from rsd.evaluation.video import write_video  # a run without a video does not need it

        with writing(video):
            write_video(video, images[0].shape[1::-1], images)
        print(f"video: {video}")
    return result.success
