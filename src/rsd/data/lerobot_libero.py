"""LIBERO among LeRobot's data sets: what its published ones call their features, and what no field of theirs tells:
which way the pictures stand, how the state is split, what the gripper's numbers mean. That is found out from the data.

The layouts are those of HuggingFaceVLA/libero and lerobot/libero, IPEC-COMMUNITY's, physical-intelligence/libero (and
whatever openpi's converter makes), and LIBERO-plus.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsd.conventions import CONTROL_HZ, GRIPPER_CLOSE, GRIPPER_OPEN, shrunk
from rsd.data.lerobot import (
    EPISODE,
    INFO,
    TASK,
    Rows,
    action_feature,
    features_of,
    own_words,
    read_info,
    read_rows,
    read_tasks,
)
from rsd.data.lerobot_images import KINDS, camera
from rsd.data.schema import Demonstration, check_actions
from rsd.types import ACTION_DIM, STATE_DIM, RsdError

CAMERA_KEYS = (  # third person, wrist: the order of rsd.types.CAMERAS
    ("observation.images.image", "observation.images.image2"),
    ("observation.images.image", "observation.images.wrist_image"),
    ("observation.images.front", "observation.images.wrist"),
    ("image", "wrist_image"),
)
STATE_KEYS = ("observation.state", "state")
WORDS = "observation.environment_state"  # of `rsd demos export --words`: `word_flags` of the instruction
EXECUTED = "executed_action"  # of `rsd demos export`: where that is not the label; LeRobot takes no notice of it
GRIPPER = ACTION_DIM - 1
FINGERS = slice(STATE_DIM - 2, STATE_DIM)
MOST_OPEN = 0.05  # m from the middle; Panda's fingers reach 0.04
LAG = 4  # steps after which the fingers follow a command
FINGERS_MOVE, FINGERS_REST = 0.002, 0.02  # m between them, at least or at most
EPISODES_TRIED = 20
# Of the wrist camera's picture the gripper's body is a tenth at the lower edge, plain and dark: in 127 frames of six
# demonstrations its grey levels were 52 to 55 with a deviation of at most 0.8, those of the opposite edge 2.6 and more.
HAND_SHARE, HAND_GREY, HAND_DEVIATION = 0.1, 90, 4
# Until the gripper closes, what moves in the third-person camera's picture is the arm: the column of what changes falls
# with y, its row grows with x and falls with z. In 38 demonstrations of three suites, turned each of four ways, that
# told the right way in 36; the other two open a drawer, and are left to the next episode.
MOTION_GREY, FRAMES_COMPARED, LEAST_CORRELATION, CLOSING = 12, 30, 0.6, 0.005
UPRIGHT = "upright"
TURNS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # [T, S, S, 3] as stored -> upright
    UPRIGHT: lambda pictures: pictures,
    "turned by 180 degrees": lambda pictures: pictures[:, ::-1, ::-1],
    "upside down": lambda pictures: pictures[:, ::-1],
    "mirrored": lambda pictures: pictures[:, :, ::-1],
}
DOWN = ("turned by 180 degrees", "upside down")


@dataclass(frozen=True)
class Layout:
    """Names of the features; widths: of the columns of numbers, by name."""

    cameras: tuple[str, str]
    state: str
    action: str
    executed: str = ""

    @property
    def widths(self) -> dict[str, int]:
        extra = {self.executed: ACTION_DIM} if self.executed else {}
        return {self.action: ACTION_DIM, self.state: STATE_DIM, **extra, TASK: 0}


def read_episodes(folder: Path, images: bool, image_size: int = 0, most: int | None = None) -> Iterator[Demonstration]:
    """The episodes, one at a time, in order; images=False leaves the pictures out, image_size reduces larger ones (0:
    as they are), most: only so many of each task. Says in a line what was found of the conventions.

    Raises RsdError for another layout than LIBERO's, data that do not fit it, and damaged files."""
    info = read_info(folder)
    layout = recognise(folder, info)
    check_rate(folder, info, images)
    rows = read_rows(folder, info, layout.widths)
    instructions = instructions_of(folder, rows)
    state, labels = rows.columns[layout.state], rows.columns[layout.action]
    actions = rows.columns[layout.executed] if layout.executed else labels
    check_state(f"LeRobot data set {folder}: expected {layout.state}", state)
    sense = told_sense(folder) or gripper_sense(rows, labels, state)
    check_commands(f"LeRobot data set {folder}", layout.action, labels, sense)
    read = Pictures(folder, info, rows, layout, image_size) if images else None
    if read is not None:
        said = f"pictures {read.learn(state)}; state: position, axis-angle, two fingers; gripper {told_gripper(sense)}"
        print(f"LeRobot data set {folder}: {info['codebase_version']}, {len(rows.starts)} episodes; {said}")
    taken = dict[str, int]()
    for part, instruction in zip(rows.episodes(), instructions, strict=True):
        taken[instruction] = taken.get(instruction, 0) + 1
        if most is None or taken[instruction] <= most:
            executed, expected = (converted(values[part], sense) for values in (actions, labels))
            yield Demonstration(
                task=re.sub(r"\W+", "_", instruction.strip()),
                episode=f"episode_{rows.columns[EPISODE][part.start]}",
                instruction=instruction,
                images=read(part) if read is not None else None,
                state=state[part],
                actions=executed,
                labels=expected,
                success_step=len(executed) - 1,
                target_object="",
                placement_seed=-1,
                source=folder,
            )


