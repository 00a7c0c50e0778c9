"""LeRobot's own policies behind a port, and `--policy lerobot:DIR`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from lerobot_policy_rsd.hosted import HostedPolicy
from rsd.evaluation.backend import LIBERO, settle
from rsd.evaluation.config import EvalConfig
from rsd.targets.remote.lerobot import RUNNING, Asked, address_of, end
from rsd.types import Observation, RsdError
from rsd.words import FLAGS, word_flags

SIDE = 64
CAMERAS = ("observation.images.image", "observation.images.image2")
INPUTS = {
    **{key: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for key in CAMERAS},
    "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
}
WORDS = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (FLAGS,))}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
STATS: dict[str, Any] = {
    **{key: {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)} for key in CAMERAS},
    "observation.state": {"mean": torch.arange(8.0), "std": torch.full((8,), 2.0), "min": -torch.ones(8) * 9},
    "action": {"mean": torch.full((7,), 0.1), "std": torch.full((7,), 0.05), "min": -torch.ones(7)},
}
STATS["observation.state"]["max"], STATS["action"]["max"] = -STATS["observation.state"]["min"], torch.ones(7)


def act(**more: Any) -> ACTConfig:
    small = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1}
    options = {"chunk_size": 12, "n_action_steps": 6, "pretrained_backbone_weights": None, **small, **more}
    inputs = {"input_features": INPUTS, **options}
    return ACTConfig(**inputs, output_features=OUTPUTS, device="cpu", push_to_hub=False)


def diffusion(**more: Any) -> DiffusionConfig:
    small = {
        "down_dims": (16, 32),
        "num_train_timesteps": 4,
        "crop_shape": (60, 60),
        "spatial_softmax_num_keypoints": 4,
    }
    options = {"horizon": 8, "n_action_steps": 4, "noise_scheduler_type": "DDIM", **small, **more}
    return DiffusionConfig(input_features=INPUTS, output_features=OUTPUTS, device="cpu", push_to_hub=False, **options)


def saved(config: Any, directory: Path) -> Path:
    """As LeRobot's trainer leaves a policy, with random weights."""
    torch.manual_seed(0)
    get_policy_class(config.type)(config).save_pretrained(directory)
    for pipeline in make_pre_post_processors(config, dataset_stats=STATS):
        pipeline.save_pretrained(directory)
    return directory


def seen(seed: int, size: int = SIDE, instruction: str = "pick up the bowl") -> Observation:
    rng = np.random.default_rng(seed)
    views = rng.integers(1, 256, (2, size, size, 3), dtype=np.uint8)
    return Observation(views, rng.normal(size=8).astype(np.float32), instruction)


def by_lerobot(directory: Path, observations: list[Observation]) -> np.ndarray:
    """What LeRobot itself does with them, one a control step."""
    from lerobot.configs.policies import PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(directory)
    policy = get_policy_class(config.type).from_pretrained(directory)
    before, after = make_pre_post_processors(config, str(directory))
    policy.reset()
    actions = []
    for step, each in enumerate(observations):
        torch.manual_seed(step)  # the noise of a diffusion
        views = torch.from_numpy(each.images).permute(0, 3, 1, 2).float() / 255
        batch = {key: view[None] for key, view in zip(CAMERAS, views, strict=True)}
        batch |= {"observation.state": torch.from_numpy(each.state)[None], "task": [each.instruction]}
        batch[next(iter(WORDS))] = torch.from_numpy(word_flags(each.instruction))[None]
        with torch.inference_mode():
            actions.append(after(policy.select_action(before(batch)))[0].numpy())
    return np.stack(actions)


def test_a_chunk_is_lerobots_own(tmp_path: Path) -> None:
    policy = HostedPolicy(str(saved(act(), tmp_path / "act")), "cpu")
    assert (policy.execute, policy.image_size) == (6, SIDE)
    (chunk,), _, _ = policy.predict([seen(0)], [None])
    assert chunk.actions.shape == (12, 7)
    np.testing.assert_allclose(chunk.executed, by_lerobot(tmp_path / "act", [seen(0)] * 6), atol=1e-5)
    assert chunk.stats.prefills == 1
    with pytest.raises(RsdError, match="expected at most 12"):
        HostedPolicy(str(tmp_path / "act"), "cpu", 13)


