"""Videos of finished episodes, replayed from their executed actions.

The episode itself never renders more than the policy asks for: the simulator repeats bit for bit, so a replay
shows the same episode, and whether a video is made cannot change a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsd.conventions import CONTROL_HZ
from rsd.evaluation.results import EpisodeResult
from rsd.evaluation.rollout import Rollout
from rsd.types import RsdError

if TYPE_CHECKING:
    from rsd.evaluation.rollout import Environment

FRAME_STEPS = 2  # control steps a frame: drawing costs ten times as much as physics without a GPU
PANEL = 256  # side of one camera's panel in pixels
STRIP = 16  # height of the strip below the panels
CAPTION = 24  # height of the line of text above the panels
VIDEOS_DIR = "videos"  # in a run's directory
NOTHING_DRAFTED = (70, 70, 70)
REJECTED, ACCEPTED = np.array([200.0, 60.0, 40.0]), np.array([60.0, 170.0, 80.0])


def video_name(result: EpisodeResult) -> str:
    outcome = "success" if result.success else "failure"
    return f"{result.suite}_task{result.task_id:02d}_init{result.init_state:02d}_{outcome}.mp4"


def replay_video(env: Environment, rollout: Rollout, path: Path) -> None:
    """Execute the rollout's actions again and write an mp4 in real time, both cameras side by side.

    The strip at the bottom has one field a chunk, from red (no drafted level accepted) to green (all),
    grey where nothing was drafted. Raises RsdError if the replay ends otherwise than the episode did.
    """
    write_video(path, (2 * PANEL, CAPTION + PANEL + STRIP), _replayed(env, rollout))


def write_video(path: Path, size: tuple[int, int], frames: Iterable[NDArray[np.uint8]]) -> None:
    """Frames [height, width, 3], one every FRAME_STEPS steps, as an mp4 in real time. size: width, height."""
    import imageio_ffmpeg  # type: ignore[import-untyped]  # what makes no videos does not need it

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")  # a kill leaves no half video under the video's name
    options: dict[str, Any] = {"macro_block_size": 1, "ffmpeg_log_level": "error", "output_params": ["-f", "mp4"]}
    writer = imageio_ffmpeg.write_frames(str(unfinished), size, fps=CONTROL_HZ / FRAME_STEPS, **options)
    writer.send(None)  # starts the encoder
    try:
        for each in frames:
            writer.send(np.ascontiguousarray(each))
    finally:
        writer.close()
    unfinished.replace(path)


def _replayed(env: Environment, rollout: Rollout) -> Iterator[NDArray[np.uint8]]:
    result, steps, terminated = rollout.result, 0, False
    colours = strip_colours(result)
    env.reset(options={"init_state": result.init_state})
    yield frame(env.observation().images, colours, 0, result.instruction, 0)
    for chunk, actions in enumerate(rollout.actions, start=1):
        for first in range(0, len(actions), FRAME_STEPS):
            executed = actions[first : first + FRAME_STEPS]
            seen = rollout.seen[chunk : chunk + 1] if first + FRAME_STEPS >= len(actions) else ()  # drawn already
            _, _, terminated, _, _ = env.step_chunk(executed, draw=not seen)
            steps += len(executed)
            images = seen[0] if seen else env.observation().images
            yield frame(images, colours, chunk, result.instruction, steps)
    if terminated != result.success:
        raise RsdError(
            f"replay of task {result.task_id}, initial state {result.init_state}: the episode ended in "
            f"{'success' if result.success else 'failure'}, its replay did not: the simulator does not repeat"
        )


def strip_colours(result: EpisodeResult) -> list[tuple[int, ...]]:
    """One RGB colour a chunk, by the share of drafted levels that were accepted."""
    levels = len(result.num_draft_tokens)
    if len(result.accepted_levels) != result.chunks:
        return [NOTHING_DRAFTED] * result.chunks
    shares = [accepted / levels for accepted in result.accepted_levels]
    return [tuple(int(v) for v in REJECTED + share * (ACCEPTED - REJECTED)) for share in shares]


def frame(
    images: NDArray[np.uint8], colours: list[tuple[int, ...]], chunks: int, instruction: str, step: int
) -> NDArray[np.uint8]:
    """Images uint8 [2, S, S, 3] -> frame [CAPTION + PANEL + STRIP, 2 * PANEL, 3] whose strip shows `chunks` fields."""
    rows = np.arange(PANEL) * images.shape[1] // PANEL  # nearest neighbour, whatever S is
    panels = np.concatenate([image[rows][:, rows] for image in images], axis=1)
    strip = np.zeros((STRIP, 2 * PANEL, 3), dtype=np.uint8)
    edges = np.linspace(0, 2 * PANEL, max(len(colours), 1) + 1).astype(int)
    for field, colour in enumerate(colours[:chunks]):
        strip[2:, edges[field] : max(edges[field + 1] - 1, edges[field] + 1)] = colour
    return np.concatenate([caption(instruction, step), panels, strip])


def caption(instruction: str, step: int) -> NDArray[np.uint8]:
    """The instruction, cut to what fits, and the step on the right: uint8 [CAPTION, 2 * PANEL, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    line = Image.new("RGB", (2 * PANEL, CAPTION), (24, 28, 34))
    draw = ImageDraw.Draw(line)
    right = f"step {step}"
    room = 2 * PANEL - 20 - draw.textlength(right, font=font)
    text = instruction
    while draw.textlength(text, font=font) > room:
        text = text.removesuffix("...")[:-1].rstrip() + "..."
    draw.text((6, 5), text, font=font, fill=(235, 235, 235))
    draw.text((2 * PANEL - 6, 5), right, font=font, fill=(170, 180, 190), anchor="ra")
    return np.asarray(line)
