from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rsd.decoding import decoders, primitives
from rsd.decoding.decoders import DECODERS
from rsd.decoding.gate import SkipRule
from rsd.decoding.state import EpisodeState
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.target import TargetModel
from rsd.models.visual_drafter import VisualDrafter
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.config import TokenizerConfig
from rsd.types import VERIFYING, ActionChunk, Observation, RsdError

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
    ("draft-first", "regress"): (*LIGHT_HEADS, "target.level_head", "target.gripper_head", "target.residual_head"),
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
    assert stats.acceptance == ("exact" if decode in VERIFYING else "")
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


# memory of the episode


def light_policy(policy: RsdPolicy, decode: str, **options: Any) -> RsdPolicy:
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode=decode, **options)


def test_skipping_leaves_the_main_idle_until_it_has_to_look_again(
    policy: RsdPolicy, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout: no switch forces the target
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2), target_at_reset=False)
    looks = list[bool]()
    see = TargetModel.embed_prefix
    monkeypatch.setattr(TargetModel, "embed_prefix", lambda *a: looks.append(True) or see(*a))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(7)]
    assert [s.prefills for s in stats] == [0, 0, 1, 0, 0, 1, 0]
    assert len(looks) == 2
    assert all("prefill" not in s.latency_ms for s in stats if not s.prefills)
    assert all(np.isfinite(s.expected_deviation_mm) for s in stats)
    assert [bool(s.num_draft_tokens) for s in stats] == [bool(s.prefills) for s in stats]
    skipping.predict(make_observation(7))
    assert skipping.predict(make_observation(8)).stats.prefills == 1
    skipping.reset()
    assert skipping.predict(make_observation(9)).stats.prefills == 0


def test_a_memory_of_the_main_is_of_use_for_a_while(
    policy: RsdPolicy, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)
    known = list[bool]()
    perceive = VisualDrafter.perceive
    monkeypatch.setattr(VisualDrafter, "perceive", lambda *a: known.append(a[4] is not None) or perceive(*a))
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=3, memory_chunks=2))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(8)]
    assert [s.prefills for s in stats] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert known == [False, True, True, False, False, True, True, False]


def test_a_gripper_that_closes_at_once_forces_the_main(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    policy.model.visual_drafter.levels.gripper_head.bias.data.fill_(100.0)
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9), target_at_reset=False)
    stats = skipping.predict(make_observation(0)).stats
    assert stats.forced
    assert stats.prefills == 1


def test_a_gripper_switch_forces_the_main(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    policy.model.target.gripper_head.bias.data.fill_(-100.0)
    policy.model.visual_drafter.levels.gripper_head.bias.data.fill_(100.0)
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2))
    chunks = [skipping.predict(make_observation(seed)) for seed in range(4)]
    assert [chunk.stats.prefills for chunk in chunks] == [1, 1, 1, 1]
    assert all((chunk.actions[:, -1] == -1).all() for chunk in chunks)  # and has the last word


SWITCHING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]])  # closes at step 4, opens at step 8


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


def test_no_threshold_no_skip(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    skipping = light_policy(policy, "rsd-skip")
    fused = light_policy(policy, "rsd-fused")
    for seed in range(4):
        observation = make_observation(seed)
        chunk = skipping.predict(observation)
        assert chunk.stats.prefills == 1
        assert np.array_equal(chunk.actions, fused.predict(observation).actions)


def test_the_memory_is_of_this_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    fused = light_policy(policy, "rsd-fused", audit=True)
    fresh = fused.predict(make_observation(3)).stats.expected_deviation_mm
    again = fused.predict(make_observation(3)).stats.expected_deviation_mm
    fused.reset()
    assert fresh != again
    assert fused.predict(make_observation(3)).stats.expected_deviation_mm == fresh


def test_a_checkpoint_without_light_draft_decodes_the_other_ways(
    tiny_config: PolicyConfig, tokenizer: ActionTokenizer, make_observation: MakeObservation, tmp_path: Path
) -> None:
    config = replace(tiny_config, visual_drafter=None)
    RsdPolicy.of(RsdModel.of(config, tokenizer), tokenizer, config).save_pretrained(tmp_path)
    RsdPolicy.from_pretrained(tmp_path, decode="rsd").predict(make_observation())
    assert RsdPolicy.from_pretrained(tmp_path).decode == "rsd"
    with pytest.raises(RsdError, match=r"decode 'rsd-fused': this checkpoint has no visual drafter; use rsd"):
        RsdPolicy.from_pretrained(tmp_path, decode="rsd-fused")


# acting before the target has looked


def acting_ahead(policy: RsdPolicy, **options: Any) -> RsdPolicy:
    return RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="draft-first", **options)


