"""LeRobot's policies by diffusion and flow matching continue from a draft, by their own sampling loops."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from test_hosted import act, diffusion, saved, seen

from lerobot_policy_rsd.continuing import inference_steps, steps_left, trajectory
from lerobot_policy_rsd.hosted import HostedPolicy
from rsd.serving.server import PolicyServer, reserve
from rsd.targets.remote.openpi import served_at
from rsd.types import RsdError
from serving.messages import serving

STEPS = 4  # of `diffusion`


def chunk(policy: HostedPolicy, draft: np.ndarray | None = None, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    given = {} if draft is None else {"draft": (draft, steps)}
    (found,), _, _ = policy.predict([seen(0)], [None], **given)
    assert found.stats.prefills == 1
    return found.actions


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM"])
def test_a_diffusion_policy_takes_the_steps_that_are_left(tmp_path: Path, scheduler: str) -> None:
    directory = saved(diffusion(noise_scheduler_type=scheduler), tmp_path / "policy")
    policy, draft = HostedPolicy(str(directory), "cpu", 4), np.linspace(-0.8, 0.8, 28, dtype=np.float32).reshape(4, 7)
    assert policy.num_inference_steps == STEPS
    own, calls = chunk(policy), []
    np.testing.assert_array_equal(chunk(policy, draft), own)  # all steps: nothing of the draft
    hook = policy.policy.diffusion.unet.register_forward_hook(lambda *_: calls.append(1))
    apart = [float(np.abs(chunk(policy, draft, steps) - draft).mean()) for steps in (1, 2, 3, STEPS)]
    hook.remove()
    assert len(calls) == 1 + 2 + 3 + STEPS
    assert apart[0] < apart[-1]
    np.testing.assert_array_equal(chunk(policy), own)  # the scheduler is as before
    with pytest.raises(RsdError, match=r"steps: expected at most 4, .* found 5"):
        chunk(policy, draft, 5)


def test_one_step_removes_the_noise_where_the_network_tells_it_exactly(tmp_path: Path) -> None:
    policy = HostedPolicy(str(saved(diffusion(n_obs_steps=1), tmp_path / "policy")), "cpu")
    draft, model = np.linspace(-0.8, 0.8, 28, dtype=np.float32).reshape(4, 7), policy.policy.diffusion
    clean = trajectory(policy.policy, torch.from_numpy(draft)[None])  # its statistics: -1 to 1 is -1 to 1
    assert clean.shape == (1, 8, 7)
    torch.testing.assert_close(clean[0, 4:], clean[0, 3:4].expand(4, 7))

    def noise_of(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
        kept = model.noise_scheduler.alphas_cumprod[timestep[0]]
        return (sample - kept.sqrt() * clean) / (1 - kept).sqrt()

    model.unet.forward = noise_of
    for steps in (1, 2, 3):
        np.testing.assert_allclose(chunk(policy, draft, steps), draft, atol=1e-4)


def test_histories_shift_the_draft_and_one_action_at_a_time_has_none(tmp_path: Path) -> None:
    policy = HostedPolicy(str(saved(diffusion(), tmp_path / "policy")), "cpu")
    assert policy.num_inference_steps == 0  # asked every step
    draft = torch.arange(4.0)[None, :, None].expand(1, 4, 7)
    assert trajectory(policy.policy, draft)[0, :, 0].tolist() == [0, 0, 1, 2, 3, 3, 3, 3]
    other = HostedPolicy(str(saved(act(), tmp_path / "act")), "cpu")
    assert other.num_inference_steps == 0
    with pytest.raises(RsdError, match="expected at most 0"):
        chunk(other, np.zeros((6, 7), np.float32), 1)


class Flow:
    """What the sampling loops of pi0 and SmolVLA ask of their models, with a velocity that is known."""

    config = SimpleNamespace(num_inference_steps=10, num_steps=10, chunk_size=6, max_action_dim=32, use_cache=True)
    rtc_processor = None

    def __init__(self, goal: torch.Tensor) -> None:
        self.goal, self.times = goal, list[float]()
        own = SimpleNamespace(_attn_implementation="")
        inner = SimpleNamespace(language_model=SimpleNamespace(config=own))
        self.paligemma_with_expert = self.vlm_with_expert = SimpleNamespace(paligemma=inner, forward=self.forward)

    def forward(self, **_: Any) -> tuple[None, None]:
        return None, None

    def embed_prefix(self, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)

    def _prepare_attention_masks_4d(self, masks: torch.Tensor) -> torch.Tensor:
        return masks

    def _rtc_enabled(self) -> bool:
        return False

    def sample_noise(self, shape: Any, device: Any) -> torch.Tensor:
        return torch.randn(shape)

    def denoise_step(self, *, x_t: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(float(timestep[0]))
        return (x_t - self.goal) / timestep[0]


@pytest.mark.parametrize("kind", [PI0Pytorch, VLAFlowMatching])
def test_flow_matching_begins_at_its_time_with_its_share_of_noise(kind: Any) -> None:
    goal, draft = torch.full((1, 6, 32), 0.3), torch.full((1, 6, 7), -0.5)
    model = Flow(goal)
    policy: Any = SimpleNamespace(config=model.config, model=model)
    assert inference_steps(policy) == 10

    def sampled(noise: torch.Tensor | None) -> torch.Tensor:
        return kind.sample_actions(model, None, None, None, None, torch.zeros(1, 8), noise=noise)

    for steps in (1, 4, 10):
        model.times = []
        torch.manual_seed(0)
        with steps_left(policy, draft, steps) as start:
            found = sampled(start)
        torch.manual_seed(0)
        time, noise = steps / 10, model.sample_noise((1, 6, 32), None)
        clean = torch.nn.functional.pad(draft, (0, 25))
        torch.testing.assert_close(start, time * noise + (1 - time) * clean)
        np.testing.assert_allclose(model.times, [left / 10 for left in range(steps, 0, -1)], atol=1e-6)
        torch.testing.assert_close(found, goal)  # straight ahead from wherever it begins
    assert model.denoise_step.__func__ is Flow.denoise_step


def test_behind_a_port_the_draft_travels_in_the_request(tmp_path: Path) -> None:
    policy = HostedPolicy(str(saved(diffusion(n_obs_steps=1), tmp_path / "policy")), "cpu")
    draft = np.linspace(-0.8, 0.8, 28, dtype=np.float32).reshape(4, 7)
    here = chunk(policy, draft, 2)
    server: Any = PolicyServer(policy, policy.identity, {}, reserve("127.0.0.1", 0))  # type: ignore[arg-type]
    with serving(server) as address:
        remote: Any = served_at(address)
        assert remote.num_inference_steps == STEPS
        torch.manual_seed(0)
        np.testing.assert_allclose(remote.continue_from(seen(0), draft, 2).actions, here, atol=1e-6)
        remote.close()
