from collections.abc import Callable
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rsd.decoding.decoders import DECODERS
from rsd.decoding.gate import SkipRule
from rsd.models.bundle import RsdModel
from rsd.policy import RsdPolicy
from rsd.types import Observation, RsdError

WAYS = [(name, "regress") for name in DECODERS] + [("rsd", "sequential")]
MakeObservation = Callable[..., Observation]


@pytest.mark.parametrize(("decode", "fine"), WAYS)
def test_actions_are_environment_ready(
    policy: RsdPolicy, make_observation: MakeObservation, decode: str, fine: str
) -> None:
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, fine=fine)
    grippers = set()
    for seed in range(5):
        chunk = policy.predict(make_observation(seed))
        assert chunk.actions.dtype == np.float32
        assert chunk.actions.shape == (8, 7)
        assert np.isfinite(chunk.actions).all()
        assert np.abs(chunk.actions).max() <= 1.0
        grippers |= set(chunk.actions[:, -1].tolist())
        stats = policy.verify() or chunk.stats
        assert stats.decode == decode
        assert stats.prefills == (decode != "drafter-only")
        before = [ms for stage, ms in stats.latency_ms.items() if stage != "verify-pending"]
        assert stats.latency_ms["total"] >= max(before)
    assert grippers <= {-1.0, 1.0}


def test_the_chunk_depends_on_everything_observed(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="l1")
    observation = make_observation()
    base = policy.predict(observation).actions
    assert np.array_equal(policy.predict(observation).actions, base)
    for change in (
        {"images": 255 - observation.images},
        {"state": observation.state + np.float32(0.1)},
        {"instruction": "open the drawer"},
    ):
        changed = replace(observation, **change)  # type: ignore[arg-type]
        assert not np.array_equal(policy.predict(changed).actions, base)


def test_statistics_of_a_chunk(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    stats = policy.predict(make_observation()).stats
    assert (stats.decode, stats.acceptance, stats.target_passes) == ("rsd", "margin", 1)
    assert stats.num_draft_tokens == [48, 48, 48]
    assert len(stats.num_accepted_tokens) == 3
    assert all(0 <= n <= 48 for n in stats.num_accepted_tokens)
    full = [n == 48 for n in stats.num_accepted_tokens]
    assert stats.accepted_levels == (full.index(False) if False in full else 3)
    assert {"preprocess", "vision", "prefill", "draft", "verify", "decode", "total"} == set(stats.latency_ms)
    assert stats.gripper_acceptance in {n / 8 for n in range(9)}
    plain = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="ar")
    stats = plain.predict(make_observation()).stats
    assert (stats.acceptance, stats.target_passes, stats.num_draft_tokens) == ("", 7, [])
    assert stats.gripper_acceptance is None


@pytest.mark.parametrize("decode", ["rsd", "rsd-fused", "rsd-skip"])
@pytest.mark.parametrize(("bias", "accepted"), [(-100.0, 0.0), (100.0, 1.0)])
def test_the_grippers_acceptance_is_that_of_the_draft_by_the_main(
    policy: RsdPolicy, make_observation: MakeObservation, decode: str, bias: float, accepted: float
) -> None:
    policy.model.target.gripper_head.bias.data.fill_(100.0)
    for draft in (policy.model.feature_drafter, policy.model.visual_drafter.levels):
        draft.gripper_head.bias.data.fill_(bias)
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode)
    chunk = policy.predict(make_observation())
    assert chunk.stats.gripper_acceptance == accepted
    assert (chunk.actions[:, -1] == 1).all()  # the target has the last word


def test_every_instruction_is_answered_by_its_own_encoding(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    """More instructions than the cache of encodings holds."""
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="l1")
    texts = [" ".join(words) for words in islice(permutations(["put", "bowl", "plate", "wine", "rack"]), 70)]
    first = [policy.predict(make_observation(instruction=text)).actions for text in texts]
    again = [policy.predict(make_observation(instruction=text)).actions for text in texts]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({actions.tobytes() for actions in first}) == len(texts)


# checkpoints