def check_rate(folder: Path, info: Mapping[str, Any], warn: bool) -> None:
    """RsdError where the rate of frames is no rate; a warning where it is not LIBERO's."""
    rate = info.get("fps")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 1 <= rate <= 1e6:
        raise RsdError(f"{folder / INFO}: expected fps from 1 to 1000000, found {rate!r:.80}; fetch it again")
    if warn and rate != CONTROL_HZ:
        said = f"{rate:g} frames a second, LIBERO's control rate is {CONTROL_HZ:g}; every frame is taken for a step"
        print(f"warning: LeRobot data set {folder}: {said}", file=sys.stderr)


def instructions_of(folder: Path, rows: Rows) -> list[str]:
    """Of every episode."""
    tasks, found = read_tasks(folder), []
    for part in rows.episodes():
        numbers = np.unique(rows.columns[TASK][part]).tolist()
        if len(numbers) != 1 or numbers[0] not in tasks:
            episode = int(rows.columns[EPISODE][part.start])
            expected = f"one task of the {len(tasks)} in its meta folder in episode {episode}"
            raise RsdError(f"LeRobot data set {folder}: expected {expected}, found {TASK} {numbers!r:.80}")
        found.append(tasks[numbers[0]])
    return found


def read_actions(folder: Path) -> list[NDArray[np.float32]]:
    """Actions float32 [T, A] of every episode of any data set; LIBERO's with its gripper, others as they are stored."""
    info = read_info(folder)
    (action, width), features = action_feature(folder, info), features_of(info)
    state = next((name for name in STATE_KEYS if features.get(name, {}).get("shape") == [STATE_DIM]), "")
    rows = read_rows(folder, info, {action: width, **({state: STATE_DIM} if state else {})})
    actions = rows.columns[action]
    if state and width == ACTION_DIM and not state_fault(rows.columns[state]):
        sense = told_sense(folder) or gripper_sense(rows, actions, rows.columns[state])
        if sense not in (None, (GRIPPER_OPEN, GRIPPER_CLOSE)):
            print(f"LeRobot data set {folder}: gripper {told_gripper(sense)}")
        actions = converted(actions, sense)
    return [actions[part] for part in rows.episodes()]


def recognise(folder: Path, info: Mapping[str, Any]) -> Layout:
    """The features by LIBERO's names; RsdError names what there is and what is needed."""
    features = features_of(info)
    pictures = [name for name, each in features.items() if each.get("dtype") in KINDS]
    cameras = next((pair for pair in CAMERA_KEYS if set(pair) <= set(pictures)), None)
    state = next((name for name in STATE_KEYS if name in features), None)
    action, width = action_feature(folder, info)
    found = ", ".join(f"{name} {each.get('dtype')} {each.get('shape')}" for name, each in features.items())
    needed = [
        (cameras, f"images of two cameras named {' or '.join(' and '.join(pair) for pair in CAMERA_KEYS)}"),
        (state and features[state].get("shape") == [STATE_DIM], f"{STATE_KEYS[0]} of {STATE_DIM} numbers"),
        (width == ACTION_DIM, f"{action} of {ACTION_DIM} numbers"),
    ]
    if lacking := [words for holds, words in needed if not holds]:
        raise RsdError(
            f"LeRobot data set {folder}: expected LIBERO's layout: {'; '.join(lacking)}. Found {found:.400}; rename "
            "and convert the features with LeRobot's own tools"
        )
    assert cameras is not None
    assert state is not None
    executed = features.get(EXECUTED, {}).get("shape") == [ACTION_DIM]
    return Layout(cameras, state, action, EXECUTED if executed else "")