def test_one_that_takes_words_is_told_them(tmp_path: Path) -> None:
    directory = saved(act(input_features={**INPUTS, **WORDS}), tmp_path / "act")
    policy, asked = HostedPolicy(str(directory), "cpu"), [seen(0), seen(0, instruction="open the drawer")]
    chunks = [policy.predict([each], [None])[0][0].executed for each in asked]
    for each, chunk in zip(asked, chunks, strict=True):
        np.testing.assert_allclose(chunk, by_lerobot(directory, [each] * 6), atol=1e-5)
    assert abs(chunks[0] - chunks[1]).max() > 1e-4
    other = {**INPUTS, next(iter(WORDS)): PolicyFeature(FeatureType.ENV, (7,))}
    with pytest.raises(RsdError, match=r"found observation.environment_state \[7\]"):
        HostedPolicy(str(saved(act(input_features=other), tmp_path / "other")), "cpu")


def test_one_with_a_queue_of_the_present_alone_gives_its_chunk(tmp_path: Path) -> None:
    directory = saved(diffusion(n_obs_steps=1), tmp_path / "policy")
    policy, asked = HostedPolicy(str(directory), "cpu"), [seen(0)] * 4
    torch.manual_seed(0)
    (chunk,), _, _ = policy.predict([seen(0)], [None])
    np.testing.assert_allclose(chunk.executed, by_lerobot(directory, asked), atol=1e-5)
    assert chunk.stats.prefills == 1


@pytest.mark.parametrize("kind", ["averaged", "two steps"])
def test_one_that_remembers_is_asked_every_step_and_sessions_are_apart(tmp_path: Path, kind: str) -> None:
    averaged = act(n_action_steps=1, temporal_ensemble_coeff=0.01)
    kinds = {"averaged": averaged, "two steps": diffusion()}
    directory = saved(kinds[kind], tmp_path / "policy")
    policy, steps = HostedPolicy(str(directory), "cpu"), 5
    assert policy.execute == 1
    episodes, found = [None, None], [[], []]
    for step in range(steps):
        for session in range(2):
            torch.manual_seed(step)
            (chunk,), (episodes[session],), _ = policy.predict([seen(10 * session + step)], [episodes[session]])
            found[session].append(chunk)
    for session in range(2):
        truth = by_lerobot(directory, [seen(10 * session + step) for step in range(steps)])
        np.testing.assert_allclose([chunk.actions[0] for chunk in found[session]], truth, atol=1e-5)
    passes = [chunk.stats.prefills for chunk in found[0]]
    assert passes == ([1] * steps if kind == "averaged" else [1, 0, 0, 0, 1])
    if kind != "averaged":  # its history is then what it sees now
        (chunk,), _, _ = HostedPolicy(str(directory), "cpu", 4).predict([seen(0)], [None])
        assert chunk.actions.shape == (4, 7)


def test_rsd_starts_it_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSD_LEROBOT_PYTHON", sys.executable)
    directory = saved(act(), tmp_path / "act")
    config = settle(EvalConfig(policy=f"lerobot:{directory}", threads=2))[0]
    policy = LIBERO.make_policy(config)
    policy.reset()
    assert policy.image_size == SIDE
    chunk = policy.predict(seen(0))
    np.testing.assert_allclose(chunk.executed, by_lerobot(directory, [seen(0)] * 6), atol=1e-5)
    known = LIBERO.describe_policy(config)
    assert known["type"] == "act"
    assert known["server"]["lerobot"]
    assert known["server"]["torch_threads"] == "2"
    asked = Asked(config.policy, "cpu", None, 2)
    process = RUNNING[asked].process
    assert address_of(asked) == RUNNING[asked].address  # the same one
    policy.close()
    end(process)
    assert process.poll() is not None
    (directory / "model.safetensors").unlink()
    with pytest.raises(RsdError, match="LeRobot cannot load it"):
        address_of(asked)