@pytest.mark.parametrize(("decode", "fine"), WAYS)
def test_a_saved_policy_acts_the_same(
    checkpoint: Path, tmp_path: Path, make_observation: MakeObservation, decode: str, fine: str
) -> None:
    """Weights are stored as fp16, so the comparison is after one round."""
    first = RsdPolicy.from_pretrained(checkpoint, decode=decode, fine=fine, skip=SkipRule(10.0))
    first.save_pretrained(tmp_path / "again")
    second = RsdPolicy.from_pretrained(str(tmp_path / "again"), decode=decode, fine=fine, skip=SkipRule(10.0))
    assert second.config == first.config
    assert second.provenance == first.provenance == {"data": "random weights"}
    for seed in range(3):
        observation = make_observation(seed)
        assert np.array_equal(first.predict(observation).actions, second.predict(observation).actions)


# what must never become an action


@pytest.mark.parametrize("size", [16, 64])
def test_images_of_another_size_are_refused(policy: RsdPolicy, make_observation: MakeObservation, size: int) -> None:
    with pytest.raises(RsdError, match=f"expected 32 x 32 pixels, found {size} x {size}"):
        policy.predict(make_observation(size=size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.full(8, np.nan, np.float32)}, "finite numbers"),
        ({"state": np.zeros(7, np.float32)}, r"expected \[8\], found \[7\]"),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8)}, r"\[2, S, S, 3\]"),
        ({"images": np.zeros((2, 32, 32, 3), np.float32)}, r"\[2, S, S, 3\]"),
        ({"instruction": " "}, "instruction: expected text"),
    ],
)
def test_odd_observations_cannot_be_made(
    make_observation: MakeObservation, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RsdError, match=message):
        replace(make_observation(), **change)


@pytest.mark.parametrize(("decode", "fine"), WAYS)
def test_a_state_that_turned_nan_raises(
    policy: RsdPolicy, make_observation: MakeObservation, decode: str, fine: str
) -> None:
    observation = make_observation()
    observation.state[2] = np.nan  # after it was checked: arrays can be written to
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, fine=fine)
    with pytest.raises(RsdError, match="non-finite"):
        policy.predict(observation)


def last_linear(model: RsdModel, head: str) -> Tensor:
    module = model.get_submodule(head)
    if isinstance(module, nn.Sequential):
        module = module[-1]
    return module.bias  # type: ignore[return-value]


LIGHT_HEADS = (
    "visual_drafter.levels.level_head",
    "visual_drafter.levels.gripper_head",
    "visual_drafter.residual_head",
    "visual_drafter.deviation_head",
)
USED_HEADS = {
    ("ar", "regress"): ("target.level_head", "target.gripper_head"),
    ("parallel", "regress"): ("target.parallel_head", "target.gripper_head"),
    ("l1", "regress"): ("target.residual_head", "target.gripper_head"),
    ("coarse-only", "regress"): ("feature_drafter.level_head", "feature_drafter.gripper_head"),
    ("rsd", "regress"): (
        "target.level_head",
        "target.gripper_head",
        "target.residual_head",
        "feature_drafter.level_head",
        "feature_drafter.gripper_head",
    ),
    ("rsd", "sequential"): (
        "target.level_head",
        "target.gripper_head",
        "feature_drafter.level_head",
        "feature_drafter.gripper_head",
    ),
    ("rsd-skip", "regress"): (*LIGHT_HEADS, "target.level_head", "target.gripper_head", "target.residual_head"),
    ("rsd-fused", "regress"): (*LIGHT_HEADS[:2], "target.level_head", "target.gripper_head", "target.residual_head"),
    ("drafter-only", "regress"): LIGHT_HEADS,
    **dict.fromkeys(
        [("draft-first", "regress"), ("rsd-async", "regress")],
        (*LIGHT_HEADS, "target.level_head", "target.gripper_head", "target.residual_head"),
    ),
}


def test_every_way_of_decoding_has_its_heads_listed() -> None:
    assert set(USED_HEADS) == set(WAYS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("decode", "fine", "head"), [(*way, h) for way in WAYS for h in USED_HEADS[way]])
