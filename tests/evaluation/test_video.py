from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from scripted import CountingEnv, ScriptedPolicy, episode
from test_rollout import roll

from rsd.evaluation.video import (
    CAPTION,
    FRAME_STEPS,
    NOTHING_DRAFTED,
    PANEL,
    STRIP,
    caption,
    frame,
    replay_video,
    strip_colours,
    video_name,
)
from rsd.types import RsdError


def test_a_replay_shows_the_start_and_the_whole_of_every_chunk(tmp_path: Path) -> None:
    env = CountingEnv("any", 2, 8)
    rollout = roll(env, ScriptedPolicy())
    path = tmp_path / "videos" / video_name(rollout.result)
    replay_video(env, rollout, path)
    frames = imageio.mimread(path, memtest=False)
    chunk_frames = [-(-len(actions) // FRAME_STEPS) for actions in rollout.actions]
    assert len(frames) == 1 + sum(chunk_frames)
    assert frames[0].shape == (CAPTION + PANEL + STRIP, 2 * PANEL, 3)
    assert path.name == "any_task02_init00_success.mp4"


def test_what_the_policy_saw_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = CountingEnv("any", 2, 8)
    rollout = roll(env, ScriptedPolicy())
    drawn = list[bool]()
    step_chunk = env.step_chunk
    monkeypatch.setattr(env, "step_chunk", lambda actions, draw=True: (drawn.append(draw), step_chunk(actions))[1])
    assert [int(images[0, 0, 0, 0]) for images in rollout.seen] == [0, 4, 8]  # CountingEnv draws its steps
    for seen in (rollout.seen, ()):
        replay_video(env, replace(rollout, seen=seen), tmp_path / f"{len(seen)}.mp4")
    assert drawn == [True, False, True, False, True, True] + [True] * 6
    videos = [imageio.mimread(tmp_path / f"{n}.mp4", memtest=False) for n in (3, 0)]
    np.testing.assert_array_equal(*videos)


def test_a_replay_that_ends_otherwise_is_an_error(tmp_path: Path) -> None:
    env = CountingEnv("any", 2, 8)
    rollout = roll(env, ScriptedPolicy())
    shorter = replace(rollout, actions=rollout.actions[:-1])
    with pytest.raises(RsdError, match="does not repeat"):
        replay_video(env, shorter, tmp_path / "video.mp4")


def test_the_strip_goes_from_red_to_green_and_is_grey_without_a_draft() -> None:
    none, some, every = strip_colours(
        episode(chunks=3, num_drafts=3, accepted_levels=[0, 1, 3], latency_ms={"total": [1.0] * 3})
    )
    assert none[0] > some[0] > every[0]
    assert none[1] < some[1] < every[1]
    grey = episode(chunks=2, num_drafts=0, accepted_levels=[], num_draft_tokens=[], num_accepted_tokens=[])
    assert strip_colours(grey) == [NOTHING_DRAFTED] * 2


@pytest.mark.parametrize("side", [128, 224, 256])
def test_a_frame_holds_both_cameras_and_one_field_a_past_chunk(side: int) -> None:
    images = np.stack([np.full((side, side, 3), value, dtype=np.uint8) for value in (50, 200)])
    colours = [(255, 0, 0), (0, 255, 0)]
    drawn = frame(images, colours, 1, "pick it up", 8)
    panels = drawn[CAPTION : CAPTION + PANEL]
    assert (panels[:, :PANEL] == 50).all()
    assert (panels[:, PANEL:] == 200).all()
    strip = drawn[CAPTION + PANEL + 2 :]
    assert (strip[:, : PANEL - 1] == (255, 0, 0)).all()
    assert (strip[:, PANEL:] == 0).all()


def test_the_caption_holds_step_and_as_much_of_the_instruction_as_fits() -> None:
    assert not np.array_equal(caption("pick it up", 8), caption("pick it up", 16))
    assert not np.array_equal(caption("pick it up", 8), caption("put it down", 8))
    long = caption("word " * 60, 220)
    assert long.shape == (CAPTION, 2 * PANEL, 3)
    step = caption("", 220)
    right = 2 * PANEL - 50  # the text ends before the step begins
    assert np.array_equal(long[:, right:], step[:, right:])
