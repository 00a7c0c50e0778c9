"""The codes that ours is compared with do what they are known for."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dct

from rsd.tokenizer.action_tokenizer import ActionTokenizer, TokenizerConfig
from rsd.types import RsdError
from studies.tokenizers.codecs import Bins, Codec, LayerNormRfsq, ResidualCode, Scale, Splines, nominal_bits
from studies.tokenizers.fast import Fast
from studies.tokenizers.learned import LearnConfig
from studies.tokenizers.metrics import Chunks, rate_points, rms, utilisation
from studies.tokenizers.vector import ResidualFsq, ResidualVq


@pytest.fixture(scope="module")
def scale(chunks: np.ndarray) -> Scale:
    return Scale.of(chunks[..., :-1])


@pytest.fixture(scope="module")
def motion(chunks: np.ndarray, scale: Scale) -> np.ndarray:
    return scale.normalise(chunks[..., :-1])


@pytest.fixture(scope="module")
def others(other_chunks: np.ndarray, scale: Scale) -> np.ndarray:
    return scale.normalise(other_chunks[..., :-1])


def test_bins_err_by_half_a_bin_inside_and_clip_outside(others: np.ndarray) -> None:
    codec = Bins(32, np.ones(6, np.float32), 8)
    codes = codec.encode(others)
    assert codes.min() >= 0
    assert codes.max() == 31
    error = np.abs(codec.decode(codes, 1) - others.clip(-1, 1))
    assert error.max() <= 1 / 32 + 1e-5
    assert nominal_bits(codec.tokens(codes, 1), 32) == 48 * 5


def test_splines_reproduce_the_lines_that_they_hold(motion: np.ndarray, others: np.ndarray) -> None:
    """The test's chunks are straight lines but for clipping: two control points suffice."""
    straight = others[np.abs(others - others[:, ::-1] + 2 * (others - others.mean(1, keepdims=True))).max((1, 2)) > -1]
    straight = straight[np.abs(np.diff(straight, n=2, axis=1)).max((1, 2)) < 1e-5]
    assert len(straight) > 20
    for points in (2, 5):
        codec = Splines(motion, points, 4096)
        assert np.abs(codec.decode(codec.encode(straight), 1) - straight).max() < 0.01


def test_layer_norm_decodes_through_forward_and_not_from_tokens(motion: np.ndarray, others: np.ndarray) -> None:
    codec = LayerNormRfsq(motion, 8, 7)
    forward, decoded = rms(codec.forward(others) - others), rms(codec.decode(codec.encode(others), 8) - others)
    assert forward < 0.02
    assert decoded > 10 * forward


def test_fast_errs_by_half_a_step_per_coefficient_and_breaks_on_a_wrong_token(motion: np.ndarray) -> None:
    codec = Fast(motion, 10.0, vocabulary=300)
    codes = codec.encode(motion)
    assert len({len(sequence) for sequence in codes}) > 1
    decoded = codec.decode(codes, 1)
    assert np.abs(dct(decoded - motion, axis=1, norm="ortho")).max() <= 0.05 + 1e-4
    assert 0.1 < codec.undecodable_share(codes) <= 1.0
    with pytest.raises(ValueError, match="characters"):
        codec.decode_one(codes[0][:-1])


def test_fast_passes_over_the_numbers_that_are_no_characters(motion: np.ndarray) -> None:
    """With such a scale coefficients reach Unicode's surrogates, at 0xD800, and go beyond them."""
    wide = np.clip(motion, -3, 3)[:40]
    codec = Fast(wide, 12_000.0, vocabulary=300)
    assert codec.highest - codec.lowest > 0xE000
    decoded = codec.decode(codec.encode(wide), 1)
    assert np.abs(dct(decoded - wide, axis=1, norm="ortho")).max() <= 0.51 / 12_000.0 + 1e-5
    with pytest.raises(RsdError, match="expected coefficients within a range of"):
        Fast(wide, 1e7)


