"""The policy type `rsd` in LeRobot: its own loading, batches, its queue, its rollout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.libero import get_task_init_states
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.env_processor import LiberoProcessorStep
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.import_utils import register_third_party_plugins
from libero.libero import benchmark

from lerobot_policy_rsd import states
from lerobot_policy_rsd.hosted import HostedPolicy
from rsd.conventions import rotate_180, state_vector
from rsd.policy import RsdPolicy
from rsd.sim.suites import init_states
from rsd.types import Observation, RsdError

register_third_party_plugins()
TASK = "pick up the bowl"


@pytest.fixture
def exported(make_policy: Callable[..., RsdPolicy], tmp_path: Path) -> Path:
    """A tiny checkpoint as a LeRobot policy's directory."""
    from lerobot_policy_rsd.modeling_rsd import export

    make_policy("rsd-fused").save_pretrained(tmp_path / "checkpoint")
    export(str(tmp_path / "checkpoint"), tmp_path / "policy", device="cpu", decode="rsd-fused")
    return tmp_path / "policy"


def load(directory: Path, *overrides: str) -> Any:
    """As lerobot-eval loads a policy."""
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=list(overrides))
    config.pretrained_path = directory
    return get_policy_class(config.type).from_pretrained(directory, config=config)


def rendered(seed: int, size: int = 32) -> dict[str, Any]:
    """What LeRobot's LIBERO returns of one simulator: turned by 180 degrees, state in parts."""
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=4)
    views = {key: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for key in ("image", "image2")}
    eef = {"pos": rng.normal(size=3), "quat": quaternion / np.linalg.norm(quaternion)}
    return {"pixels": views, "robot_state": {"eef": eef, "gripper": {"qpos": rng.normal(size=2)}}}


def batch_of(seeds: list[int]) -> dict[str, Any]:
    """Through LeRobot's own steps, up to where a policy's pre-processor begins."""

    def stack(parts: list[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {key: stack([part[key] for part in parts]) for key in parts[0]}
        return np.stack(parts)

    seen = preprocess_observation(stack([rendered(seed) for seed in seeds]))
    return {**PolicyProcessorPipeline(steps=[LiberoProcessorStep()])({**seen, "task": [TASK] * len(seeds)})}


def ours(seed: int) -> Observation:
    """The same simulator's observation as `rsd eval` has it."""
    seen = rendered(seed)
    views = rotate_180(np.stack([seen["pixels"][key] for key in ("image", "image2")]))
    eef = seen["robot_state"]["eef"]
    return Observation(views, state_vector(eef["pos"], eef["quat"], seen["robot_state"]["gripper"]["qpos"]), TASK)


@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_batch_gives_what_each_row_gives_alone(exported: Path, max_batch: int) -> None:
    policy = load(exported, f"--max_batch={max_batch}")
    before, after = make_pre_post_processors(policy.config, str(exported))
    alone = [RsdPolicy.from_pretrained(exported / "rsd", decode="rsd-fused") for _ in range(3)]
    for step in range(2):  # the second chunk has a memory of the first
        seeds = [3 * step, 3 * step + 1, 3 * step + 2]
        chunks = [own.predict(ours(seed)).actions for own, seed in zip(alone, seeds, strict=True)]
        for number in range(8):
            action = after(policy.select_action(before(batch_of(seeds if number == 0 else [97, 98, 99]))))
            np.testing.assert_allclose(action.numpy(), [chunk[number] for chunk in chunks], atol=1e-4)
    fresh = RsdPolicy.from_pretrained(exported / "rsd", decode="rsd-fused").predict(ours(5)).actions
    policy.reset()  # nothing is left of those episodes
    np.testing.assert_allclose(policy.predict_action_chunk(before(batch_of([5])))[0].numpy(), fresh, atol=1e-4)


def test_saved_by_lerobot_it_is_the_same_again(exported: Path, tmp_path: Path) -> None:
    policy = load(exported, "--decode=l1", "--execute=3")
    policy.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert (again.core.decode, again.core.execute) == ("l1", 3)
    before, _ = make_pre_post_processors(policy.config, str(exported))
    with pytest.raises(RsdError, match="rsd eval --policy DIR/rsd"):
        HostedPolicy(str(exported), "cpu")
    one, other = (each.predict_action_chunk(before(batch_of([1]))) for each in (policy, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": TASK}, "expected 1 instructions"),
        ({"observation.images.image2": torch.zeros(1, 3, 32, 48)}, "expected a square image"),
        ({"observation.images.image": torch.full((1, 3, 32, 32), 255.0)}, r"numbers in \[0, 1\]"),
        ({"observation.images.image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "expected float"),
    ],
)
def test_an_odd_batch_is_one_line(exported: Path, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(RsdError, match=expected):
        load(exported).select_action({**batch_of([0]), **change})


def test_lerobots_libero_has_the_initial_states_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [("libero_spatial", 3), ("libero_90", 89)]
    ours = [init_states(*each) for each in asked]
    states.write(tmp_path)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    for (name, number), expected in zip(asked, ours, strict=True):
        found = get_task_init_states(benchmark.get_benchmark_dict()[name](), number)
        np.testing.assert_array_equal(found, expected)


class Still(gymnasium.Env):
    """A simulator that ends after some steps, as LeRobot's LIBERO looks from outside."""

    task = task_description = TASK
    _max_episode_steps = 12
    metadata: ClassVar[dict[str, Any]] = {"render_fps": 20}

    def __init__(self) -> None:
        box = gymnasium.spaces.Box
        view = box(0, 255, (32, 32, 3), np.uint8)
        parts = {"eef": {"pos": (3,), "quat": (4,)}, "gripper": {"qpos": (2,)}}
        state = {
            name: gymnasium.spaces.Dict({key: box(-np.inf, np.inf, shape, np.float64) for key, shape in part.items()})
            for name, part in parts.items()
        }
        pixels = gymnasium.spaces.Dict({"image": view, "image2": view})
        self.observation_space = gymnasium.spaces.Dict({"pixels": pixels, "robot_state": gymnasium.spaces.Dict(state)})
        self.action_space = box(-1, 1, (7,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return rendered(seed or 0), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return rendered(1), 0.0, False, False, {"is_success": False}


def test_lerobots_own_rollout_runs_it(exported: Path) -> None:
    policy = load(exported)
    before, after = make_pre_post_processors(policy.config, str(exported))
    steps = PolicyProcessorPipeline(steps=[LiberoProcessorStep()]), PolicyProcessorPipeline(steps=[])
    env = gymnasium.vector.SyncVectorEnv([Still, Still])
    found = rollout(env, policy, *steps, before, after, seeds=[0, 4])
    assert found["action"].shape == (2, 12, 7)
    alone = RsdPolicy.from_pretrained(exported / "rsd", decode="rsd-fused")
    np.testing.assert_allclose(found["action"][1, :8].numpy(), alone.predict(ours(4)).actions, atol=1e-4)
