from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rsd.evaluation.video import write_video
from rsd.expert import expert
from rsd.expert.articulated import inward_lean
from rsd.expert.goals import Goal, destination, task_goals, way_out
from rsd.expert.grasps import (
    MAX_LEAN,
    POINTING_DOWN,
    WIDTH_STEP,
    RimGrasp,
    choose_grasp,
    hand_rotation,
    lean_angle,
    lean_away,
    rim_grasps,
    rotation_vector,
    span_grasps,
    turned_back,
)
from rsd.expert.noise import ActionNoise, NoiseConfig
from rsd.expert.pick_and_place import PickAndPlace
from rsd.expert.scene import Scene
from rsd.sim.libero import LiberoEnv
from rsd.types import RsdError

TARGET, DISTRACTOR, PLATE = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1"
GOAL, OTHER = Goal("on", TARGET, PLATE), Goal("on", DISTRACTOR, PLATE)
BASE = np.array([-0.66, 0.0, 0.912])


class Log:
    """Keeps what the expert did."""

    def __init__(self) -> None:
        self.executed: list[np.ndarray] = []
        self.clean: list[np.ndarray] = []

    def record(self, env: LiberoEnv, executed: np.ndarray, clean: np.ndarray) -> None:
        self.executed.append(executed.copy())
        self.clean.append(clean.copy())


@pytest.mark.parametrize("angle", np.linspace(-np.pi, np.pi, 13))
def test_yaw_brings_the_closing_axis_onto_the_grasp_direction(angle: float) -> None:
    grasp = RimGrasp(float(angle))
    assert abs(grasp.yaw) <= np.pi / 2 + 1e-9
    near = BASE + np.array([0.4, 0.0, 0.2])  # no lean this close
    axis = hand_rotation(BASE, near, grasp.yaw, MAX_LEAN)[:2, 0]
    assert abs(axis @ grasp.direction) == pytest.approx(1.0)


def test_hand_points_down_nearby_and_leans_outward_far_away() -> None:
    near, far = BASE + np.array([0.4, 0.0, 0.1]), BASE + np.array([0.85, 0.0, 0.02])
    np.testing.assert_allclose(hand_rotation(BASE, near, 0.0, MAX_LEAN), POINTING_DOWN, atol=1e-12)
    assert lean_angle(BASE, near, MAX_LEAN) == 0.0
    assert 0.0 < lean_angle(BASE, far, MAX_LEAN) <= MAX_LEAN
    assert hand_rotation(BASE, far, 0.0, MAX_LEAN)[0, 2] > 0.1  # the fingers point away from the robot
    folded = BASE + np.array([0.25, 0.0, 0.15])
    assert -MAX_LEAN <= lean_angle(BASE, folded, 0.0) < 0.0  # towards the robot
    assert turned_back(BASE, [BASE + np.array([0.6, 0.4, 0.1]), near], -np.pi / 2)
    assert not turned_back(BASE, [near], -np.pi / 2)
    turn = rotation_vector(hand_rotation(BASE, far, 0.0, MAX_LEAN) @ POINTING_DOWN.T)
    assert np.linalg.norm(turn) == pytest.approx(lean_angle(BASE, far, MAX_LEAN))


def test_noise_leaves_the_gripper_alone_and_stays_in_range() -> None:
    config = NoiseConfig(max_level=1.0, push_rate=0.5)
    noise = ActionNoise(config, 1.0, np.random.default_rng(0))
    clean = np.array([0.9, -0.9, 0.0, 0.1, 0.0, 0.0, 1.0])
    executed = np.array([noise.disturb(clean) for _ in range(200)])
    np.testing.assert_array_equal(executed[:, 6], 1.0)
    assert np.abs(executed).max() <= 1.0
    assert np.abs(executed[:, :6] - clean[:6]).max() > 0.3


