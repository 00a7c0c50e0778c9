"""What of the target's chunk was missed while the robot did something else, and how the rest makes up for it.

LIBERO's controller (robosuite's OSC_POSE) sets its goal at every step anew, from the pose reached, and is critically
damped. So an arm that gets no more commands comes to rest a little further on, and a command moves that place by
FOLLOWED, about a quarter of it: summed commands would overshoot fourfold. Measured in LIBERO, free motion, commands of
0.4 rms: what was commanded so explains the measured way with a slope of 1.00 to 1.08 an axis, 4 mm rms off after 4
steps, 7 mm after 8. That error is common to what was done and what was missed, so their difference is added to the pose
reached; where the arm was held up by something, nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rsd.conventions import ACTION_METRES, ACTION_RADIANS, CONTROL_HZ

STIFFNESS = 150.0  # of the controller, 1/s^2
SPREAD = 4  # steps over which a miss is made up for
FREE_METRES, FREE_SHARE = 0.006, 0.4  # so far from where the commands lead, and this share of their way, is free motion
SCALE = np.array([ACTION_METRES] * 3 + [ACTION_RADIANS] * 3)

# of a critically damped arm in one step of the controller, in closed form: from rest it goes `_GOES` of a command and
# ends with the speed `_SPEEDS` (1/s); with a speed it goes `_COASTS` (s) and keeps `_KEEPS` of it
_RATE = math.sqrt(STIFFNESS) / CONTROL_HZ
_GOES, _SPEEDS = 1.0 - (1.0 + _RATE) * math.exp(-_RATE), math.sqrt(STIFFNESS) * _RATE * math.exp(-_RATE)
_COASTS, _KEEPS = math.exp(-_RATE) / CONTROL_HZ, (1.0 - _RATE) * math.exp(-_RATE)
_TO_REST = _COASTS / (1.0 - _KEEPS)  # s: how far an arm without commands goes on, by its speed
FOLLOWED = _GOES + _TO_REST * _SPEEDS  # 0.265: how far a command moves where the arm comes to rest, as a share of it

Pose = NDArray[np.floating]
Actions = NDArray[np.floating]


def way(before: Pose, after: Pose) -> NDArray[np.float64]:
    """From one state [8] to another, m [3]."""
    return np.asarray(after[:3], np.float64) - before[:3]


def coasting(before: Pose, after: Pose, action: Actions) -> NDArray[np.float64]:
    """How far an arm goes on without commands after a step that took it from one state [8] to another, m [3]."""
    gone, command = way(before, after), action[:3] * ACTION_METRES
    speed = _SPEEDS * command + _KEEPS / _COASTS * (gone - _GOES * command)
    return _TO_REST * speed


def led(actions: Actions) -> NDArray[np.float64]:
    """How far actions [n, 7] move the place where the arm comes to rest: m and rad, [6]."""
    commands = np.asarray(actions, np.float64).reshape(-1, 7)[:, :6]
    return FOLLOWED * SCALE * commands.sum(0)


def moved_freely(poses: Sequence[Pose], actions: Sequence[Actions], start: int) -> bool:
    """Whether the arm went where the actions since step `start` > 0 lead; else something held or pushed it, or a limit
    was hit. poses: states [8] before each action, and now."""
    done = np.stack(actions[start:])
    went = way(poses[start], poses[-1]) + coasting(poses[-2], poses[-1], actions[-1])
    expected = led(done)[:3] + coasting(poses[start - 1], poses[start], actions[start - 1])
    length = FOLLOWED * ACTION_METRES * float(np.linalg.norm(done[:, :3], axis=1).sum())
    return float(np.linalg.norm(went - expected)) <= FREE_METRES + FREE_SHARE * length


def rest_of_chunk(
    chunk: Actions, poses: Sequence[Pose], actions: Sequence[Actions], start: int, waited: int = 0
) -> Actions:
    """What is left to do now of a chunk [H, 7] for the observation at step `start`, [n, 7]: its actions from now on,
    with what was missed of those before.

    poses, actions: as of `moved_freely`, all of the episode. waited: steps by which the chunk is later. A gripper
    switch that was missed is made first: the chunk goes on from there, late; one that was made and that the chunk does
    not make is undone. What does not fit into [-1, 1] within SPREAD steps is added to later ones."""
    gone = len(actions) - start
    if gone == 0:
        return chunk
    done, at = np.stack(actions[start:]), min(gone - waited, len(chunk))
    alike = np.flatnonzero(np.sign(chunk[:at, 6]) == np.sign(done[-1, 6]))
    if alike.size or np.sign(done[-1, 6]) == np.sign(actions[start - 1][6]):
        at = int(alike[-1]) + 1 if alike.size else 0
    missed = led(chunk[:at]) - led(done)
    if not moved_freely(poses, actions, start):
        missed[:] = 0.0
    left, rest = missed / (FOLLOWED * SCALE), np.array(chunk[at:], dtype=np.float32)
    for step, action in enumerate(rest):
        before = action[:6].copy()
        action[:6] = np.clip(before + left / max(1, SPREAD - step), -1.0, 1.0)
        left = left - (action[:6] - before)
    return rest
