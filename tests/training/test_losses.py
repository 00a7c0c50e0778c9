from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rsd.data.demonstrations import load_demonstrations
from rsd.models.bundle import PolicyConfig, RsdModel
from rsd.models.trunk import KVCache
from rsd.tokenizer.action_tokenizer import ActionTokenizer
from rsd.tokenizer.rfsq import Rfsq
from rsd.training.dataset import Batch, FrameDataset
from rsd.training.losses import LossConfig, draft_losses, grounding_loss, jittered, policy_losses
from rsd.types import RsdError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch(demonstrations: Path) -> Batch:
    dataset = FrameDataset(load_demonstrations(demonstrations), 8, CPU)
    return dataset.batch(torch.arange(0, len(dataset), 13))


@pytest.fixture
def model(tiny_config: PolicyConfig, tokenizer: ActionTokenizer) -> RsdModel:
    torch.manual_seed(0)
    return RsdModel.of(tiny_config, tokenizer)


def alone(model: RsdModel) -> RsdModel:
    """The same without its visual drafter."""
    return RsdModel(model.target, model.feature_drafter, None)


@given(st.integers(1, 3), st.integers(0, 6), st.integers(0, 1000))
def test_jittered_digits_stay_in_range_and_within_the_margin(half: int, margin: int, seed: int) -> None:
    torch.manual_seed(seed)
    digit = torch.randint(-half, half + 1, (20, 30)).float()
    moved = jittered(digit, torch.full((20, 1), 0.5), margin, half)
    assert moved.abs().max() <= half
    assert (moved - digit).abs().max() <= margin
    assert torch.equal(moved, moved.round())
    assert torch.equal(jittered(digit, torch.zeros(20, 1), margin, half), digit)


def test_jitter_moves_the_asked_share_both_ways_by_every_amount() -> None:
    torch.manual_seed(0)
    digit = torch.zeros(2, 20_000)
    moved = jittered(digit, torch.tensor([[0.1], [0.8]]), 2, 3)
    assert (moved != 0).float().mean(1).tolist() == pytest.approx([0.1, 0.8], abs=0.01)
    values, counts = moved[1].unique(return_counts=True)
    assert values.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert (counts / 20_000).tolist() == pytest.approx([0.2] * 5, abs=0.02)