def test_residual_vq_improves_with_every_level_and_with_a_learned_decoder(
    motion: np.ndarray, others: np.ndarray
) -> None:
    codec = ResidualVq(motion, 16, 3, 5)
    codes = codec.encode(others)
    assert codes.shape == (300, 3)
    errors = [rms(codec.decode(codes, level) - others) for level in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    # the tokens hold everything: what the library's own forward pass returns
    quantised, _, _ = codec.vq(torch.from_numpy(others).flatten(1))
    assert np.allclose(codec.decode(codes, 3).reshape(300, -1), quantised.numpy(), atol=1e-5)
    seen = codec.encode(motion)
    before = rms(codec.decode(seen, 3) - motion)
    codec.fit_refiner(motion, LearnConfig(hidden=32, steps=300, batch_size=64))
    assert np.array_equal(codec.encode(others), codes)
    assert rms(codec.decode(seen, 3) - motion) < before


def test_residual_fsq_learns_and_decodes_from_its_tokens(motion: np.ndarray, others: np.ndarray) -> None:
    codec = ResidualFsq(motion, 8, 2, LearnConfig(hidden=32, steps=200, batch_size=64))
    codes = codec.encode(others)
    assert codes.shape == (300, 2, 2)
    assert codec.symbols(codes, 2).shape == (300, 8)
    with torch.no_grad():
        latents, _ = codec.fsq(codec.encoder(torch.from_numpy(others).flatten(1)).unsqueeze(1))
        expected = codec.decoder(latents.squeeze(1)).reshape(others.shape).numpy()
    assert np.allclose(codec.decode(codes, 2), expected, atol=1e-4)
    assert rms(codec.decode(codes, 2) - others) < 0.9 * rms(others)


def test_ours_is_measured_as_the_tokenizer_behaves(motion: np.ndarray, others: np.ndarray, scale: Scale) -> None:
    actions = scale.denormalise(motion)
    chunks = np.concatenate([actions, np.ones((*actions.shape[:2], 1), np.float32)], axis=2)
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig(levels=4, rho=3.0))
    codec = ResidualCode(tokenizer, scale)
    points = list(rate_points("ours", "test", codec, Chunks(motion, others, motion, scale), [1, 2, 3, 4]))
    assert [point.tokens for point in points] == [48, 96, 144, 192]
    assert points[3].nominal_bits == pytest.approx(192 * math.log2(7))
    assert [point.rmse for point in points] == sorted((point.rmse for point in points), reverse=True)
    for point in points:
        # an odd rho nests the levels' cells: digits and values are one to one, and cost the same
        assert point.extra["digits_order_0"] == pytest.approx(point.bits_order_0)
        assert point.bits_order_0 < point.nominal_bits
    batch = torch.from_numpy(np.concatenate([scale.denormalise(others), np.ones((300, 8, 1), np.float32)], axis=2))
    error = (tokenizer.forward(batch)[1] - batch)[..., :-1].numpy()
    assert points[3].rmse_mm == pytest.approx(50 * rms(error[..., :3]), rel=1e-3)
    assert points[3].rmse_mrad == pytest.approx(500 * rms(error[..., 3:]), rel=1e-3)
    assert points[3].max_error == pytest.approx(np.abs(error / scale.half_width).max(), rel=1e-3)


def test_a_redundant_code_has_more_digit_sequences_than_values(motion: np.ndarray, scale: Scale) -> None:
    actions = scale.denormalise(motion)
    chunks = np.concatenate([actions, np.ones((*actions.shape[:2], 1), np.float32)], axis=2)
    codec: Codec = ResidualCode(ActionTokenizer.fit(chunks, TokenizerConfig(levels=4)), scale)
    codes = codec.encode(motion)
    assert isinstance(codec, ResidualCode)
    values, digits = codec.symbols(codes, 4), codec.digit_sequences(codes, 4)
    assert len(np.unique(digits)) > len(np.unique(values))
    assert len(np.unique(digits * 10**6 + values)) == len(np.unique(digits))  # digits fix the value


def test_utilisation_counts_symbols_in_use() -> None:
    assert utilisation(np.array([[0, 0], [1, 0], [2, 0]]), 4) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert utilisation([[0, 1], [1]], 4) == 0.5
