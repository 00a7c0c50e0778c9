"""Targets by flow matching that continue from a draft: `rsd-fused` for them, and what of a wrong draft is inherited."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreign_server import foreign
from rsd.cli.eval import EvalArguments, plan_runs
from rsd.evaluation import foreign as policies
from rsd.evaluation.backend import ready, rsd_policy, settle
from rsd.evaluation.config import EvalConfig
from rsd.evaluation.foreign import check_foreign
from rsd.serving.server import PolicyServer, reserve
from rsd.targets.black_box import Drafter, SpeculatingPolicy
from rsd.targets.custom import CustomPolicy, identity
from rsd.targets.remote.openpi import served_at
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError
from serving.messages import serving
from two_ways import HERE, SEEN, STEPS, WAY, TwoWays, inherited


@pytest.fixture
def two_ways() -> CustomPolicy:
    return CustomPolicy(f"{HERE}:TwoWays")


@pytest.mark.parametrize("steps", [1, 3, 5, 8, STEPS])
def test_the_mode_of_a_wrong_draft_is_inherited_the_more_the_fewer_steps_are_left(
    two_ways: CustomPolicy, steps: int
) -> None:
    moved = apart = 0.0
    for seed in range(400):
        two_ways.reset(seed)
        own = two_ways.predict(SEEN).actions
        two_ways.reset(seed)
        found = two_ways.continue_from(SEEN, WAY, steps).actions
        moved, apart = moved + float(np.abs(found - own).mean()), apart + float(np.abs(WAY - own).mean())
    assert moved / apart == pytest.approx(inherited(steps), abs=0.08)
    assert inherited(STEPS) == 0
    assert inherited(1) > 0.99


def test_all_steps_are_the_targets_own_and_half_are_the_default(drafter: Drafter, two_ways: CustomPolicy) -> None:
    config = EvalConfig(policy=f"{HERE}:TwoWays", drafter="there", decode="rsd-fused")
    assert policies.steps_left(config, two_ways) == STEPS // 2
    policy = SpeculatingPolicy(drafter, two_ways, drafter.skip_rule(), "rsd-fused", steps=STEPS)
    policy.reset(3)
    chunk = policy.predict(SEEN)
    two_ways.reset(3)
    np.testing.assert_array_equal(chunk.actions, two_ways.predict(SEEN).actions)
    stats = chunk.stats
    assert (stats.prefills, stats.denoising_steps, stats.steps_in_full) == (1, STEPS, STEPS)
    assert stats.latency_ms.keys() == {"draft", "target", "total"}


def asked(drafter: Path, policy: str = f"{HERE}:TwoWays", **options: Any) -> EvalConfig:
    return EvalConfig(policy=policy, drafter=str(drafter), **options)


def test_rsd_eval_continues_where_steps_are_given(drafter: Drafter, tmp_path: Path) -> None:
    place = tmp_path / "drafter"
    replace(drafter.stored, target=identity(f"{HERE}:TwoWays")).save(place)
    config, why = settle(asked(place, continue_steps=2))
    assert (config.decode, why) == ("rsd-fused", f"{HERE}:TwoWays decodes by rsd-fused: a drafter is given")
    policy = rsd_policy(config)
    policy.reset(0)
    stats = policy.predict(SEEN).stats
    assert (stats.decode, stats.denoising_steps, stats.steps_in_full) == ("rsd-fused", 2, STEPS)
    compared = [run for run, _ in plan_runs(EvalArguments(asked(place, continue_steps=2), compare=True))]
    assert [(run.decode, run.continue_steps) for run in compared] == [
        ("target-only", None),
        ("rsd-fused", 2),
        ("drafter-only", None),
    ]
    with pytest.raises(RsdError, match="--continue-steps 11: expected at most 10, all that"):
        rsd_policy(asked(place, decode="rsd-fused", continue_steps=11))


CANNOT = "expected a target by diffusion or flow matching that continues from a draft"


def test_what_cannot_continue_is_refused_in_one_line(drafter: Drafter, tmp_path: Path) -> None:
    place = tmp_path / "drafter"
    for policy in (f"{HERE}:OneWay", "checkpoints/libero"):
        with pytest.raises(
            RsdError, match=f"^--decode rsd-fused: {CANNOT} .* found {policy}; choose --decode rsd-skip"
        ):
            check_foreign(asked(place, policy, decode="rsd-fused"))
    with pytest.raises(RsdError, match="--continue-steps 11: expected at most 10, all that"):
        check_foreign(asked(place, continue_steps=11))
    with foreign({}) as (address, sent), pytest.raises(RsdError, match=f"{CANNOT} .* found {address}"):
        ready(asked(place, address, decode="rsd-fused"))
    assert sent == []
    with pytest.raises(RsdError, match="--continue-steps with a --drafter and rsd-fused, found --decode rsd-skip"):
        asked(place, decode="rsd-skip", continue_steps=2)
    with pytest.raises(RsdError, match="--skip-threshold-mm: not with"):
        check_foreign(asked(place, continue_steps=2, skip_threshold_mm=5.0))


class Served:
    """TwoWays as a server takes a policy."""

    decode, image_size, cameras, execute, num_inference_steps = "target-only", 64, 2, 8, STEPS

    def predict(
        self, seen: Sequence[Observation], states: Any, draft: Any = None
    ) -> tuple[list[ActionChunk], Any, None]:
        policy = TwoWays()
        policy.reset()
        actions = policy.predict(seen[0]) if draft is None else policy.continue_from(seen[0], *draft)
        return [ActionChunk(actions.astype(np.float32), ChunkStats("target-only", prefills=1))], [None], None

    def verify_pending(self, pending: Any) -> Any: ...


def test_a_server_that_says_its_steps_is_sent_the_draft(two_ways: CustomPolicy) -> None:
    server: Any = PolicyServer(Served(), {"policy": "two ways"}, {}, reserve("127.0.0.1", 0))  # type: ignore[arg-type]
    with serving(server) as address, closing(served_at(address)) as remote:
        assert remote.num_inference_steps == STEPS
        two_ways.reset(0)
        np.testing.assert_allclose(remote.predict(SEEN).actions, two_ways.predict(SEEN).actions, atol=1e-6)
        two_ways.reset(0)
        here = two_ways.continue_from(SEEN, -WAY, 3).actions
        np.testing.assert_allclose(remote.continue_from(SEEN, -WAY, 3).actions, here, atol=1e-6)
        with pytest.raises(RsdError, match=r"draft: expected .*\[H, 7\]"):
            remote.continue_from(SEEN, WAY[:, :6], 3)
        with pytest.raises(RsdError, match="steps: expected"):
            remote.continue_from(SEEN, WAY, 0)