def prefixes_shown(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, config: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """What the blocks 2..L of the target are told in training."""
    shown: list[Tensor] = []
    extend = model.target.extend

    def spy(prefixes: list[Tensor], gripper: Tensor, first_level: int, cache: KVCache) -> list[Tensor]:
        assert first_level == 2
        shown.extend(prefixes)
        return extend(prefixes, gripper, first_level, cache)

    monkeypatch.setattr(model.target, "extend", spy)
    policy_losses(alone(model), tokenizer, batch, config)
    return shown


def test_without_draft_and_jitter_the_target_is_told_the_true_prefixes(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = prefixes_shown(model, tokenizer, batch, LossConfig(draft_share=0.0, jitter=0.0), monkeypatch)
    code = Rfsq(tokenizer.config.rfsq)
    symbols, _ = code.quantise(tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step)
    assert len(shown) == 7
    for level, prefix in enumerate(shown, start=1):
        assert torch.allclose(prefix, code.dequantise(symbols[:, :level]), atol=1e-5)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_with_the_draft_in_the_loop_its_digits_come_first_and_the_rest_corrects_them(
    model: RsdModel,
    tokenizer: ActionTokenizer,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    jitter: float,
) -> None:
    model.eval()
    shown = prefixes_shown(model, tokenizer, batch, LossConfig(draft_share=1.0, jitter=jitter), monkeypatch)
    code = Rfsq(tokenizer.config.rfsq)
    truth = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step
    with torch.no_grad():
        prefix = model.target.embed_prefix(batch.images, batch.state, model.target.encode_text(batch.words))
        features, _ = model.target.prefill(prefix)
        read, _ = model.feature_drafter.read(features)
        gripper = tokenizer.gripper_symbols(batch.chunk)
        motion = torch.empty(len(truth), 0, truth.shape[1], dtype=torch.long)
        for level in (1, 2, 3):
            tokens = model.feature_drafter.logits(read, code.dequantise(motion), gripper, level).argmax(-1)
            motion = torch.cat([motion, tokens.unsqueeze(1)], dim=1)
            assert torch.allclose(shown[level - 1], code.dequantise(motion), atol=1e-5)
    for level in range(4, 8):
        digit = code.digit(truth - code.dequantise(motion), level).long() + code.config.half
        motion = torch.cat([motion, digit.unsqueeze(1)], dim=1)
        assert torch.allclose(shown[level - 1], code.dequantise(motion), atol=1e-5)


def test_jittered_prefixes_leave_what_finer_levels_mostly_take_out(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shown = prefixes_shown(model, tokenizer, batch, LossConfig(draft_share=0.0, jitter=0.4), monkeypatch)
    truth = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step
    code = Rfsq(tokenizer.config.rfsq)
    plain = code.quantise(truth)[0]
    moved = (shown[0] - code.dequantise(plain[:, :1])).abs() > 0.5
    assert 0.1 < moved.float().mean() < 0.3  # the rate is drawn between 0 and 0.4 for each sample
    left = (shown[-1] - truth).abs()
    assert (left <= tokenizer.config.rfsq.tail_reach(7) + 2**-8).float().mean() > 0.9


def test_draft_digits_are_its_own_where_asked_and_the_truth_elsewhere(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    code = Rfsq(tokenizer.config.rfsq)
    truth = tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step
    gripper = tokenizer.gripper_symbols(batch.chunk)
    features = torch.randn(len(truth), 8, 64)
    own = (torch.arange(len(truth)) % 2 == 0)[:, None]
    shown, _ = draft_losses(model.feature_drafter, features, truth, gripper, own, code)
    true = code.quantise(truth)[0][:, :3].float() - 3
    found = torch.stack(shown, dim=1)
    assert torch.equal(found[1::2], true[1::2])
    assert not torch.equal(found[::2], true[::2])


def paired(batch: Batch) -> Batch:
    """The same batch, its second half taken for earlier moments of the first."""
    even = len(batch.chunk) // 2 * 2
    rows = {name: getattr(batch, name)[:even] for name in ("images", "state", "words", "chunk", "episode", "done")}
    return Batch(**rows, paired=True)


def losses_of(model: RsdModel, tokenizer: ActionTokenizer, batch: Batch) -> dict[str, Tensor]:
    return policy_losses(model, tokenizer, paired(batch), LossConfig())


def test_losses_are_finite_and_train_every_parameter(model: RsdModel, tokenizer: ActionTokenizer, batch: Batch) -> None:
    losses = losses_of(model, tokenizer, batch)
    drafts = {"draft", "visual", "visual_regress", "deviation"}
    assert {"levels", "parallel", "gripper", "l1", "regress", "total"} | drafts == set(losses)
    assert all(torch.isfinite(value) and value.ndim == 0 for value in losses.values())
    losses["total"].backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untouched == []


def test_a_whole_block_is_told_the_whole_draft_and_trained(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Tensor] = []
    whole = model.target.whole

    def spy(value: Tensor, cache: KVCache, length: int) -> Tensor:
        told.append(value)
        return whole(value, cache, length)

    monkeypatch.setattr(model.target, "whole", spy)
    level = model.target.block.level
    model.target.whole_block = True
    losses = policy_losses(alone(model), tokenizer, batch, LossConfig(draft_share=0.0, jitter=0.0))
    code = Rfsq(tokenizer.config.rfsq)
    symbols, _ = code.quantise(tokenizer.to_coefficients(batch.chunk) / tokenizer.first_step)
    assert len(told) == 1
    assert torch.allclose(told[0], code.dequantise(symbols[:, :3]), atol=1e-5)
    losses["whole"].backward()
    assert level.grad is not None
    assert level.grad[-1].abs().sum() > 0
    assert level.grad[:-1].abs().sum() == 0


def test_counterfactual_drafts_are_another_samples_and_the_truth_is_still_asked_for(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()  # no dropout
    told: list[Tensor] = []
    whole = model.target.whole
    monkeypatch.setattr(model.target, "whole", lambda value, *rest: told.append(value) or whole(value, *rest))
    model.target.whole_block = True
    found = {}
    for share in (0.0, 1.0):
        config = LossConfig(draft_share=0.0, jitter=0.0, counterfactual=share)
        found[share] = policy_losses(alone(model), tokenizer, batch, config)
    assert torch.equal(told[1], told[0].roll(1, 0))
    assert found[1.0]["whole"] > found[0.0]["whole"]  # more is missing after a wrong draft
    assert torch.equal(found[1.0]["regress"], found[0.0]["regress"])


def test_shares_of_a_loss_are_shares() -> None:
    with pytest.raises(RsdError, match=r"counterfactual: expected a number from 0 to 1, found 1\.5"):
        LossConfig(counterfactual=1.5)


@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ("draft", ("feature_drafter",)),
        ("visual", ("visual_drafter",)),
        ("visual_regress", ("visual_drafter",)),
        ("deviation", ("visual_drafter",)),
    ],
)
def test_a_drafts_losses_reach_that_draft_alone(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch, loss: str, trained: tuple[str, ...]
) -> None:
    losses_of(model, tokenizer, batch)[loss].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == set(trained)


def test_the_deviation_loss_trains_the_self_assessment_alone(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    losses_of(model, tokenizer, batch)["deviation"].backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert reached
    assert all(name.startswith("visual_drafter.deviation_head") for name in reached)


def test_a_light_draft_needs_pairs_of_frames(model: RsdModel, tokenizer: ActionTokenizer, batch: Batch) -> None:
    with pytest.raises(RsdError, match="expected a batch of paired frames"):
        policy_losses(model, tokenizer, batch, LossConfig())


def test_grounding_is_learnt_from_the_things_that_could_have_been_asked_for(
    tiny_config: PolicyConfig, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    torch.manual_seed(0)
    target = RsdModel.of(replace(tiny_config, target=replace(tiny_config.target, grounded=True)), tokenizer).target
    half = (len(batch.words) + 1) // 2
    side = tiny_config.target.image_size // 16 // tiny_config.target.merge[0]
    spot = torch.full((half, 2), 0.5 / side)  # the middle of the first token
    spot[0] = torch.nan
    asked = replace(batch, asked=(batch.words[::2], spot))
    weights = list(target.parameters())
    optimiser = torch.optim.Adam(weights, 3e-3)
    before = grounding_loss(target, asked)
    for _ in range(30):
        optimiser.zero_grad()
        grounding_loss(target, asked).backward()
        optimiser.step()
    after = grounding_loss(target, asked)
    assert after < 0.2 * before
    text = target.encode_text(batch.words[::2])
    logits = target.grounding_logits(target.embed_prefix(batch.images[::2], batch.state[::2], text))
    assert (logits[1:].argmax(-1) == 0).all()
    assert grounding_loss(target, replace(batch, asked=(batch.words[::2], torch.full((half, 2), torch.nan)))) == 0


def test_grounding_needs_a_target_that_is_trained_for_it(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    with pytest.raises(RsdError, match="grounded"):
        policy_losses(alone(model), tokenizer, batch, LossConfig(grounding=1.0))


def test_drafts_and_the_forecast_of_their_deviation_learn_on_different_episodes(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    rows = paired(batch)
    half = len(rows.chunk) // 2

    def losses(episode: int, share: int) -> dict[str, Tensor]:
        one = replace(rows, episode=torch.full((2 * half,), episode))
        torch.manual_seed(0)
        config = LossConfig(forecast_every=share)
        return policy_losses(model, tokenizer, one, config)

    everything, drafts, forecast = losses(1, 0), losses(1, 5), losses(10, 5)
    for name in ("visual", "visual_regress"):
        assert float(drafts[name]) == pytest.approx(float(everything[name]), rel=1e-4)
        assert forecast[name] == 0
    assert drafts["deviation"] == 0
    assert float(forecast["deviation"]) == pytest.approx(float(everything["deviation"]), rel=1e-4)
    with pytest.raises(RsdError, match="episodes"):
        policy_losses(model, tokenizer, replace(rows, episode=None), LossConfig(forecast_every=5))
    with pytest.raises(RsdError, match="forecast_every: expected"):
        LossConfig(forecast_every=1)


def test_blocks_of_every_nth_row_have_the_losses_of_those_rows(
    model: RsdModel, tokenizer: ActionTokenizer, batch: Batch
) -> None:
    alone_, config = alone(model).eval(), LossConfig(draft_share=0.0, jitter=0.0)
    third = policy_losses(alone_, tokenizer, batch, replace(config, levels_every=3))
    rows = {name: getattr(batch, name)[::3] for name in ("images", "state", "words", "chunk")}
    of_those = policy_losses(alone_, tokenizer, Batch(**rows), config)
    of_all = policy_losses(alone_, tokenizer, batch, config)
    for name in ("levels", "regress"):
        assert torch.allclose(third[name], of_those[name], rtol=1e-5)
        assert not torch.allclose(third[name], of_all[name], rtol=1e-5)
    for name in ("l1", "gripper", "parallel"):
        assert torch.allclose(third[name], of_all[name], rtol=1e-5)
    third["levels"].backward()
    assert all(part.grad is not None and part.grad.any() for part in model.target.level_head.parameters())


def test_blocks_of_every_nth_row_cost_less(model: RsdModel, tokenizer: ActionTokenizer, batch: Batch) -> None:
    def flops(every: int) -> int:
        with FlopCounterMode(display=False) as count:
            policy_losses(alone(model), tokenizer, batch, LossConfig(levels_every=every))
        return count.get_total_flops()

    assert flops(4) < 0.8 * flops(1)
