import contextlib
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rsd.cli import dispatch
from rsd.collection.collect import CollectConfig, EpisodeRecorder, collect, make_demonstration
from rsd.collection.render import RenderConfig, render, render_frames
from rsd.data.demonstrations import Demonstration, load_demonstrations
from rsd.data.schema import FILE_SUFFIX, Episode
from rsd.expert import expert, goals
from rsd.expert.goals import task_goals
from rsd.expert.pick_and_place import PickAndPlace
from rsd.expert.scene import Scene
from rsd.locks import exclusive
from rsd.output import Unfinished
from rsd.sim.libero import LiberoEnv
from rsd.sim.motion import Motion
from rsd.sim.suites import suite_task
from rsd.types import RsdError

pytestmark = pytest.mark.simulator
collecting = sys.modules["rsd.collection.collect"]
NAME = suite_task("libero_spatial", 0).name


class InThisProcess:
    """A pool of workers that is none."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collects and renders without processes of its own, each of which would import and compile everything anew."""
    monkeypatch.setattr("rsd.collection.workers.worker_pool", lambda _: contextlib.nullcontext(InThisProcess()))
    monkeypatch.setattr("rsd.collection.workers.as_completed", list)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CollectConfig:
    out = tmp_path_factory.mktemp("demos")
    return CollectConfig(out, tasks=(0,), num_demos=2, clean_fraction=0.5, num_workers=1, states_only=True, seed=3)


@pytest.fixture(scope="module")
def collected(config: CollectConfig) -> list[Demonstration]:
    assert collect(config) == {NAME: 2}
    return list(load_demonstrations(config.out))


def test_collected_demonstrations_carry_what_a_learner_needs(
    config: CollectConfig, collected: list[Demonstration]
) -> None:
    assert [demo.target_object for demo in collected] == ["akita_black_bowl_1"] * 2
    assert {demo.instruction for demo in collected} == {suite_task("libero_spatial", 0).language}
    for demo in collected:
        assert demo.images is None
        assert demo.success_step < len(demo) - 1
        assert np.abs(demo.actions).max() <= 1.0
        np.testing.assert_array_equal(demo.actions[:, 6], demo.labels[:, 6])
    with h5py.File(config.out / f"{NAME}{FILE_SUFFIX}") as file:
        data = file["data"]
        provenance = json.loads(data.attrs["rsd_provenance"])
        assert provenance["settings"]["seed"] == 3
        assert provenance["versions"]["mujoco"] == "3.2.3"
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == collected[0].instruction
        demo = data["demo_0"]
        np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])
        assert demo["states"].dtype == np.float64


def test_a_run_resumes_and_a_demonstration_does_not_depend_on_the_run(
    config: CollectConfig, collected: list[Demonstration]
) -> None:
    assert collect(replace(config, num_demos=3)) == {NAME: 3}
    demos = list(load_demonstrations(config.out))
    for before, after in zip(collected, demos[:2], strict=True):
        np.testing.assert_array_equal(before.actions, after.actions)
    env = LiberoEnv("libero_spatial", 0, cameras=False)
    alone = make_demonstration(env, config, 2)  # a fresh environment, no demonstration before it
    env.close()
    np.testing.assert_array_equal(demos[2].labels, alone.expert_actions.astype(np.float32))
    assert demos[2].placement_seed == alone.attributes["placement_seed"]


def test_other_settings_are_refused(config: CollectConfig, collected: list[Demonstration]) -> None:
    with pytest.raises(RsdError, match=r"clean_fraction = 0\.5, found 0\.1"):
        collect(replace(config, clean_fraction=0.1))
    with pytest.raises(RsdError, match="libero_spatial"):
        collect(replace(config, suite="libero_object"))
    with pytest.raises(RsdError, match=r"motion = None, found 'thing', motion_speed = None, found 0\.02"):
        collect(replace(config, motion="thing"))


def test_other_settings_are_seen_in_the_files_of_other_tasks(
    config: CollectConfig, collected: list[Demonstration], tmp_path: Path
) -> None:
    """Copied without the folder of parts, which says them, too."""
    shutil.copy(config.out / f"{NAME}{FILE_SUFFIX}", tmp_path)
    with pytest.raises(RsdError, match=r"motion = None, found 'thing', motion_speed = None, found 0\.02"):
        collect(replace(config, out=tmp_path, tasks=(1,), motion="thing"))