def test_noise_is_correlated_and_reproducible_and_off_at_level_zero() -> None:
    config = NoiseConfig(push_rate=0.0)
    runs = []
    for _ in range(2):
        noise = ActionNoise(config, 1.0, np.random.default_rng(1))
        runs.append(np.array([noise.disturb(np.zeros(7)) for _ in range(4000)]))
    np.testing.assert_array_equal(runs[0], runs[1])
    x = runs[0][:, 0]
    assert np.corrcoef(x[1:], x[:-1])[0, 1] == pytest.approx(config.correlation, abs=0.05)
    assert x.std() == pytest.approx(config.max_level, rel=0.15)
    silent = ActionNoise(NoiseConfig(), 0.0, np.random.default_rng(2))
    assert all(np.array_equal(silent.disturb(np.ones(7)), np.ones(7)) for _ in range(50))


def test_a_push_lasts_and_leads_centimetres_away() -> None:
    config = NoiseConfig(max_level=0.0, push_rate=1.0, push_steps=(5, 5), push_size=(0.8, 0.8))
    noise = ActionNoise(config, 1.0, np.random.default_rng(3))
    pushed = np.array([noise.disturb(np.zeros(7))[:3] for _ in range(5)])
    np.testing.assert_allclose(pushed, pushed[:1].repeat(5, 0))
    assert np.linalg.norm(pushed.sum(axis=0)) == pytest.approx(4.0)  # about 1 cm per unit


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    env = LiberoEnv("libero_spatial", 0, cameras=False)
    yield env
    env.close()


@pytest.mark.simulator
def test_expert_solves_a_placement_smoothly_with_the_canonical_grasp(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 1})
    log = Log()
    result = expert.run(env, record=log.record)
    assert result.success
    assert result.attempts == 1
    assert result.steps < 110
    assert env.success()
    assert len(log.clean) == result.steps + expert.TAIL_STEPS
    actions = np.array(log.clean)
    np.testing.assert_array_equal(actions, np.array(log.executed))
    assert np.abs(actions).max() <= 1.0
    assert set(np.unique(actions[:, 6])) == {-1.0, 1.0}
    assert (np.diff(actions[:, 6]) != 0).sum() == 2  # closes once, opens once
    assert actions[-1, 6] == -1.0


@pytest.mark.simulator
def test_expert_moves_the_other_bowl_under_noise(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 2})
    rng = np.random.default_rng(0)
    log = Log()
    result = expert.run(env, (OTHER,), log.record, rng, ActionNoise(NoiseConfig(), 0.8, rng))
    assert result.success
    assert env.holds("on", DISTRACTOR, PLATE)
    assert not env.success()  # the task's own bowl did not move
    executed, clean = np.array(log.executed), np.array(log.clean)
    assert np.abs(executed - clean)[:, :6].max() > 0.1
    np.testing.assert_array_equal(executed[:, 6], clean[:, 6])


@pytest.mark.simulator
def test_expert_picks_up_a_bowl_that_slipped_out_of_the_hand(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 4})
    law = PickAndPlace(Scene(env), GOAL)
    start = law.scene.position(TARGET)[2]
    while law.scene.position(TARGET)[2] < start + 0.02:
        env.advance(law.action())
    for _ in range(8):
        env.advance(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]))
    assert not law.scene.grasped(TARGET)
    for _ in range(env.max_steps):
        if env.success():
            break
        env.advance(law.action())
    assert env.success()
    assert law.attempts > 1


@pytest.mark.simulator
def test_two_sided_grasps_use_both_sides_where_the_canonical_one_uses_one(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 1})
    scene = Scene(env)
    plate = scene.position(PLATE)
    rng = np.random.default_rng(0)
    canonical = {choose_grasp(scene, TARGET, rim_grasps(), plate).angle for _ in range(3)}
    both = {choose_grasp(scene, TARGET, rim_grasps(), plate, "two-sided", rng).angle for _ in range(12)}
    assert len(canonical) == 1
    assert len(both) == 2
    assert canonical < both
    with pytest.raises(RsdError, match="random generator"):
        choose_grasp(scene, TARGET, rim_grasps(), plate, "two-sided")
    with pytest.raises(RsdError, match="mode: expected one of canonical, two-sided, two-sided-late, found 'left'"):
        choose_grasp(scene, TARGET, rim_grasps(), plate, "left", rng)  # type: ignore[arg-type]


