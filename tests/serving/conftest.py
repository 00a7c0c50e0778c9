"""A policy whose light draft remembers, and acts alone two chunks of three."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rsd.decoding.steps import SkipRule
from rsd.policy import PolicyConfig, RsdModel, RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer


@pytest.fixture
def make_policy(
    make_model: Callable[[int], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> Callable[..., RsdPolicy]:
    def make(decode: str = "rsd-skip", **options: Any) -> RsdPolicy:
        model = make_model(0)
        for head in (model.main.gripper_head, model.light.levels.gripper_head):  # or every chunk would switch it
            torch.nn.init.constant_(head.bias, -9.0)
        skip = SkipRule(threshold_mm=1e9, max_skips=2)
        return RsdPolicy(model, tokenizer, tiny_config, decode=decode, skip=skip, **options)

    return make