def test_files_without_demonstrations_are_not_rendered(
    config: CollectConfig, collected: list[Demonstration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(config.out / f"{NAME}{FILE_SUFFIX}", tmp_path)
    with h5py.File(tmp_path / f"{NAME}{FILE_SUFFIX}", "r+") as file:
        for name in list(file["data"]):
            del file["data"][name]
    assert dispatch(["demos", "render", "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "expected demonstrations, found none; collect them again" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["thing", "destination"])
def test_what_an_instruction_asks_for_moves_in_its_demonstration(config: CollectConfig, what: Any) -> None:
    """And what is stored says where it was at each step."""
    env = LiberoEnv("libero_spatial", 0, cameras=False)
    job = replace(config, motion=what, motion_speed=0.05)
    names = [f"akita_black_bowl_{number}" for number in (1, 2)]
    try:
        made = [make_demonstration(env, job, index) for index in ((0, 1, 0) if what == "thing" else (0, 0))]
        for demo in made:
            first = names[0] if what == "thing" else "plate_1"
            assert demo.attributes["target_object"] == names[0]
            assert demo.attributes["motion"] == what
            places = {}
            for name in (*names, "plate_1"):
                env.restore(demo.states[0], demo.body_pos, demo.body_quat)
                before = env.data.xpos[env.simulation.obj_body_id[name], :2].copy()
                env.restore(demo.states[8], demo.body_pos, demo.body_quat)
                places[name] = np.linalg.norm(env.data.xpos[env.simulation.obj_body_id[name], :2] - before)
            assert places.pop(first) == pytest.approx(0.05 * 8 / 20, rel=0.1)
            assert max(places.values()) < 1e-3
        np.testing.assert_array_equal(made[0].states, made[-1].states)
    finally:
        env.close()


def test_tasks_in_which_nothing_moves_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = CollectConfig(tmp_path / "none", "libero_goal", motion="destination", states_only=True)
    assert collecting.chosen_tasks(job) == [6, 8]
    assert re.search("left out, .*nothing moves in them: open the middle drawer.*wine bottle", capsys.readouterr().err)
    with pytest.raises(RsdError, match="--motion destination: expected something that can slide, found flat_stove_1"):
        collect(replace(job, tasks=(6, 1)))
    with pytest.raises(RsdError, match="found wooden_cabinet_1_middle_region of libero_goal_permuted task 0, which"):
        collect(replace(job, tasks=(0,), suite="libero_goal_permuted", motion="thing"))
    assert not job.out.exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_floor_scene_is_collected_under_its_own_names(tmp_path: Path) -> None:
    job = CollectConfig(tmp_path, "libero_object", tasks=(6,), num_demos=1, num_workers=1, states_only=True)
    name = suite_task("libero_object", 6).name
    assert collect(job) == {name: 1}
    (demo,) = load_demonstrations(tmp_path)
    assert demo.target_object == "butter_1"
    assert demo.instruction == "pick up the butter and place it in the basket"
    with h5py.File(tmp_path / f"{name}{FILE_SUFFIX}") as file:
        assert file["data"].attrs["env_name"] == "Libero_Floor_Manipulation"
        assert json.loads(file["data"].attrs["problem_info"])["problem_name"] == "libero_floor_manipulation"


@pytest.mark.usefixtures("in_this_process")
def test_a_task_of_two_goals_is_collected_as_one_demonstration(tmp_path: Path) -> None:
    job = CollectConfig(tmp_path, "libero_10", tasks=(1,), num_demos=1, num_workers=1, states_only=True)
    assert collect(job) == {suite_task("libero_10", 1).name: 1}
    (demo,) = load_demonstrations(tmp_path)
    assert demo.target_object == "cream_cheese_1,butter_1"
    assert demo.instruction == "put both the cream cheese box and the butter in the basket"
    assert 120 < demo.success_step < 400  # the limit is 520
    assert (np.diff(demo.labels[:, 6]) != 0).sum() >= 4  # it closes and opens for each


def test_a_placement_that_the_expert_refuses_costs_that_placement_only(
    config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tries = expert.run, list[int]()

    def refusing(*arguments: Any, **options: Any) -> expert.ExpertResult:
        tries.append(len(tries))
        if len(tries) == 1:
            raise RsdError("milk_1: expected something at most 0.07 m wide, found 0.071 m")
        return run(*arguments, **options)

    env = LiberoEnv("libero_spatial", 0, cameras=False)
    try:
        alone = make_demonstration(env, config, 0)
        with monkeypatch.context() as patch:
            patch.setattr(expert, "run", refusing)
            made = make_demonstration(env, config, 0)
        assert made.attributes["failed_tries"] == alone.attributes["failed_tries"] + 1 == len(tries) - 1

        def never(*_: object, **__: object) -> None:
            raise RsdError("too wide")

        monkeypatch.setattr(expert, "run", never)
        monkeypatch.setattr(collecting, "MAX_TRIES", 3)
        with pytest.raises(RsdError, match=r"failed on 3 placements in a row; of the last .* it says: too wide"):
            make_demonstration(env, config, 0)
    finally:
        env.close()


def test_a_draw_that_leaves_no_room_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    env = LiberoEnv("libero_spatial", 0, cameras=False)
    rebuild, calls = env._rebuild, list[int]()

    def crowded(seed: int) -> None:
        from robosuite.utils.errors import RandomizationError

        calls.append(seed)
        if len(calls) == 1:
            raise RandomizationError("Cannot place all objects ):")
        rebuild(seed)

    try:
        monkeypatch.setattr(env, "_rebuild", crowded)
        _, info = env.reset(options={"placement_seed": 3})
        assert info["placement_rejections"] >= 1
    finally:
        env.close()


@pytest.mark.usefixtures("in_this_process")
def test_demonstrations_that_cannot_be_made_are_named_once_the_others_are(
    config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = collecting.make_demonstration

    def one_fails(env: LiberoEnv, job: CollectConfig, index: int, *rest: Any) -> Any:
        if index == 0:
            raise RsdError("no placement will do")
        return make(env, job, index, *rest)

    job = replace(config, out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(collecting, "make_demonstration", one_fails)
        with pytest.raises(RsdError, match=rf"1 of 2 .* failed, .*{NAME} demo_0 .no placement will do"):
            collect(job)
    assert [demo.episode for demo in load_demonstrations(tmp_path)] == ["demo_1"]
    assert collect(job) == {NAME: 2}


class NamedTask:
    """An environment of which only the task is asked."""

    def __init__(self, suite: str, task: int, *_: object) -> None:
        self.task = suite_task(suite, task)


@functools.cache
def make_demonstration_of(config: CollectConfig) -> Episode:
    """One demonstration, made once."""
    env = LiberoEnv("libero_spatial", 0, cameras=False)
    try:
        return make_demonstration(env, config, 0)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("kept", "fault"), [(0, "or fixtures: not readable"), (5, "expected [0-9]+ states, one an action, found 5")]
)
@pytest.mark.usefixtures("in_this_process")
def test_a_demonstration_that_is_damaged_costs_its_own_rendering_only(
    config: CollectConfig, collected: list[Demonstration], tmp_path: Path, kept: int, fault: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(config.out / f"{NAME}{FILE_SUFFIX}", source)
    with h5py.File(source / f"{NAME}{FILE_SUFFIX}", "r+") as file:
        states = file["data/demo_0/states"][:kept]
        del file["data/demo_0/states"]
        if kept:
            file["data/demo_0/states"] = states
    job = RenderConfig(source, tmp_path / "out", image_size=32, num_workers=1, every=16, max_per_task=2)
    with pytest.raises(RsdError, match=rf"1 of the demonstrations or files .* demo_0 .*{fault}"):
        render(job)
    assert [demo.episode for demo in load_demonstrations(tmp_path / "out")] == ["demo_1"]


@pytest.mark.usefixtures("in_this_process")
def test_a_file_that_is_damaged_costs_its_own_rendering_only(
    config: CollectConfig, collected: list[Demonstration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    damaged = {name: source / f"{name}{FILE_SUFFIX}" for name in ("cut", "data", "env_args", "rsd_provenance")}
    for path in (*damaged.values(), source / f"{NAME}{FILE_SUFFIX}"):
        shutil.copy(config.out / f"{NAME}{FILE_SUFFIX}", path)
    for name, path in damaged.items():
        if name == "cut":
            path.write_bytes(path.read_bytes()[:999])
            continue
        with h5py.File(path, "r+") as file:
            if name == "data":
                del file["data"]
            else:
                file["data"].attrs[name] = "{"
    before = {path: path.read_bytes() for path in damaged.values()}
    small = ["--image-size", "32", "--num-workers", "1", "--every", "16", "--max-per-task", "1"]
    command = ["demos", "render", "--source", str(source), "--out", str(tmp_path / "out"), *small]
    assert dispatch(command) == 1  # the work was done and some of it failed
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: 4 of the .* files in .* failed, the first of them cut{FILE_SUFFIX} .*same command", said)
    assert [demo.episode for demo in load_demonstrations(tmp_path / "out")] == ["demo_0"]
    assert {path: path.read_bytes() for path in damaged.values()} == before


def overwrite_middle(path: Path) -> None:
    """Bytes of the demonstrations themselves; the file still opens."""
    with h5py.File(path) as file:
        place = file["data/demo_0/actions"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[800:place] = b"\xa5" * (place - 800)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:999]),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "provenance": lambda path: h5py.File(path, "r+")["data"].attrs.update(rsd_provenance="{"),
    "middle": overwrite_middle,
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.usefixtures("in_this_process")
def test_a_file_that_is_damaged_costs_its_own_task_only(
    case: str,
    config: CollectConfig,
    collected: list[Demonstration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of two tasks, one with a damaged file: the other is finished, the file is named and left as it is."""
    demo = make_demonstration_of(config)
    monkeypatch.setattr(collecting, "make_demonstration", lambda env, job, index, policy: replace(demo, index=index))
    monkeypatch.setattr("rsd.collection.workers.worker_environment", lambda *a, **k: NamedTask(*a))
    out = tmp_path / "out"
    job = replace(config, out=out, tasks=(0, 1), num_demos=1)
    assert collect(job) == {NAME: 1, suite_task("libero_spatial", 1).name: 1}
    path = out / f"{NAME}{FILE_SUFFIX}"
    DAMAGE[case](path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(Unfinished, match=rf"1 of . demonstrations or their files failed, .* {NAME}{FILE_SUFFIX} .*"):
        collect(replace(job, num_demos=2))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert len(list(load_demonstrations(out / f"{suite_task('libero_spatial', 1).name}{FILE_SUFFIX}"))) == 2
    with pytest.raises(RsdError, match="files failed"):  # nothing else is to be done
        collect(replace(job, tasks=(0,), num_demos=2))


@pytest.mark.parametrize("begin", ["collect", "render"])
def test_a_folder_of_demonstrations_belongs_to_one_run(config: CollectConfig, tmp_path: Path, begin: str) -> None:
    (tmp_path / f"x{FILE_SUFFIX}").touch()
    runs = {"collect": lambda: collect(replace(config, out=tmp_path)), "render": lambda: render(RenderConfig(tmp_path))}
    with exclusive(tmp_path), pytest.raises(RsdError, match="another run is writing here"):
        runs[begin]()


def test_what_the_expert_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, able = tmp_path / "none", goals._solvable
    monkeypatch.setattr(goals, "_solvable", lambda goal, opened: "cabinet" not in goal.target and able(goal, opened))
    with pytest.raises(RsdError, match=r"akita_black_bowl_1 wooden_cabinet_1_top.* 8 .put the bowl on the plate."):
        collect(CollectConfig(out, "libero_goal", tasks=(8, 3)))
    solved = "libero_goal, libero_10, libero_90, libero_object_permuted, libero_spatial_permuted, libero_goal_permuted"
    with pytest.raises(RsdError, match=f"the expert solves .*{solved}, found the suite 'libero_goal_swap'"):
        collect(CollectConfig(out, "libero_goal_swap"))
    assert not out.exists()


@pytest.mark.parametrize("command", ["collect --num-demos 1", "render --source SOURCE"])
@pytest.mark.parametrize(("place", "holds"), [("policy", "config.json"), ("policy", "tokenizer.json"), (".", "x.py")])
def test_demonstrations_do_not_come_among_the_files_of_something_else(
    command: str,
    place: str,
    holds: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, here = tmp_path / "source", tmp_path / "here"
    for folder in (source, here / place):
        folder.mkdir(parents=True)
    (source / f"x{FILE_SUFFIX}").touch()
    (here / place / holds).write_text("{}")
    monkeypatch.chdir(here)
    assert dispatch(["demos", *command.replace("SOURCE", str(source)).split(), "--out", place]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"--out: expected a folder for demonstrations alone, found {holds} in .*; choose another", said)
    assert [each.name for each in (here / place).iterdir()] == [holds]


def test_rendering_adds_images_once(
    config: CollectConfig, collected: list[Demonstration], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = RenderConfig(config.out, tmp_path, image_size=32, num_workers=1, every=4, max_per_task=1)
    assert render(job) == {NAME: 1}
    path = tmp_path / f"{NAME}{FILE_SUFFIX}"
    stamp = path.stat().st_mtime_ns
    assert render(job) == {NAME: 1}
    assert path.stat().st_mtime_ns == stamp  # nothing was drawn twice
    with pytest.raises(RsdError, match="32 px"):
        render(replace(job, image_size=64))
    (rendered,) = load_demonstrations(tmp_path)
    assert rendered.images is not None
    assert rendered.images.shape == (-(-len(rendered) // 4), 2, 32, 32, 3)
    assert rendered.images.std() > 10.0
    np.testing.assert_array_equal(rendered.actions, collected[0].actions)

    with pytest.raises(RsdError, match=r"every 4. step, --views 0, asked for were 32 px of every 16. step"):
        render(replace(job, every=16))
    sparse = tmp_path / "sparse"
    request.getfixturevalue("in_this_process")
    assert render(replace(job, out=sparse, every=16)) == {NAME: 1}
    (few,) = load_demonstrations(sparse)
    assert few.images is not None
    np.testing.assert_array_equal(few.images, rendered.images[::4])
    np.testing.assert_array_equal(few.labels, rendered.labels)
    assert few.image_every == 16

    looks = [tmp_path / "looks", tmp_path / "again"]
    for folder in looks:
        assert render(replace(job, out=folder, every=16, views=1.0)) == {NAME: 1}
    drawn = [each.images for folder in looks for each in load_demonstrations(folder)]
    assert np.array_equal(*drawn)
    assert not np.array_equal(drawn[0], few.images)
    with pytest.raises(RsdError, match=r"every 16. step, --views 1, asked for were .*--views 0.5"):
        render(replace(job, out=looks[0], every=16, views=0.5))


def test_rendered_images_are_those_of_a_live_recording_but_for_one_substep() -> None:
    env = LiberoEnv("libero_spatial", 0, image_size=64)
    env.motion = Motion("thing", 0.1)
    env.reset(options={"placement_seed": 1})
    fixtures = env.fixture_poses()
    recorder = EpisodeRecorder(images=True)
    law = PickAndPlace(Scene(env), task_goals("libero_spatial", 0)[0])
    for _ in range(12):
        action = law.action()
        recorder.record(env, action, action)
        env.advance(action, draw=True)
    rows = recorder.arrays()
    env.reset(options={"placement_seed": 2})
    drawn, spots = render_frames(env, rows["states"], *fixtures, things=["akita_black_bowl_1", "plate_1"])
    rendered, live = drawn.astype(int), rows["images"]
    env.close()
    assert (np.abs(np.diff(spots[1:, 0], axis=0)).max(axis=1) > 1e-3).all()  # it slides at every step
    assert np.abs(np.diff(spots[:, 1], axis=0)).max() < 1e-4
    near = np.abs(rendered - live).mean(axis=(1, 2, 3, 4))
    next_step = np.abs(rendered[1:] - live[:-1]).mean(axis=(1, 2, 3, 4))
    assert near.max() < 3.0
    assert near[1:].mean() < 0.5 * next_step.mean()


def test_files_of_others_cannot_be_rendered(tmp_path: Path) -> None:
    with h5py.File(tmp_path / f"{NAME}{FILE_SUFFIX}", "w") as file:
        file.create_group("data/demo_0")
    with pytest.raises(RsdError, match="rsd_provenance"):
        render(RenderConfig(tmp_path))
