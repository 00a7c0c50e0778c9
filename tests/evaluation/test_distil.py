"""`rsd drafter distil`, end to end, on a simulator of a dozen steps."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from websockets.sync.client import connect

from foreign_server import foreign, proxied
from rsd.collection import target_rollouts, workers
from rsd.evaluation import distil as distillation
from rsd.evaluation.backend import describe_checkpoint, ready, rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.distil import ROLLOUTS, attributes_of, distil
from rsd.evaluation.distil_config import DistilConfig
from rsd.locks import exclusive
from rsd.models.config import DrafterConfig, StandaloneDrafterConfig, VisualDrafterConfig
from rsd.targets.black_box import load_drafter
from rsd.targets.drafter_files import read_drafter
from rsd.targets.remote.openpi import openpi_message
from rsd.targets.remote.wire import pack, unpack
from rsd.training.config import LoopConfig
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

LIMIT, HORIZON = 12, 4
LEVELS = DrafterConfig(levels=2, dim=16, layers=1, heads=2)
DRAFTER = StandaloneDrafterConfig(
    32, 16, VisualDrafterConfig(1, (16, 16, 16, 16), dim=16, layers=1, heads=2, levels=LEVELS, depth=1)
)


class PointEnv:
    """The fingertip goes where it is told; an episode has LIMIT steps and succeeds where it ends up high enough."""

    made, last = 0, 10**6  # episodes begun; the one at which somebody presses Ctrl-C

    def __init__(self, suite: str, task_id: int, image_size: int, cameras: bool) -> None:
        self.task = SimpleNamespace(name=f"task_{task_id}", task_id=task_id)
        self.instruction, self.image_size = "pick up the black bowl", image_size
        self.steps, self.position = 0, np.zeros(3)

    def reset(self, *, options: dict[str, Any]) -> None:
        PointEnv.made += 1
        if PointEnv.made > PointEnv.last:
            raise KeyboardInterrupt
        self.steps, self.position = 0, np.random.default_rng(options["placement_seed"]).normal(size=3)

    def step_chunk(
        self, actions: np.ndarray, before_step: Callable[[], None]
    ) -> tuple[None, float, bool, bool, dict[str, Any]]:
        for action in actions[: LIMIT - self.steps]:
            before_step()
            self.position, self.steps = self.position + 0.05 * action[:3], self.steps + 1
        high = bool(self.steps >= LIMIT and self.position[2] > 0)
        return None, 0.0, high, self.steps >= LIMIT, {}

    def draw(self) -> np.ndarray:
        shade = int(np.clip(128 + 60 * self.position[2], 0, 255))
        return np.full((2, self.image_size, self.image_size, 3), shade, np.uint8)

    def proprio(self) -> np.ndarray:
        return np.concatenate([self.position, np.zeros(5)]).astype(np.float32)

    def observation(self) -> Observation:
        return Observation(self.draw(), self.proprio(), self.instruction)

    def latest(self) -> dict[str, np.ndarray]:
        sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7}
        return {name: np.zeros(size) for name, size in sizes.items()}

    def sim_state(self) -> np.ndarray:
        return np.zeros(5)

    def fixture_poses(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, 3)), np.zeros((2, 4))


class Here:
    """A worker pool in this process."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(workers, "worker_environment", PointEnv)
    monkeypatch.setattr(workers, "worker_pool", lambda workers: nullcontext(Here()))
    monkeypatch.setattr(target_rollouts, "libero_attributes", lambda config, task: {})
    monkeypatch.setattr(target_rollouts, "simulator_versions", dict)
    monkeypatch.setattr(target_rollouts, "suite_task", lambda suite, task: SimpleNamespace(name=f"task_{task}"))
    monkeypatch.setattr(distillation, "suite_tasks", lambda suite: [(0, "task_0", "x"), (1, "task_1", "y")])
    target_rollouts.worker_target.cache_clear()
    yield
    target_rollouts.worker_target.cache_clear()
    torch.set_num_threads(threads)


