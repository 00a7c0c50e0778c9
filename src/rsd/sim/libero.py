"""LIBERO as a gymnasium environment, in the protocol of OpenVLA-OFT, and fast where that changes nothing.

Protocol: `seed(0)` right before every reset (it draws the fixtures' poses, which a state does not hold), the fixed
initial state k, 10 wait steps, then at most MAX_STEPS[suite] steps; both cameras rotated by 180 degrees.

The fast path (default) resets without rebuilding the model, draws cameras only when armed, computes positions and
velocities once per physics substep instead of three times, and has its own loop of robosuite's control. States and
images are bit-identical to the plain path; the tests prove it.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsd.checks import ImageSize, Seed, checked, shown
from rsd.conventions import CONTROL_HZ, WAIT_ACTION, WAIT_STEPS, rotate_180, state_vector
from rsd.sim.fast_path import ArmControl, Contacts, compile_maths
from rsd.sim.motion import Motion, Mover, mover
from rsd.sim.permuted import Layout, Predicate, is_permuted
from rsd.sim.physics import mujoco
from rsd.sim.rendering import ArmedCamera, gl_backend
from rsd.sim.scenes import kept_scenes
from rsd.sim.suites import (
    DISTRIBUTION,
    bddl_file,
    fixed_layout,
    init_states,
    load_libero,
    permuted_layout,
    quiet,
    scene_file,
    step_limit,
    suite_task,
)
from rsd.sim.views import Look, View
from rsd.types import ACTION_DIM, CAMERAS, STATE_DIM, Observation, RsdError, real_array
from rsd.versions import versions

SIM_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # our name -> LIBERO's
BENCHMARK_SEED = 0  # the fixtures of the benchmark's initial states
ARM_JOINT_NOISE = 0.02  # rad, standard deviation per joint of the benchmark's initial states
# m slid in the wait steps by an object that was placed overlapping another. The benchmark's own states slide up to
# 5.6 cm (7 of the first 30 of libero_spatial task 0 more than 2 cm), so a stricter limit would leave them untrained.
UNSTABLE_DISTANCE = 0.06
PLACEMENT_TRIES = 50
FREE_SHARE = 0.5  # of random placements of libero_object_permuted: things anywhere on the floor


class LiberoEnv(gymnasium.Env[dict[str, NDArray[Any]], NDArray[np.floating]]):
    """One task of a LIBERO suite.

    Observations: `agentview`, `wrist` uint8 [S, S, 3] upright (absent with cameras=False) and `state` float32 [8].
    Actions: 7 numbers in [-1, 1], gripper -1 = open, +1 = close.
    fast=False is the plain path: the model is rebuilt at every reset and every step draws.
    instruction: what is asked for; of a permuted suite it changes with every reset, as do `goal` and `asks`, the
    sentences that would ask for a thing of this layout, with that thing.
    """

    draws_end = True  # whether images show where success ended a chunk early; else they stay those before it

    def __init__(
        self, suite: str, task_id: int, image_size: int = 256, cameras: bool = True, fast: bool = True
    ) -> None:
        self.task = suite_task(suite, task_id)
        image_size, cameras = checked(ImageSize, image_size, "image_size"), checked(bool, cameras, "cameras")
        self.metadata, self.render_mode = {"render_modes": ["rgb_array"], "render_fps": 20}, "rgb_array"
        self.suite, self.image_size, self.cameras, self.fast = suite, image_size, cameras, fast
        self.instruction = self.task.language
        self.max_steps = step_limit(suite)
        self.steps = 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        frame = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
        images = dict.fromkeys(CAMERAS, frame) if cameras else {}
        self.observation_space: Any = gymnasium.spaces.Dict({"state": state, **images})
        self._armed: dict[str, ArmedCamera] = {}
        self._latest: Mapping[str, Any] = {}
        self._control: Any = None
        self._arm_control: ArmControl | None = None
        libero = load_libero()
        compile_maths()
        with quiet(), kept_scenes(cameras) if fast else contextlib.nullcontext():
            self._control = libero.ControlEnv(
                bddl_file_name=str(bddl_file(suite, task_id)),
                use_camera_obs=cameras,
                has_offscreen_renderer=cameras,
                camera_names=list(SIM_CAMERAS.values()),
                camera_heights=image_size,
                camera_widths=image_size,
                ignore_done=True,
                hard_reset=not fast,
            )
        if fast:
            self.simulation.check_contact = Contacts(self.model, self.data)
        if fast and cameras:
            self.simulation.sim._render_context_offscreen.drawing = True
            for name, sim_name in SIM_CAMERAS.items():
                observable = self.simulation._observables[f"{sim_name}_image"]
                self._armed[name] = ArmedCamera(observable._sensor, image_size)
                observable._sensor = self._armed[name]
        self._unplaced_fixtures = self._read_unplaced_fixtures()
        self._scene_regions = dict(self.simulation.parsed_problem["regions"])
        self.goal: tuple[Predicate, ...] = scene_file(suite, task_id).goal
        self.asks: tuple[tuple[str, str], ...] = ()
        self.motion: Motion | None = None  # of the next episodes
        self._mover: Mover | None = None
        self.view: View | None = None  # of the next episodes
        self._look: Look | None = None

    # -- gymnasium ------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Starts an episode; the wait steps are over when it returns.

        options={"init_state": k}: the benchmark's fixed state k (0 to 49); `seed` has no effect on it.
        options={"placement_seed": s}: a random placement. An unstable one (an object slides more than 6 cm in the wait
        steps) is drawn again from the next sub-seed; info["placement_rejections"] counts them.
        Without either, a placement seed is drawn from `seed`.
        """
        super().reset(seed=checked(Seed | None, seed, "reset: seed"))
        if self.view is not None and not self.fast:
            raise RsdError("view: expected the fast path, found an environment made with fast=False")
        self._mover = None
        self.look_as((), self.np_random)
        choice = checked(dict[str, int], options or {}, "reset options")
        if len(choice) > 1 or not choice.keys() <= {"init_state", "placement_seed"}:
            raise RsdError(f"reset options: expected init_state or placement_seed, found {sorted(choice)}")
        if "init_state" in choice:
            info = self._start_fixed(choice["init_state"])
        else:
            drawn = choice.get("placement_seed", int(self.np_random.integers(2**31 - 1)))
            info = self._start_placement(checked(Seed, drawn, "reset options: placement_seed"))
        self.steps = 0
        state = info["init_state"] if "init_state" in info else info["placement_seed"]
        self._mover = None if self.motion is None else mover(self, self.motion, state)
        if self.view is not None:
            drawn = [self.view.seed, zlib.crc32(self.suite.encode()), self.task.task_id, state]
            self.look_as(self.view.what, np.random.default_rng(drawn))
            self.redraw()
        return self._observation_dict(), {**info, "success": self.success(), "instruction": self.instruction}

    def step(self, action: ArrayLike) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """One control step (0.05 s). terminated on success, truncated at max_steps; reward 1.0 on success."""
        return self.step_chunk(real_array("action", action, "float64", (ACTION_DIM,))[None])

    def step_chunk(
        self, actions: ArrayLike, before_step: Callable[[], None] | None = None, draw: bool = True
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Executes [H, 7] actions open loop, drawing the cameras only after the last; stops at success or limit.
        Without `draw` the images stay those of the last drawing.

        Values are clipped to [-1, 1]; a wrong shape or a number that is not finite raises RsdError.
        before_step is called before each action. info["steps"] is the number of steps executed. If success ends the
        chunk early, the images show the state right after that step (one physics substep later than a sampled image).
        """
        chunk = real_array("actions", actions, "float64")
        if chunk.ndim != 2 or chunk.shape[1] != ACTION_DIM or len(chunk) == 0:
            raise RsdError(f"actions: expected [H, {ACTION_DIM}] with H > 0, found {list(chunk.shape)}")
        chunk = np.clip(chunk, -1.0, 1.0)[: max(1, self.max_steps - self.steps)]
        for executed, action in enumerate(chunk, start=1):
            last = executed == len(chunk)
            if before_step is not None:
                before_step()
            self._control_step(action, draw=last and draw, observe=last or before_step is not None)
            terminated = self.success()
            if terminated:
                if not last and self._arm_control is not None:
                    self._latest = self._arm_control.observed()
                if not last and draw and self.draws_end:
                    self.redraw()
                break
        self.steps += executed
        self._check_physics()
        truncated = not terminated and self.steps >= self.max_steps
        info = {"success": terminated, "steps": executed, "instruction": self.instruction}
        return self._observation_dict(), float(terminated), terminated, truncated, info

    def look_as(self, what: Collection[str], rng: np.random.Generator) -> None:
        """From the next drawing on, until the next reset; what: some of VIEWS, none: as LIBERO has it."""
        if self._look is not None:
            self._look.undo()
        self._look = Look(self, what, rng) if what else None

    def redraw(self) -> None:
        """Images of the present state for `observation`, after steps without drawing."""
        self._make_current()
        for camera in self._armed.values():
            camera.draw()

    def _check_physics(self) -> None:
        """MuJoCo answers a state that diverged with a warning and a silent reset of the whole scene: an error here."""
        for kind in ("BADQPOS", "BADQVEL", "BADQACC"):
            if self.data.warning[getattr(mujoco.mjtWarning, f"mjWARN_{kind}")].number:
                raise RsdError(
                    f"physics of {self.task.name} diverged ({kind}: NaN or huge numbers) and MuJoCo reset the scene; "
                    "the episode says nothing about the policy"
                )

    def advance(self, action: NDArray[np.float64], draw: bool = False) -> None:
        """One control step [7] without episode bookkeeping: no limit, no termination, cameras only if `draw`."""
        self._control_step(action, draw)
        self._check_physics()

    def render(self) -> NDArray[np.uint8]:
        """gymnasium's rgb_array: the third-person camera's present picture, upright, uint8 [S, S, 3]."""
        self._observation_dict()
        return self._seen(CAMERAS[0], self.draw()[0])

    def close(self) -> None:
        """Frees the simulator."""
        if self._control is not None:
            self._make_current()
            self._control.close()
            self._control = self._arm_control = None

    def observation(self) -> Observation:
        """The present observation as a policy takes it. Raises RsdError without cameras or before reset."""
        if not self.cameras:
            raise RsdError("observation: the environment was made with cameras=False and has no images")
        found = self._observation_dict()
        return Observation(
            images=np.stack([found[name] for name in CAMERAS]), state=found["state"], instruction=self.instruction
        )

    # -- for the expert, the recorder and the renderer ------------------------------------------------------------

    @property
    def simulation(self) -> Any:
        """LIBERO's robosuite environment."""
        if self._control is None:
            raise RsdError("the environment is closed; make a new one")
        return self._control.env

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model; a new object after every reset of the plain path."""
        return self.simulation.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data; a new object after every reset of the plain path."""
        return self.simulation.sim.data._data

    def success(self) -> bool:
        """The task's goal predicate."""
        return bool(self.simulation._check_success())

    def holds(self, predicate: str, *names: str) -> bool:
        """LIBERO's own predicate of objects and regions.

        "on" an object: above it, in contact, centres within 3 cm horizontally; "in" a region: origin within its box.
        """
        states = self.simulation.object_states_dict
        unknown = [name for name in names if name not in states] if names else ["nothing"]
        if unknown:
            raise RsdError(f"object: found the unknown name {unknown[0]!r}, known are {', '.join(sorted(states))}")
        return bool(self.simulation._eval_predicate([predicate, *names]))

    def sim_state(self) -> NDArray[np.float64]:
        """[1 + nq + nv]: time, joint positions, joint velocities. Fixtures are not in it: see fixture_poses."""
        return np.asarray(self.simulation.sim.get_state().flatten(), dtype=np.float64)

    def fixture_poses(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """body_pos [nbody, 3] and body_quat [nbody, 4] (w, x, y, z) of the model, which hold the fixtures' poses."""
        return self.model.body_pos.copy(), self.model.body_quat.copy()

    def restore(
        self,
        state: NDArray[np.float64],
        body_pos: NDArray[np.float64] | None = None,
        body_quat: NDArray[np.float64] | None = None,
    ) -> None:
        """Sets a recorded state (and fixture poses) and derives from it everything that is drawn."""
        expected = 1 + self.model.nq + self.model.nv
        state = real_array(f"state of {self.task.name}", state, "float64", (expected,))
        if (largest := np.abs(state).max()) > mujoco.mjMAXVAL:  # which it would start the scene anew for
            raise RsdError(f"state of {self.task.name}: expected numbers within {mujoco.mjMAXVAL:g}, found {largest:g}")
        if body_pos is not None:
            self.model.body_pos[:] = body_pos
        if body_quat is not None:
            self.model.body_quat[:] = body_quat
        self.simulation.sim.set_state_from_flattened(state)
        mujoco.mj_forward(self.model, self.data)
        self.simulation._post_process()  # the stove's flame

    def draw(self) -> NDArray[np.uint8]:
        """Draws the present state: uint8 [2, S, S, 3] in the order of CAMERAS, NOT rotated (as LIBERO stores it)."""
        if not self.cameras:
            raise RsdError("draw: the environment was made with cameras=False")
        self._make_current()
        size, sim = self.image_size, self.simulation.sim
        return np.stack([sim.render(camera_name=SIM_CAMERAS[name], width=size, height=size) for name in CAMERAS])

    def spots(self, things: Sequence[str]) -> NDArray[np.float32]:
        """Where the third-person camera sees the middles of things: [n, 2], x to the right and y down as shares of the
        upright picture (which is mirrored: LIBERO's is stored upside down and turned by 180 degrees), whether or not
        something hides them."""
        camera = self.data.camera(SIM_CAMERAS[CAMERAS[0]])
        known = self.simulation.obj_body_id
        if unknown := [name for name in things if name not in known]:
            raise RsdError(f"spots: expected some of {', '.join(known)}, found {shown(unknown)}")
        bodies = [known[name] for name in things]
        local = (self.data.xpos[bodies] - camera.xpos) @ camera.xmat.reshape(3, 3)  # x right, y up, looks along -z
        reach = np.tan(np.radians(self.model.camera(SIM_CAMERAS[CAMERAS[0]]).fovy[0]) / 2)
        right, up = (local[:, :2] / (-local[:, 2:] * reach)).T
        return np.stack([0.5 - right / 2, 0.5 - up / 2], axis=1).astype(np.float32)

    def latest(self) -> Mapping[str, Any]:
        """robosuite's observables as of the last step (`robot0_eef_pos`, ...); RsdError before a reset, or closed."""
        if not self._latest or self._control is None:
            raise RsdError("observation: expected a reset before the first observation, of an environment not closed")
        return self._latest

    @property
    def drawing_s(self) -> float:
        """Seconds that went into drawing so far; the plain path draws within its steps and counts none."""
        return sum(camera.drawing_s for camera in self._armed.values())

    def proprio(self) -> NDArray[np.float32]:
        """The 8-d state as of the last step."""
        latest = self.latest()
        return state_vector(latest["robot0_eef_pos"], latest["robot0_eef_quat"], latest["robot0_gripper_qpos"])

    # -- inside ---------------------------------------------------------------------------------------------------

    def _start_fixed(self, k: int) -> dict[str, Any]:
        states = init_states(self.suite, self.task.task_id)
        if not 0 <= k < len(states):
            raise RsdError(f"init_state of {self.task.name}: expected 0 to {len(states) - 1}, found {k}")
        if is_permuted(self.suite):
            self._arrange(fixed_layout(self.suite, self.task.task_id, k))
        self._rebuild(BENCHMARK_SEED)
        self._settle(states[k])
        return {"init_state": k}

    def _arrange(self, layout: Layout) -> None:
        """From the next rebuild on things start as the layout says, and its goal is what counts."""
        simulation = self.simulation
        problem = simulation.parsed_problem
        problem["initial_state"] = [list(words) for words in layout.start]
        problem["goal_state"] = [list(words) for words in layout.goal]
        problem["regions"] = {
            **self._scene_regions,
            **{name: region.as_problem() for name, region in layout.regions.items()},
        }
        if self.fast:  # else the rebuild reads the problem
            simulation.object_property_initializers.clear()
            simulation._setup_placement_initializer(None)
        self.goal, self.instruction, self.asks = layout.goal, layout.instruction, layout.asks

    def _start_placement(self, seed: int) -> dict[str, Any]:
        moved = np.inf
        for rejections in range(PLACEMENT_TRIES):
            draws = np.random.default_rng([seed, rejections])
            if is_permuted(self.suite):
                self._arrange(permuted_layout(self.suite, self.task.task_id, draws, free=FREE_SHARE))
            if (state := self._draw_state(draws)) is None:
                continue
            moved = self._settle(state)
            if moved <= UNSTABLE_DISTANCE:
                return {"placement_seed": seed, "placement_rejections": rejections}
        raise RsdError(
            f"placement of {self.task.name}, seed {seed}: expected a stable one within {PLACEMENT_TRIES} draws, "
            f"the last still moved {moved * 100:.1f} cm; choose another seed"
        )

    def _draw_state(self, draws: np.random.Generator, fixtures_seed: int | None = None) -> NDArray[np.float64] | None:
        """Poses of objects and arm, None where the draws leave no room for one of the objects; the fixtures stand as
        `fixtures_seed` draws them when it returns, None: any way.

        Every recorded placement seed stands for this order of the draws."""
        from robosuite.utils.errors import RandomizationError  # robosuite's import follows the choice of its OpenGL

        try:
            self._rebuild(int(draws.integers(2**32)))
            state = self.sim_state()
            # the benchmark's states were drawn with other fixture poses than its reset draws: a bowl stands up to
            # 2 cm off the middle of its drawer. Two draws here give the same offsets.
            self._rebuild(int(draws.integers(2**32)) if fixtures_seed is None else fixtures_seed)
        except RandomizationError:
            return None
        joints = self.simulation.robots[0]._ref_joint_pos_indexes
        # the benchmark's reset leaves the nominal arm pose; its noise comes with the stored state, as here
        state[1 + np.asarray(joints)] += draws.normal(0.0, ARM_JOINT_NOISE, len(joints))
        return state

    def _rebuild(self, seed: int) -> None:
        """Resets fixtures, objects, arm and controller; `seed` draws the fixtures' and objects' poses."""
        simulation = self.simulation
        self._make_current()
        for camera in self._armed.values():
            camera.armed = False
        with quiet():
            if not self.fast:
                # every rebuild appends its drawer sampler once more, which would shift all later random draws
                simulation.object_property_initializers.clear()
            for body, (position, quaternion) in self._unplaced_fixtures.items():
                # the sampler reads an object's site while the fixture still has its pose of the scene file
                self.model.body_pos[body], self.model.body_quat[body] = position, quaternion
            self._control.seed(seed)
            simulation.reset()
        # a soft reset keeps the gripper's ramped command, a rebuilt model starts it at zero
        simulation.robots[0].gripper.current_action = np.zeros(simulation.robots[0].gripper.dof)
        if self.fast:
            self._arm_control = ArmControl(simulation)

    def _read_unplaced_fixtures(self) -> dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Poses of the fixtures in the scene file: body id -> position [3], quaternion [4] (w, x, y, z)."""
        poses = {}
        for fixture in self.simulation.fixtures_dict.values():
            root = getattr(fixture, "root_body", None)
            element = self.simulation.model.worldbody.find(f".//body[@name='{root}']")
            if element is None:
                continue
            position = np.array(element.get("pos", "0 0 0").split(), dtype=float)
            quaternion = np.array(element.get("quat", "1 0 0 0").split(), dtype=float)
            poses[self.model.body(root).id] = (position, quaternion)
        return poses

    def _settle(self, state: NDArray[np.float64]) -> float:
        """Sets the initial state, takes the wait steps; returns the longest horizontal move of an object (m)."""
        self._control.set_init_state(state)
        bodies = [self.simulation.obj_body_id[name] for name in self.simulation.objects_dict]
        before = self.data.xpos[bodies, :2].copy()
        for i in range(WAIT_STEPS):
            self._control_step(np.asarray(WAIT_ACTION), i == WAIT_STEPS - 1, observe=i == WAIT_STEPS - 1)
        return float(np.linalg.norm(self.data.xpos[bodies, :2] - before, axis=1).max())

    def _control_step(self, action: NDArray[np.float64], draw: bool, observe: bool = True) -> None:
        """Without `observe`, `latest` and the observation stay what they were."""
        if self._mover is not None:
            self._mover.step()
        if draw or not self.fast:
            self._make_current()
        for camera in self._armed.values():
            camera.armed = draw
        if not self.fast:
            self._latest = self.simulation.step(action)[0]
            return
        if self._arm_control is None:
            raise RsdError("step: expected a reset before the first step")
        self._arm_control.step(action, observe)
        if observe:
            self._latest = self._arm_control.observed()

    def _make_current(self) -> None:
        """Selects this environment's GL context. robosuite never does: of two environments one draws black."""
        if self.cameras:
            self.simulation.sim._render_context_offscreen.gl_ctx.make_current()

    def _seen(self, camera: str, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture as the policy sees it, upright."""
        image = rotate_180(drawn)
        return image if self._look is None else self._look.seen(camera, image, round(CONTROL_HZ * self.data.time))

    def _observation_dict(self) -> dict[str, NDArray[Any]]:
        latest = self.latest()
        found: dict[str, NDArray[Any]] = {"state": self.proprio()}
        if self.cameras:
            for name, sim_name in SIM_CAMERAS.items():
                armed = self._armed.get(name)
                raw = latest[f"{sim_name}_image"] if armed is None else armed.image
                found[name] = self._seen(name, np.asarray(raw))
        return found


def make_libero(suite: str, task: int, **options: Any) -> LiberoEnv:
    """`gymnasium.make("rsd.sim.libero:rsd/Libero-v0", suite=..., task=...)`; the prefix imports this module."""
    return LiberoEnv(suite, task, **options)


# its own checks refuse what is no array: images come as they are, and LIBERO's limits are those of `step_limit`
gymnasium.register("rsd/Libero-v0", f"{__name__}:{make_libero.__name__}", disable_env_checker=True)


def simulator_versions() -> dict[str, str]:
    """Versions of everything that moves a LIBERO number: rsd, mujoco, robosuite, libero, GL backend, python, numpy."""
    found = versions()
    named = {name: found[name] for name in ("rsd", "python", "numpy", "mujoco", "robosuite")}
    return {**named, "libero": f"{DISTRIBUTION} {found[DISTRIBUTION]}", "gl_backend": gl_backend()}
