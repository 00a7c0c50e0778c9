"""A policy executes the first steps of its chunks: what comes after them forces nothing and leaves nothing behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsd.decoding import decoders, primitives
from rsd.decoding.gate import SkipRule
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.types import Observation, RsdError

MakeObservation = Callable[..., Observation]
SWITCHING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]])  # closes at step 4, opens at step 8

def light_policy(policy: RsdPolicy, decode: str, **options: Any) -> RsdPolicy:
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, **options)


@pytest.mark.parametrize(("execute", "forced", "last"), [(3, False, 0), (4, True, 1), (None, True, 0)])
def test_the_tail_of_a_chunk_forces_nothing_and_leaves_nothing(
    policy: RsdPolicy,
    make_observation: MakeObservation,
    monkeypatch: pytest.MonkeyPatch,
    execute: int | None,
    forced: bool,
    last: int,
) -> None:
    drafted = decoders.proposed

    def proposed(*inputs: Any) -> Any:
        draft, forecast = drafted(*inputs)
        return replace(draft, gripper=SWITCHING), forecast

    monkeypatch.setattr(decoders, "proposed", proposed)
    monkeypatch.setattr(primitives, "likelier_gripper", lambda *_: SWITCHING)
    options: dict[str, Any] = {"engine": "eager", "target_at_reset": False, "audit": True, "execute": execute}
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9), **options)
    (chunk,), (state,), _ = skipping.core.predict([make_observation()])
    assert (chunk.stats.forced, chunk.stats.skipped, state.gripper) == (forced, not forced, (last,))
    assert chunk.actions.shape == (8, 7)
    assert np.array_equal(chunk.executed, chunk.actions[:execute])
    assert chunk.stats.gripper_differs is False
    monkeypatch.setattr(primitives, "likelier_gripper", lambda *_: SWITCHING * torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]))
    stats = skipping.core.predict([make_observation()]).chunks[0].stats  # the target closes a step later than drafted
    assert stats.gripper_differs is (execute != 3)


def test_a_deviation_is_that_of_the_executed_steps(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    found = []
    for execute in (1, 4, 8):
        audited = light_policy(policy, "drafter-only", audit=True, execute=execute).predict(make_observation())
        found.append((audited.stats.deviation_mm, audited.actions.tobytes()))
    (first, chunk), (middle, same), (whole, as_well) = found
    assert first < middle < whole  # of summed commands
    assert chunk == same == as_well


@pytest.mark.parametrize("decode", ["ar", "rsd-fused", "rsd-skip"])
def test_a_chunk_of_16_of_which_8_are_executed(
    chunks: np.ndarray, make_observation: MakeObservation, tiny_config: PolicyConfig, tmp_path: Path, decode: str
) -> None:
    config = replace(tiny_config, execute=8)
    tokenizer = ActionTokenizer.fit(np.concatenate([chunks, chunks[::-1]], axis=1), TokenizerConfig(horizon=16))
    options: dict[str, Any] = {"decode": decode, "engine": "eager", "skip": SkipRule(1e9)}
    policy = RsdPolicy.of(RsdModel.of(config, tokenizer), tokenizer, config, **options)
    policy.save_pretrained(tmp_path / "long")
    policy = RsdPolicy.from_pretrained(tmp_path / "long", **options)
    for seed in range(2):
        chunk = policy.predict(make_observation(seed))
        assert (chunk.actions.shape, chunk.executed.shape) == ((16, 7), (8, 7))
    assert RsdPolicy.from_pretrained(tmp_path / "long", **options, execute=12).execute == 12
    with pytest.raises(RsdError, match="execute 17: expected 1 to 16"):
        RsdPolicy.from_pretrained(tmp_path / "long", **options, execute=17)