def homeward(message: dict[str, Any]) -> np.ndarray:
    """A target that pulls the fingertip to the origin, [HORIZON, 7]; the gripper closes below."""
    position = np.asarray(message["observation/state"][:3], np.float32)
    pull, grip = np.clip(-position, -1, 1), np.where(position[2] < 0, 1.0, -1.0)
    return np.tile(np.concatenate([pull, np.zeros(3), [grip]]).astype(np.float32), (HORIZON, 1))


def asked(address: str, output: Path, **options: Any) -> DistilConfig:
    given: dict[str, Any] = {"num_rollouts": 9, "num_dagger": 2, "rounds": 1, "num_calibration": 13, "alpha": 0.1}
    loop = LoopConfig(steps=3, batch_size=8, warmup=1, log_every=1)
    return DistilConfig(
        address, output=output, execute=HORIZON, drafter=DRAFTER, loop=loop, validation_every=4, **given | options
    )


def episodes(config: DistilConfig, last: int = 10**6) -> int:
    """How many a distillation begins; Ctrl-C comes after `last` of them."""
    PointEnv.made, PointEnv.last = 0, last
    with pytest.raises(KeyboardInterrupt) if last < 10**6 else nullcontext():
        distil(config)
    return PointEnv.made


def test_a_distillation_has_its_folder_for_itself(tmp_path: Path) -> None:
    config = asked("ws://127.0.0.1:1", tmp_path / "run")
    with exclusive(config.output), pytest.raises(RsdError, match="another run is writing here"):
        distil(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "episodes.jsonl").touch()
    with pytest.raises(RsdError, match=r"expected a folder of its own, found episodes\.jsonl"):
        distil(config)


def test_a_drafter_for_a_server_goes_on_evaluates_and_serves(tmp_path: Path) -> None:
    with foreign({"model": "homeward"}, answer=homeward) as (address, _):
        config = asked(address, tmp_path / "run")
        assert episodes(config, last=5) == 6
        assert episodes(config) == 2 * (9 + 2 + 13) - 5
        made = distil(config)
        assert episodes(config) == 0
        assert config.output / "drafter" == made

        stored = read_drafter(made)
        assert stored.target == {"policy": address, "metadata": {"model": "homeward"}}
        assert (stored.self_deviation.pairs, stored.self_deviation.p90_mm) == (18, 0.0)  # it answers always alike
        assert stored.epsilon_mm == config.epsilon_mm
        assert stored.calibration is not None
        assert stored.calibration.episodes == 26

        settled = evaluated(address, made)
        assert settled.decode == "rsd-skip"
        described = describe_checkpoint(settled)
        assert described["metadata"] == {"model": "homeward"}
        policy = rsd_policy(settled)
        policy.reset()
        env = PointEnv("", 0, 256, cameras=True)
        first = policy.predict(env.observation())
        np.testing.assert_array_equal(first.actions, homeward(openpi_message(env.observation())))
        assert first.stats.skipped is False
        policy.target.close()  # type: ignore[attr-defined]

        drafter = load_drafter(made)
        with proxied(address, drafter, {"model": "homeward"}) as place, connect(place, compression=None) as client:
            assert unpack(client.recv())["speculation"]["horizon"] == HORIZON  # type: ignore[arg-type]
            client.send(pack(openpi_message(env.observation())))
            answer = unpack(client.recv())  # type: ignore[arg-type]
            np.testing.assert_array_equal(answer["actions"], first.actions)
    with foreign({"model": "other"}, answer=homeward) as (address, _):
        with pytest.raises(RsdError, match="made otherwise"):
            distil(asked(address, tmp_path / "run"))
        with pytest.raises(RsdError, match="distilled from another target"):
            rsd_policy(evaluated(address, made))
        with pytest.raises(RsdError, match="distilled from another target"):  # before a worker is started
            ready(evaluated(address, made))