@pytest.mark.simulator
def test_a_late_choice_of_side_is_not_told_by_what_came_before(env: LiberoEnv) -> None:
    """Both sides come up, and until the hand is over the middle the actions do not depend on which it will be."""
    logs = []
    for seed in range(4):
        env.reset(options={"placement_seed": 4})
        log = Log()
        result = expert.run(env, record=log.record, rng=np.random.default_rng(seed), mode="two-sided-late")
        assert result == expert.ExpertResult(True, result.steps, 1)
        logs.append(np.array(log.clean))
    first = logs[0]
    parted = {int(np.argmax(np.abs(other[:40, 1] - first[:40, 1]) > 0.5)) for other in logs[1:]}
    assert len(parted) == 2  # those of the same side never, the others all at once
    together = max(parted)
    assert together >= 8  # a chunk at least
    for other in logs[1:]:
        np.testing.assert_array_equal(other[:together], first[:together])


@pytest.mark.simulator
@pytest.mark.parametrize(("suite", "task"), [("libero_object", 7), ("libero_goal", 9)])
def test_expert_solves_the_other_suites_across_the_narrow_side(suite: str, task: int) -> None:
    """A milk carton into the basket; a wine bottle onto the rack."""
    other = LiberoEnv(suite, task, cameras=False)
    other.reset(options={"placement_seed": 11})
    log = Log()
    result = expert.run(other, record=log.record)
    assert result == expert.ExpertResult(True, result.steps, 1)
    assert result.steps < 130
    assert other.holds(*task_goals(suite, task)[0].words)
    actions = np.array(log.clean)
    assert np.abs(actions).max() <= 1.0
    assert (np.diff(actions[:, 6]) != 0).sum() == 2  # closes once, opens once
    other.close()


@pytest.mark.simulator
@pytest.mark.parametrize("task", [0, 7])
def test_expert_opens_a_drawer_and_turns_a_knob_under_noise(task: int) -> None:
    other = LiberoEnv("libero_goal", task, cameras=False)
    other.reset(options={"placement_seed": 11})
    assert not other.success()
    rng = np.random.default_rng(0)
    result = expert.run(other, rng=rng, noise=ActionNoise(NoiseConfig(), 0.5, rng))
    assert result.success
    assert result.steps < 130
    assert other.success()
    other.close()


@pytest.mark.simulator
def test_goals_are_done_one_after_the_other_and_again_if_undone() -> None:
    """Soup and cream cheese into the basket; the soup is put back on the table while the hand is off to the cheese."""
    other = LiberoEnv("libero_10", 7, cameras=False)
    other.reset(options={"placement_seed": 11})
    goals = task_goals("libero_10", 7)
    soup = other.simulation.get_object(goals[0].target).joints[0]
    start = other.data.joint(soup).qpos.copy()
    rng = np.random.default_rng(0)
    noise = ActionNoise(NoiseConfig(), 0.5, rng)
    law = expert.Chain(Scene(other), goals, rng=rng)
    assert law.attempts == 0
    lowest_at_change, put_back = 0.0, False
    for _ in range(other.max_steps):
        clean = law.action()
        if law.on == 1 and not put_back:
            eef = law.scene.eef
            lowest_at_change = float(eef[2] - law.scene.corridor_top(eef, eef, ignore=()))
            other.data.joint(soup).qpos[:] = start
            other.data.joint(soup).qvel[:] = 0.0
            put_back = True
        other.advance(noise.disturb(clean))
        if other.success():
            break
    assert put_back
    assert lowest_at_change > 0.02  # it left upward first
    assert other.success()
    assert law.attempts == 4  # each was begun twice
    other.close()


