"""A LeRobot policy by diffusion or flow matching that takes only the last denoising steps, from a noised draft.

LeRobot's own sampling loop runs; what it is given is the noised draft in the place of noise, and fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn


def inference_steps(policy: PreTrainedPolicy) -> int:
    """Denoising steps of a whole prediction; 0 of a policy that does not denoise, or is compiled."""
    config = policy.config
    if getattr(config, "compile_model", False):  # what was compiled would not notice
        return 0
    if is_diffusion(policy):
        return int(policy.diffusion.num_inference_steps)
    real_time = getattr(getattr(config, "rtc_config", None), "enabled", False)  # begins from the chunk before
    if real_time or not hasattr(getattr(policy, "model", None), "denoise_step"):
        return 0
    return int(getattr(config, "num_inference_steps", 0) or getattr(config, "num_steps", 0))


def is_diffusion(policy: PreTrainedPolicy) -> bool:
    """LeRobot's DiffusionPolicy, with a scheduler of diffusers."""
    return hasattr(getattr(policy, "diffusion", None), "noise_scheduler")


def trajectory(policy: PreTrainedPolicy, draft: Tensor) -> Tensor:
    """A normalised draft [1, H, A] -> what the policy denoises [1, T, D]: its ends are repeated where the policy
    predicts further or, with several observations, from earlier on; dimensions that it pads with are 0."""
    config = policy.config
    if is_diffusion(policy):
        steps, start, width = config.horizon, config.n_obs_steps - 1, draft.shape[2]
    else:
        steps, start, width = config.chunk_size, 0, config.max_action_dim
    place = (torch.arange(steps, device=draft.device) - start).clamp(0, draft.shape[1] - 1)
    return nn.functional.pad(draft[:, place], (0, width - draft.shape[2]))


@contextmanager
def steps_left(policy: PreTrainedPolicy, draft: Tensor, steps: int) -> Iterator[Tensor]:
    """Inside, a prediction takes its last `steps` denoising steps -> the `noise` to give it, the noised draft.

    With all steps left it is noise, and nothing of the draft: the policy's own prediction.
    """
    whole, clean = inference_steps(policy), trajectory(policy, draft)
    if is_diffusion(policy):
        scheduler, noise = policy.diffusion.noise_scheduler, torch.randn_like(clean)
        with last_timesteps(scheduler, steps):
            scheduler.set_timesteps(whole)
            yield noise if steps == whole else scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    else:
        time, noise = steps / whole, policy.model.sample_noise(clean.shape, clean.device)  # at time 1 all is noise
        with last_velocities(policy.model, whole - steps):
            yield time * noise + (1 - time) * clean


@contextmanager
def last_timesteps(scheduler: Any, steps: int) -> Iterator[None]:
    """Whoever sets the scheduler's timesteps gets the last ones of them."""
    set_timesteps = scheduler.set_timesteps

    def shortened(*arguments: Any, **named: Any) -> None:
        set_timesteps(*arguments, **named)
        scheduler.timesteps = scheduler.timesteps[-steps:]

    scheduler.set_timesteps = shortened
    try:
        yield
    finally:
        del scheduler.set_timesteps  # the class's own is there again


@contextmanager
def last_velocities(model: Any, skipped: int) -> Iterator[None]:
    """The first so many velocities are 0 and cost nothing: x stays where it is until its time has come."""
    denoise_step, calls = model.denoise_step, 0

    def shortened(*arguments: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(named["x_t"]) if calls <= skipped else denoise_step(*arguments, **named)

    model.denoise_step = shortened
    try:
        yield
    finally:
        del model.denoise_step