def state_fault(state: NDArray[np.float32]) -> str:
    """What shows that the 8 numbers are not position, axis-angle and two finger positions; empty where they can be."""
    first, second = state[:, FINGERS].T
    angle = np.linalg.norm(state[:, 3:6], axis=1).max()
    fingers = (abs(state[:, FINGERS]) <= MOST_OPEN).all() and (first - second >= -0.01).all()
    if fingers and angle <= 2 * np.pi + 0.01:
        return ""
    quaternion = np.allclose(np.linalg.norm(state[:, 3:7], axis=1), 1, atol=1e-3)
    return "a quaternion in numbers 3 to 6" if quaternion else f"{np.round(state[0], 3).tolist()} in the first frame"


def check_state(expected: str, state: NDArray[np.float32]) -> None:
    """expected: whose it is, as the error begins."""
    if found := state_fault(state):
        numbers = "position 3 (m), axis-angle 3 (rad) and the gripper's two joint positions (m, within 0.05)"
        raise RsdError(f"{expected} to be {numbers}, found {found}; convert it")


def gripper_sense(rows: Rows, labels: NDArray[np.float32], state: NDArray[np.float32]) -> tuple[float, float] | None:
    """(what opens, what closes) of the gripper's commands, by where the fingers are some steps later; None: unclear."""
    values = np.unique(labels[:, GRIPPER]).tolist()
    parts = [part for part in rows.episodes()[:EPISODES_TRIED] if part.stop - part.start > LAG]
    width = state[:, FINGERS] @ np.array([1, -1], np.float32)
    command = np.concatenate([labels[part, GRIPPER][:-LAG] for part in parts] or [labels[:0, GRIPPER]])
    later = np.concatenate([width[part][LAG:] for part in parts] or [width[:0]])
    seen = [later[command == value] for value in values]
    if not all(map(len, seen)) or len(values) not in (1, 2):
        return None
    if len(values) == 1:  # it never switches, as where a drawer is pushed
        low, high = np.quantile(later, [0.25, 0.75])
        other = -values[0] or 1.0
        return None if high - low > FINGERS_REST else (values[0], other) if low > MOST_OPEN else (other, values[0])
    low, high = (each.mean() for each in seen)
    opens, closes = values if low > high else reversed(values)
    return None if abs(low - high) < FINGERS_MOVE else (opens, closes)


def told_sense(folder: Path) -> tuple[float, float] | None:
    """The same of an export of this package, which says it."""
    told = own_words(folder).get("gripper")
    return (GRIPPER_OPEN, GRIPPER_CLOSE) if told == [GRIPPER_OPEN, GRIPPER_CLOSE] else None


def check_commands(where: str, key: str, labels: NDArray[np.float32], sense: tuple[float, float] | None) -> None:
    check_actions(f"{where}: {key}", labels[:, :GRIPPER], 1.0, "+-1, LIBERO's commands", {}, "convert them")
    if sense is None:
        found = np.unique(labels[:, GRIPPER])[:4].tolist()
        expected = f"commands for the gripper in {key}, one that opens and one that closes its fingers"
        raise RsdError(f"{where}: expected {expected}, found {found} and fingers that do not tell")


def converted(actions: NDArray[np.float32], sense: tuple[float, float] | None) -> NDArray[np.float32]:
    """With LIBERO's gripper: -1 opens, +1 closes."""
    if sense is None or sense == (GRIPPER_OPEN, GRIPPER_CLOSE):
        return actions
    gripper = np.where(actions[:, GRIPPER:] == sense[0], GRIPPER_OPEN, GRIPPER_CLOSE)
    return np.hstack([actions[:, :GRIPPER], gripper]).astype(np.float32)


def told_gripper(sense: tuple[float, float] | None) -> str:
    assert sense is not None
    same = sense == (GRIPPER_OPEN, GRIPPER_CLOSE)
    return f"{sense[0]:g} opens, {sense[1]:g} closes" + ("" if same else ": converted to -1 and 1")