def test_non_finite_model_output_raises(
    policy: RsdPolicy, make_observation: MakeObservation, decode: str, fine: str, head: str, poison: float
) -> None:
    """A NaN wins an argmax, an infinity is clamped into the range of an action: both would go unnoticed."""
    policy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, fine=fine)
    policy.predict(make_observation())
    with torch.no_grad():
        last_linear(policy.model, head)[..., -1] = poison
    with pytest.raises(RsdError, match="non-finite"):
        policy.predict(make_observation())


# drawn tokens


DRAWN = ("ar", "parallel", "rsd", "rsd-fused")


@pytest.mark.parametrize("decode", DRAWN)
def test_an_episodes_seed_decides_what_is_drawn(
    policy: RsdPolicy, make_observation: MakeObservation, decode: str
) -> None:
    first, second = (
        RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, temperature=1.0) for _ in range(2)
    )

    def episode(drawing: RsdPolicy, seed: int | None) -> list[np.ndarray]:
        drawing.reset(seed)
        return [drawing.predict(make_observation(i)).actions for i in range(2)]

    new = episode(first, None)
    assert np.array_equal(new, episode(second, None))  # a new policy's draws repeat
    on = episode(first, None)
    assert not np.array_equal(on, new)  # and go on
    once = episode(first, 5)
    assert np.array_equal(once, episode(second, 5))
    assert np.array_equal(once, episode(first, 5))
    assert not np.array_equal(once, episode(first, 6))
    greedy = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode)
    assert np.array_equal(episode(greedy, 5), episode(greedy, 6))
    stats = first.predict(make_observation()).stats
    assert stats.acceptance == ("exact" if DECODERS[decode].drafts else "")
    # the gripper is never drawn
    assert all(np.array_equal(a[:, -1], b[:, -1]) for a, b in zip(once, on, strict=True))


@pytest.mark.parametrize("head", ["target.level_head", "feature_drafter.level_head"])
def test_no_symbol_is_drawn_from_what_is_not_finite(
    policy: RsdPolicy, make_observation: MakeObservation, head: str
) -> None:
    drawing = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="rsd", temperature=1.0)
    with torch.no_grad():
        last_linear(policy.model, head)[..., -1] = float("nan")
    with pytest.raises(RsdError, match="non-finite"):
        drawing.predict(make_observation())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature: expected a number that is 0 or from 0.001 to 1000, found -0.5"),
        ({"temperature": float("inf")}, "temperature: expected a number that is 0 or from 0.001 to 1000, found inf"),
        *(
            ({"decode": decode}, f"expected decode ar, parallel, rsd, rsd-fused, found '{decode}'.*temperature 0")
            for decode in DECODERS
            if decode not in DRAWN
        ),
        ({"acceptance": "margin"}, "expected acceptance 'exact' .* found acceptance 'margin'.* leave it out"),
        ({"decode": "rsd-fused", "fine": "regress"}, "expected acceptance 'exact' .* found fine 'regress'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        RsdPolicy.from_pretrained(checkpoint, **{"temperature": 1.0, **options})


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "fast"}, "decode 'fast': expected one of ar, parallel, l1, rsd, rsd-fused, rsd-skip, draft-first,"),
        ({"acceptance": "always"}, "acceptance 'always'"),
        ({"fine": "coarse"}, "fine: expected one of regress, sequential or null, found 'coarse'"),
        ({"acceptance": 3}, "acceptance: expected text or null, found 3"),
        ({"acceptance": f"distance({10**25})"}, r"acceptance 'distance\(1000"),
        ({"temperature": "hot"}, "temperature: expected a number that is 0 or from 0.001 to 1000, found 'hot'"),
        ({"batch": 0}, "batch: expected an integer from 1 to 4096, found 0"),
        ({"batch": 2.0}, "batch: expected an integer from 1 to 4096, found 2.0"),
        ({"audit": "no"}, "audit: expected true or false, found 'no'"),
        ({"skip": 3}, "skip: expected SkipRule or null, found 3"),
        ({"engine": "compiled"}, "engine 'compiled': expected device cuda, found cpu"),
        (
            {"acceptance": "residual", "fine": "sequential"},
            "acceptance 'residual': expected fine 'regress', found 'sequential'; leave it out",
        ),
    ],
)
def test_unknown_options_are_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        RsdPolicy.from_pretrained(checkpoint, **options)
