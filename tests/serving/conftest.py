"""A policy whose visual drafter remembers, and with `rsd-skip`, acts alone two chunks of three."""

from collections.abc import Callable
from typing import Any

import pytest

from rsd.decoding.gate import SkipRule
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer


@pytest.fixture
def make_policy(
    make_steady_model: Callable[[], RsdModel], tokenizer: ActionTokenizer, tiny_config: PolicyConfig
) -> Callable[..., RsdPolicy]:
    def make(decode: str = "rsd-skip", **options: Any) -> RsdPolicy:
        skip = SkipRule(threshold_mm=1e9, max_skips=2)
        return RsdPolicy.of(make_steady_model(), tokenizer, tiny_config, decode=decode, skip=skip, **options)

    return make