def test_too_few_rollouts_name_their_option_as_early_as_can_be(tmp_path: Path) -> None:
    with foreign({}, answer=homeward) as (address, sent):
        few = DistilConfig(address, output=tmp_path / "few", num_rollouts=1, drafter=DRAFTER)
        found = r"found 2 rollouts of at most 44; give --num-rollouts 2 or more"
        with pytest.raises(RsdError, match=f"^expected at least 100 chunks, {found}$"):
            distil(few)
        assert sent == []
        with pytest.raises(RsdError, match="at least 100 chunks, found 96; take more --num-rollouts"):
            distil(asked(address, tmp_path / "run", num_rollouts=8))


def evaluated(address: str, drafter: Path) -> EvalConfig:
    return settle(EvalConfig(policy=address, drafter=str(drafter)))[0]


def test_a_server_is_not_asked_for_the_device_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "check_device", lambda device: None)
    monkeypatch.setattr(distillation.Run, "round", lambda run, number, drafter: tmp_path / run.target.device)
    monkeypatch.setattr(distillation.Run, "finish", lambda run, trained: trained)
    with foreign({}) as (address, _):
        assert distil(asked(address, tmp_path, device="cuda")) == tmp_path / "cpu"


def test_a_target_that_never_answers_alike_sets_epsilon_and_drafters_lead_elsewhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noisy(message: dict[str, Any]) -> np.ndarray:
        chunk = homeward(message)
        chunk[:, :3] += rng.normal(0, 0.2, chunk[:, :3].shape)
        return np.clip(chunk, -1, 1)

    with foreign({}, answer=noisy) as (address, _):
        made = distil(asked(address, tmp_path / "run", num_calibration=1))
    stored = read_drafter(made)
    assert stored.self_deviation.p50_mm > 0.1
    assert stored.epsilon_mm == stored.self_deviation.p90_mm
    assert stored.calibration is None
    assert "take a promise" in stored.uncalibrated
    looks = [look for each in attributes_of(tmp_path / "run" / ROLLOUTS / "round-1") for look in each["looks"]]
    drove = [look["drove"] for look in looks]
    assert len(looks) == 2 * 2 * LIMIT // HORIZON
    assert 0.4 < np.mean(drove) <= 1.0


class Failing:
    """A policy of one's own, whose third episode raises, or every one."""

    image_size = 64

    def __init__(self, always: bool, raised: BaseException) -> None:
        self.always, self.raised, self.episodes = always, raised, 0

    def reset(self, seed: int | None = None) -> None:
        self.episodes += 1

    def predict(self, observation: Observation) -> ActionChunk:
        if self.always or self.episodes == 3:
            raise self.raised
        return ActionChunk(np.zeros((HORIZON, 7), np.float32), ChunkStats("target-only"))


@pytest.mark.parametrize(
    ("always", "raised", "expected"),
    [
        (
            False,
            SystemExit(0),
            r"^1 of 30 rollouts .* task_0 demo_2 \(the target's predict: SystemExit: 0\); finished",
        ),
        (
            False,
            KeyError("state"),
            r"^1 of 30 rollouts .* task_0 demo_2 \(the target's predict: KeyError: 'state'\); finished",
        ),
        (
            True,
            KeyError("state"),
            r"^the target's predict: KeyError: 'state' \(8 times in a row, so the run stops here\); finished epis",
        ),
    ],
)
def test_what_a_target_raises_costs_its_episode_until_it_lasts(
    always: bool, raised: BaseException, expected: str, tmp_path: Path
) -> None:
    config = target_rollouts.RolloutConfig(tmp_path / "out", "libero_spatial", (0,), 30, "target", {}, 64, HORIZON)
    with pytest.raises(RsdError, match=expected):
        target_rollouts.roll_out(config, lambda: Failing(always, raised))