@pytest.mark.simulator
@pytest.mark.parametrize("task", [4, 8])
def test_expert_takes_mugs_by_the_rim_and_moka_pots_by_the_knob(task: int) -> None:
    other = LiberoEnv("libero_10", task, cameras=False)
    other.reset(options={"placement_seed": 11})
    log = Log()
    result = expert.run(other, record=log.record)
    assert result == expert.ExpertResult(True, result.steps, 2)
    assert result.steps < 260
    assert other.success()
    assert (np.diff(np.array(log.clean)[:, 6]) != 0).sum() == 4  # closes and opens for each of two
    other.close()


def test_a_hand_leans_back_over_what_stands_close() -> None:
    near, far = BASE + np.array([0.25, 0.1, 0.03]), BASE + np.array([0.5, 0.0, 0.03])
    np.testing.assert_allclose(inward_lean(BASE, far), np.eye(3), atol=1e-12)
    pointing = (inward_lean(BASE, near) @ POINTING_DOWN)[:, 2]
    assert pointing[:2] @ (near - BASE)[:2] < -0.05  # towards the robot
    assert pointing[2] < -np.cos(np.radians(41))


def test_a_leaning_hand_keeps_its_palm_away() -> None:
    out, back = np.array([0.0, 1.0]), np.array([-1.0, 0.0])
    grasps = lean_away(rim_grasps(), out, back)
    first = grasps[0]
    assert abs(first.direction @ out) < 0.6  # so that both fingers come down alike
    assert first.direction @ back > 0.0
    assert sorted({round(float(np.degrees(abs(grasp.lean)))) for grasp in grasps}) == [14, 18, 22]
    assert all(grasp.upward[:2] @ out > -1e-9 for grasp in grasps)
    assert first.upward[:2] @ out > 0.2
    assert RimGrasp(first.angle).upward == pytest.approx([0.0, 0.0, 1.0])


@pytest.mark.simulator
def test_a_leaning_look_sees_past_what_overhangs() -> None:
    """The drawer over a bowl: from above it hides the table, from the side it does not."""
    other = LiberoEnv("libero_goal", 3, cameras=False)
    other.reset(options={"placement_seed": 2**31})
    scene, (opening, putting) = Scene(other), task_goals("libero_goal", 3)
    assert not way_out(scene, putting).any()
    law = expert.Chain(scene, (opening,))
    while not other.holds(*opening.words):
        other.advance(law.action())
    out = way_out(scene, putting)
    assert out[0] < -0.02  # towards the robot, past its left edge
    assert out[1] == 0.0
    bowl = scene.position(TARGET)
    edge = bowl[:2] + np.array([0.03, -0.04])
    up = RimGrasp(np.pi / 2, lean=-np.radians(40)).upward
    straight = scene.heights(edge[None], (TARGET,))[0]
    leaning = scene.heights((edge - bowl[2] * up[:2])[None], (TARGET,), up)[0]
    assert straight > 1.05
    assert leaning == pytest.approx(0.9, abs=0.02)
    other.close()


@pytest.mark.simulator
def test_a_span_goes_across_the_narrowest_side_with_the_least_turn(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 1})
    scene = Scene(env)
    box, plate = "cookies_1", scene.position(PLATE)
    grasp = choose_grasp(scene, box, span_grasps(scene, box), plate)
    outline = scene.vertices(box)[:, :2]

    def width(angle: float) -> float:
        return float(np.ptp(outline @ [np.cos(angle), np.sin(angle)]))

    narrowest = min(width(angle) for angle in np.linspace(0, np.pi, 180))
    assert width(grasp.angle) < narrowest + WIDTH_STEP + 1e-3
    point = grasp.point(scene, box)
    assert outline.min(0) == pytest.approx(2 * point[:2] - outline.max(0), abs=0.01)  # over the middle
    assert grasp.lost(scene, box)  # the hand is elsewhere
    with pytest.raises(RsdError, match=r"plate_1: expected something at most 0\.07 m wide"):
        choose_grasp(scene, PLATE, span_grasps(scene, PLATE), plate)