def test_ahead_of_the_main_the_drafts_own_chunk_is_executed(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    """Beside `rsd-fused`, which drafts with the same memory of the target."""
    fused = light_policy(policy, "rsd-fused").core
    told, left_alone = acting_ahead(policy), acting_ahead(policy)
    state = EpisodeState()
    for i in range(4):
        observation = make_observation(i)
        with torch.inference_mode():
            draft = fused.ops.draft(fused.body([observation]), state.memory)
            forecast = fused.ops.forecast(draft)
        expected = fused._to_actions(forecast.value, draft.gripper)[0]
        _, (state,), _ = fused.predict([observation], [state])
        for other in (told, left_alone):
            assert np.allclose(other.predict(observation).actions, expected, atol=1e-6)
        told.verify()


def test_alone_the_light_draft_always_acts_as_at_an_episodes_start(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    alone = RsdPolicy.of(policy.model, policy.tokenizer, policy.config, decode="drafter-only")
    for i in range(3):
        chunk = alone.predict(make_observation(i))
        assert np.array_equal(chunk.actions, acting_ahead(policy).predict(make_observation(i)).actions)
        assert (chunk.stats.prefills, chunk.stats.target_passes, chunk.stats.skipped) == (0, 0, True)
        assert set(chunk.stats.latency_ms) == {"preprocess", "draft", "total"}


def test_the_verification_judges_the_chunk(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy, audit=True)
    first = ahead.predict(make_observation(0)).stats
    assert (first.prefills, first.skipped, first.num_draft_tokens, first.deviation_mm) == (0, False, [], None)
    assert set(first.latency_ms) == {"preprocess", "draft", "total"}
    before = replace(first, latency_ms=dict(first.latency_ms))
    stats = ahead.verify()
    assert first == before  # what was returned stays as it was
    assert stats is not None
    assert (stats.prefills, stats.target_passes, stats.skipped) == (1, 0, False)
    assert stats.num_draft_tokens == [48] * 3
    assert 0 < sum(stats.num_accepted_tokens) <= 144
    assert stats.deviation_mm is not None
    assert stats.deviation_mm > 0
    assert stats.expected_deviation_mm == first.expected_deviation_mm
    assert stats.latency_ms["verify-pending"] > 0
    assert stats.latency_ms["total"] == first.latency_ms["total"]
    assert ahead.verify() is None  # nothing is left
    unaware = acting_ahead(policy)
    unaware.predict(make_observation(0))
    ahead.predict(make_observation(1))
    # begins with what was left, so its draft remembers the same
    assert np.array_equal(unaware.predict(make_observation(1)).actions, acting_after(policy, make_observation).actions)


def acting_after(policy: RsdPolicy, make_observation: MakeObservation) -> ActionChunk:
    """The second chunk of an episode of which the first was verified at once."""
    ahead = acting_ahead(policy)
    ahead.predict(make_observation(0))
    ahead.verify()
    return ahead.predict(make_observation(1))


def test_what_is_left_to_do_ends_with_its_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy)
    fresh = ahead.predict(make_observation(0)).actions
    ahead.reset()
    assert np.array_equal(ahead.predict(make_observation(0)).actions, fresh)
    remembering = ahead.predict(make_observation(0)).actions
    assert not np.array_equal(remembering, fresh)


def test_a_prediction_leaves_nothing_in_the_policy_and_nothing_changes_what_was_given(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    """The same states give the same chunks, whatever was predicted in between, by whom."""
    core = light_policy(policy, "rsd-fused").core
    one, other = make_observation(0), make_observation(1)
    (first,), (state,), pending = core.predict([one])
    assert pending is None
    assert state.memory is not None
    held = [tensor.clone() for tensor in state.memory.keys]
    (second,), (later,), _ = core.predict([other], [state])
    core.predict([other])
    core.predict([one], [later])
    assert all(torch.equal(a, b) for a, b in zip(held, state.memory.keys, strict=True))
    assert np.array_equal(core.predict([other], [state]).chunks[0].actions, second.actions)
    assert np.array_equal(core.predict([one], [None]).chunks[0].actions, first.actions)
    assert not np.array_equal(core.predict([other]).chunks[0].actions, second.actions)


def test_pending_verifications_of_two_episodes_do_not_meet(
    policy: RsdPolicy, make_observation: MakeObservation
) -> None:
    core = acting_ahead(policy).core
    pending, alone = [], []
    for seed in range(2):
        pending.append(core.predict([make_observation(seed)]).pending)
        alone.append(core.verify_pending(acting_ahead(policy).core.predict([make_observation(seed)]).pending))
    for found, expected in zip(reversed(pending), reversed(alone), strict=True):
        (stats,), (state,) = core.verify_pending(found)
        assert stats.num_accepted_tokens == expected.stats[0].num_accepted_tokens
        assert all(torch.equal(a, b) for a, b in zip(state.memory.keys, expected.states[0].memory.keys, strict=True))


def test_a_failing_verification_forgets_the_episode(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead = acting_ahead(policy)
    fresh = ahead.predict(make_observation(0)).actions
    kept = policy.model.target.level_head.bias.clone()
    with torch.no_grad():
        policy.model.target.level_head.bias.fill_(float("nan"))
    with pytest.raises(RsdError, match="non-finite"):
        ahead.verify()
    with torch.no_grad():
        policy.model.target.level_head.bias.copy_(kept)
    assert np.array_equal(ahead.predict(make_observation(0)).actions, fresh)


def test_a_verification_may_come_from_another_thread(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    ahead, alone = acting_ahead(policy), acting_ahead(policy)
    with ThreadPoolExecutor(1) as aside:
        for i in range(6):
            chunk = ahead.predict(make_observation(i))
            aside.submit(ahead.verify)  # not waited for: the next prediction does it, or waits for it
            assert np.array_equal(chunk.actions, alone.predict(make_observation(i)).actions)


# the target at an episode's first observation


def test_the_target_runs_at_reset(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    for gripper in (policy.model.target.gripper_head, policy.model.visual_drafter.levels.gripper_head):
        gripper.bias.data.fill_(-100.0)  # open throughout: no switch forces the target
    skipping = light_policy(policy, "rsd-skip", skip=SkipRule(1e9, max_skips=2))
    stats = [skipping.predict(make_observation(seed)).stats for seed in range(5)]
    assert [s.prefills for s in stats] == [1, 0, 0, 1, 0]
    assert [s.forced for s in stats] == [True, False, False, False, False]
    skipping.reset()
    assert skipping.predict(make_observation(9)).stats.prefills == 1
