"""`rsd expert run`, with the simulator and the expert's law left out."""

from pathlib import Path
from typing import Any

import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
import pytest

from rsd.cli import dispatch
from rsd.expert import expert
from rsd.sim import libero


class Env:
    instruction = "pick up the milk"

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def reset(self, **_: Any) -> None: ...

    def render(self) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    def close(self) -> None: ...


def five_steps(env: Env, record: Any = None, draw: bool = False) -> expert.ExpertResult:
    assert draw == (record is not None)
    for _ in range(5 if draw else 0):
        record(env, np.zeros(7), np.zeros(7))
    return expert.ExpertResult(True, 5, 1)


def test_the_first_seeds_episode_becomes_a_video_that_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libero, "LiberoEnv", Env)
    monkeypatch.setattr(expert, "run", five_steps)
    command = ["expert", "run", "--suite", "libero_object", "--seeds", "3", "4", "--video", str(tmp_path / "a.mp4")]
    assert dispatch(command) == 0
    assert "seed 4: success after 5 steps" in capsys.readouterr().out
    assert imageio_ffmpeg.count_frames_and_secs(tmp_path / "a.mp4")[0] == 3  # every second step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]
    assert dispatch(command) == 2
    assert "expected a new file" in capsys.readouterr().err