@pytest.mark.simulator
def test_a_destination_is_a_surface_or_a_place_within_the_rim(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 1})
    scene = Scene(env)
    centre, surface = destination(scene, GOAL)
    assert centre == pytest.approx(scene.position(PLATE))
    assert surface == pytest.approx(float(scene.heights(centre[None, :2])[0]), abs=0.003)
    top, height = destination(scene, Goal("on", TARGET, "wooden_cabinet_1_top_side"))
    assert top[:2] == pytest.approx(scene.site("wooden_cabinet_1_top_side")[:2])
    assert height == pytest.approx(scene.vertices("wooden_cabinet_1")[:, 2].max(), abs=0.002)
    _, within = destination(scene, Goal("on", "cookies_1", DISTRACTOR))
    assert within == pytest.approx(scene.vertices(DISTRACTOR)[:, 2].max() - 0.015)
    with pytest.raises(RsdError, match="wooden_cabinet_1_top_side"):
        scene.site("no_such_region")


@pytest.mark.simulator
def test_scene_measures_what_is_there(env: LiberoEnv) -> None:
    env.reset(options={"placement_seed": 1})
    scene = Scene(env)
    bowl = scene.position(TARGET)
    points = scene.vertices(TARGET)
    assert points[:, 2].min() == pytest.approx(bowl[2], abs=0.004)
    rim = bowl[:2] + np.array([0.0, 0.0525])
    with_bowl, without = scene.heights(rim[None])[0], scene.heights(rim[None], ignore=(TARGET,))[0]
    assert with_bowl > without + 0.03
    assert without == pytest.approx(0.9, abs=0.03)  # the table
    assert scene.grip_width == pytest.approx(0.0775, abs=0.003)
    assert not scene.grasped(TARGET)
    cabinet = scene.position("wooden_cabinet_1")
    assert scene.corridor_top(bowl, cabinet, ignore=(TARGET,)) > 1.1 > scene.corridor_top(bowl, bowl, ignore=(TARGET,))
    with pytest.raises(RsdError, match="plate_1"):
        scene.position("plate_7")


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("suite", "task", "seed"),
    [
        ("libero_90", 4, 1),  # butter into a drawer that is shut after
        ("libero_90", 33, 1),  # a microwave's door
        ("libero_90", 63, 1),  # a stack in a tray
        ("libero_90", 79, 1),  # a book turned into a compartment
        ("libero_90", 42, 1),  # a pan by its handle, under a shelf
        ("libero_90", 86, 1),  # a book into a shelf
        ("libero_90", 22, 3),  # the lowest drawer, a wine rack behind the arm
        ("libero_90", 18, 2),  # a pan, a pot beside the middle of its handle
        ("libero_90", 18, 4),  # a pan that the wrist has to be turned half round for
        ("libero_90", 62, 4),  # a bottle close to the robot
        ("libero_90", 76, 4),  # a mug whose handle would come down on the caddy
        ("libero_10", 9, 1),  # a mug into a microwave, then its door
        ("libero_goal", 5, 1),  # a plate along the table
        ("libero_goal", 3, 2),  # a bowl from under the drawer that it has opened, past a bottle
        ("libero_90", 8, 1),  # from before it
    ],
)
def test_expert_solves_a_placement_of_each_newer_skill(suite: str, task: int, seed: int) -> None:
    other = LiberoEnv(suite, task, cameras=False)
    other.reset(options={"placement_seed": 2**31 + seed})
    assert not other.success()
    assert expert.run(other).success
    assert other.success()
    other.close()


def test_a_video_of_the_expert_is_a_whole_file(tmp_path: Path) -> None:
    frames = [np.full((64, 64, 3), grey, np.uint8) for grey in range(0, 200, 50)]
    write_video(tmp_path / "new" / "video.mp4", (64, 64), frames)
    (video,) = (tmp_path / "new").iterdir()
    assert b"ftyp" in video.read_bytes()[:64]