class Pictures:
    """Both cameras' pictures of an episode, upright, once `learn` knows how they stand."""

    def __init__(self, folder: Path, info: Mapping[str, Any], rows: Rows, layout: Layout, image_size: int) -> None:
        self._folder, self._where = folder, f"LeRobot data set {folder}"
        self._size, self._keys = image_size, layout.cameras
        self._rows, self._turn = rows, UPRIGHT
        self._cameras = [camera(folder, info, rows, key) for key in layout.cameras]

    def learn(self, state: NDArray[np.float32]) -> str:
        """Find out from the first episodes how the pictures stand, both cameras' alike -> words for it."""
        hand, found, told = None, None, str(own_words(self._folder).get("pictures"))
        for part in self._rows.episodes()[:EPISODES_TRIED]:
            third, wrist = self._stored(part)
            if told in TURNS:
                self._turn = told
                break
            hand, found = hand or wrist_turn(wrist), third_turn(third, state[part])
            if found and hand in (None, "upside down" if found in DOWN else "upright"):
                self._turn = found
                break
        else:
            self._turn = "turned by 180 degrees" if hand in DOWN else "upright"
            keys = " and ".join(self._keys)
            print(f"warning: {self._where}: how {keys} stand could not be told; taken as {self._turn}", file=sys.stderr)
        side = third.shape[1]
        return f"{side} px {f'reduced to {self._size} ' if 0 < self._size < side else ''}{self._turn}"

    def __call__(self, part: slice) -> NDArray[np.uint8]:
        """The rows of one episode -> uint8 [T, 2, S, S, 3]."""
        turn = TURNS[self._turn]
        views = [shrunk(turn(pictures), self._size or pictures.shape[1]) for pictures in self._stored(part)]
        if views[0].shape != views[1].shape:
            found = " and ".join(f"{view.shape[1]} px" for view in views)
            raise RsdError(f"{self._where}: expected pictures of one size from both cameras, found {found}")
        return np.stack(views, axis=1)

    def _stored(self, part: slice) -> list[NDArray[np.uint8]]:
        """Each camera's, [T, S, S, 3] as they stand."""
        found = [each.read(part) for each in self._cameras]
        for key, (_, height, width, _) in zip(self._keys, (pictures.shape for pictures in found), strict=True):
            if height != width or height < self._size:
                expected = f"pictures of at least {self._size} px" if height == width else "square pictures"
                raise RsdError(f"{self._where}: expected {expected} in {key}, found {width} x {height} px")
        return found


def wrist_turn(pictures: NDArray[np.uint8]) -> str | None:
    """Where the gripper's body is in the first frame of the wrist camera."""
    rows = max(1, round(HAND_SHARE * pictures.shape[1]))

    def hand(edge: NDArray[np.uint8]) -> bool:
        return bool(edge.mean() < HAND_GREY and edge.std((0, 1)).max() < HAND_DEVIATION)

    upper, lower = hand(pictures[0, :rows]), hand(pictures[0, -rows:])
    return None if upper == lower else "upside down" if upper else "upright"


def third_turn(pictures: NDArray[np.uint8], state: NDArray[np.float32]) -> str | None:
    """How the third-person camera's pictures stand, by where they change while the hand moves; None: unclear."""
    width = state[:, FINGERS] @ np.array([1, -1], np.float32)
    closing = np.flatnonzero(width < width[0] - CLOSING)
    stop = closing[0] if len(closing) else len(state)
    picked = slice(0, stop, max(1, stop // FRAMES_COMPARED))
    grey, hand = pictures[picked].mean(-1), state[picked, :3]
    if len(grey) < 5:
        return None
    change = abs(np.diff(grey, axis=0))
    change[change < MOTION_GREY] = 0
    weight = change.sum((1, 2))
    moving = weight > 0.05 * weight.max()
    if moving.sum() < 4:
        return None
    side = np.arange(grey.shape[1])
    row, column = (change.sum(axis)[moving] @ side / weight[moving] for axis in (2, 1))
    x, y, z = ((hand[1:] + hand[:-1]) / 2)[moving].T
    with np.errstate(invalid="ignore", divide="ignore"):  # a hand that does not move sideways
        across, down = np.corrcoef(column, -y)[0, 1], np.corrcoef(row, x / 2 - z)[0, 1]
    if not min(abs(across), abs(down)) > LEAST_CORRELATION:
        return None
    names = {(True, True): "upright", (False, False): "turned by 180 degrees", (True, False): "upside down"}
    return names.get((across > 0, down > 0), "mirrored")
