from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from rsd.tokenizer.action_tokenizer import ActionTokenizer, ChunkTokens, TokenizerConfig
from rsd.types import RsdError

NORMALISATIONS, LINEAR = (get_args(get_type_hints(TokenizerConfig)[name]) for name in ("normalisation", "transform"))
chunk_arrays = hnp.arrays(np.float32, (8, 7), elements=st.floats(-1.0, 1.0, width=32))


@pytest.fixture(scope="module")
def tokenizers(chunks: np.ndarray) -> list[ActionTokenizer]:
    configs = [
        TokenizerConfig(),
        TokenizerConfig(transform="identity"),
        TokenizerConfig(levels=5, rho=3.0),
        TokenizerConfig(levels=3, rho=7.0),
        TokenizerConfig(transform="pca"),
        TokenizerConfig(normalisation="quantile", levels=9),
    ]
    return [ActionTokenizer.fit(chunks, config) for config in configs]


@settings(max_examples=30)
@given(chunk=chunk_arrays)
def test_decode_of_encode_is_forward_bit_for_bit(chunk: np.ndarray, tokenizers: list[ActionTokenizer]) -> None:
    batch = torch.tensor(chunk).unsqueeze(0)
    for tokenizer in tokenizers:
        tokens, seen = tokenizer.forward(batch)
        encoded = tokenizer.encode(batch)
        assert torch.equal(encoded.motion, tokens.motion)
        assert torch.equal(tokenizer.decode(encoded), seen)
        assert seen.abs().max() <= 1.0


@settings(max_examples=30)
@given(chunk=chunk_arrays)
def test_error_of_a_scalar_inside_the_span_is_at_most_half_the_last_step(
    chunk: np.ndarray, tokenizers: list[ActionTokenizer]
) -> None:
    batch = torch.tensor(chunk).unsqueeze(0)
    for tokenizer in tokenizers:
        code = tokenizer.config.rfsq
        coefficients = tokenizer.to_coefficients(batch)
        error = (tokenizer.rfsq.dequantise(tokenizer.encode(batch).motion) - coefficients).abs()
        inside = coefficients.abs() <= tokenizer.rfsq.reach()
        allowed = tokenizer.first_step * (0.5 * code.weight(code.levels) + 1e-5)
        assert (error[inside] <= allowed).all()


def test_error_in_action_units_is_bounded_by_the_last_step(
    tokenizers: list[ActionTokenizer], chunks: np.ndarray
) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        code = tokenizer.config.rfsq
        if tokenizer.config.transform == "pca":
            continue  # mixes the dimensions
        inside = (tokenizer.to_coefficients(batch).abs() <= code.span() * tokenizer.first_step).all(-1)
        assert inside.float().mean() > 0.95
        error = (tokenizer.decode(tokenizer.encode(batch)) - batch)[inside, :, :-1]
        last = tokenizer.first_step * code.weight(code.levels)
        # orthonormal: the squared errors of a dimension's 8 coefficients add up to those of its 8 steps
        assert ((error / tokenizer.scale).norm(dim=1) <= 0.5 * last * 8**0.5 + 1e-5).all()


def test_every_prefix_decodes_and_the_mean_error_falls(tokenizers: list[ActionTokenizer], chunks: np.ndarray) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        tokens = tokenizer.encode(batch)
        means = [
            float((tokenizer.decode(tokens, levels) - batch)[..., :-1].abs().mean())
            for levels in range(tokenizer.config.levels + 1)
        ]
        assert means == sorted(means, reverse=True)
        assert means[-1] < 0.05 * means[0]


@pytest.mark.parametrize(("rho", "levels"), [(2.0, 8), (3.0, 5), (7.0, 3)])
def test_tokens_are_canonical_after_one_round(rho: float, levels: int) -> None:
    """A redundant code has several tokens for a value; encoding picks one of them, and keeps to it."""
    tenth = torch.full((6,), 0.1)  # so narrow that no decoded action is clipped
    tokenizer = ActionTokenizer(TokenizerConfig(levels=levels, rho=rho), -tenth, tenth, 2 / 7)
    generator = torch.Generator().manual_seed(1)
    motion = torch.randint(0, 7, (200, levels, tokenizer.scalars), generator=generator)
    tokens = ChunkTokens(motion, torch.randint(0, 2, (200, 8), generator=generator))
    value = tokenizer.decode(tokens)
    first = tokenizer.encode(value)
    again = tokenizer.encode(tokenizer.decode(first))
    assert torch.equal(again.gripper, tokens.gripper)
    assert torch.allclose(tokenizer.decode(first), value, atol=1e-6)
    if rho != 2.0:  # odd: no value lies on the edge between two digits, where rounding decides
        assert torch.equal(again.motion, first.motion)
        assert torch.equal(first.motion, tokens.motion) == (rho == 7.0)


@settings(max_examples=15)
@given(
    chunks=hnp.arrays(np.float32, (5, 8, 7), elements=st.floats(-1.0, 1.0, width=32)), order=st.permutations(range(5))
)
def test_tokens_and_actions_do_not_depend_on_the_batch_or_its_order(
    chunks: np.ndarray, order: list[int], tokenizers: list[ActionTokenizer]
) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        together, actions = tokenizer.forward(batch)
        shuffled, shuffled_actions = tokenizer.forward(batch[order])
        assert torch.equal(shuffled.motion, together.motion[order])
        assert torch.equal(shuffled_actions, actions[order])
        for index in range(len(batch)):
            alone = tokenizer.encode(batch[index : index + 1])
            assert torch.equal(alone.motion[0], together.motion[index])
            assert torch.equal(alone.gripper[0], together.gripper[index])
            assert torch.equal(tokenizer.decode(alone)[0], actions[index])


@pytest.mark.gpu
def test_cuda_gives_the_tokens_and_actions_of_the_cpu(tokenizers: list[ActionTokenizer], chunks: np.ndarray) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        tokens, actions = tokenizer.forward(batch)
        moved = tokenizer.to("cuda")
        other, other_actions = moved.forward(batch.cuda())
        assert torch.equal(other.motion.cpu(), tokens.motion)
        assert torch.equal(other.gripper.cpu(), tokens.gripper)
        assert torch.equal(other_actions.cpu(), actions)
        assert torch.equal(moved.decode(other, 2).cpu(), tokenizer.decode(tokens, 2))
        assert moved.statistics.chunks == len(batch)


@settings(max_examples=20)
@given(rho=st.sampled_from([3.0, 5.0, 7.0]), seed=st.integers(0, 1000))
def test_canonical_tokens_survive_decoding_and_encoding(rho: float, seed: int) -> None:
    """An odd rho nests the cells of its levels, so that what a chunk is encoded to is what its decoded chunk is."""
    twentieth = torch.full((6,), 0.05)
    tokenizer = ActionTokenizer(TokenizerConfig(levels=4, rho=rho), -twentieth, twentieth, 2 / 7)
    chunk = torch.rand(20, 8, 7, generator=torch.Generator().manual_seed(seed)) * 0.1 - 0.05
    tokens = tokenizer.encode(chunk)
    again = tokenizer.encode(tokenizer.decode(tokens))
    assert torch.equal(again.motion, tokens.motion)
    assert torch.equal(again.gripper, tokens.gripper)


def test_gripper_is_exact(tokenizer: ActionTokenizer) -> None:
    gripper = torch.tensor([-1.0, -0.2, -1.0, 1.0, 0.3, 1.0, 1.0, -1.0])
    chunk = torch.zeros(1, 8, 7)
    chunk[..., -1] = gripper
    for levels in (0, 1, 8):
        assert torch.equal(tokenizer.decode(tokenizer.encode(chunk), levels)[0, :, -1], gripper.sign())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("transform", LINEAR)
def test_a_constant_dimension_is_kept_and_harmless(chunks: np.ndarray, transform: Any, normalisation: Any) -> None:
    constant = chunks.copy()
    constant[..., 2] = 0.25
    tokenizer = ActionTokenizer.fit(constant, TokenizerConfig(transform=transform, normalisation=normalisation))
    decoded = tokenizer.decode(tokenizer.encode(torch.tensor(constant)))
    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded[..., 2], torch.tensor(0.25), atol=2e-2 if transform == "pca" else 1e-6)


def test_a_dimension_that_hardly_ever_moves_has_the_range_it_moves_in(chunks: np.ndarray) -> None:
    rare = chunks.copy()
    rare[..., 1] = 0.1
    rare[7, :, 1] = 0.9
    tokenizer = ActionTokenizer.fit(rare, TokenizerConfig(normalisation="quantile"))
    assert (float(tokenizer.low[1]), float(tokenizer.high[1])) == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize(
    ("normalisation", "low", "high"),
    [
        ("quantile", lambda x: np.quantile(x, 0.01, axis=0), lambda x: np.quantile(x, 0.99, axis=0)),
        ("minmax", lambda x: x.min(0), lambda x: x.max(0)),
        ("standard", lambda x: x.mean(0) - x.std(0), lambda x: x.mean(0) + x.std(0)),
    ],
)
def test_normalisations(chunks: np.ndarray, normalisation: Any, low: Any, high: Any) -> None:
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig(normalisation=normalisation))
    motion = chunks[..., :-1].reshape(-1, 6)
    assert np.allclose(tokenizer.low.numpy(), low(motion), atol=1e-5)
    assert np.allclose(tokenizer.high.numpy(), high(motion), atol=1e-5)
    assert tokenizer.calibration.clipped_share < 0.001


@pytest.mark.parametrize(
    ("horizon", "dimensions", "binary"),
    [(1, 7, (-1,)), (5, 3, ()), (8, 7, (0,)), (16, 14, (6, 13)), (64, 14, (6, 13))],
)
@pytest.mark.parametrize("transform", ["dct", "pca"])
def test_other_horizons_dimensions_and_grippers(
    horizon: int, dimensions: int, binary: tuple[int, ...], transform: Any
) -> None:
    rng = np.random.default_rng(0)
    if transform == "pca" and horizon == 64:
        horizon = 10  # as many chunks as its matrix of 768 x 768 needs take too long for a test
    count = 4 * horizon * dimensions + 100 if transform == "pca" else 200
    chunks = (0.3 * rng.normal(size=(count, 1, dimensions)) * np.ones((1, horizon, 1))).clip(-1, 1).astype(np.float32)
    for gripper in binary:
        chunks[..., gripper] = rng.choice([-1.0, 1.0], (count, horizon))
    tokenizer = ActionTokenizer.fit(chunks, TokenizerConfig(horizon, transform, binary=binary))
    batch = torch.from_numpy(chunks[:50])
    tokens, actions = tokenizer.forward(batch)
    assert tokens.motion.shape == (50, 8, horizon * (dimensions - len(binary)))
    assert tokens.gripper.shape == ((50, horizon) if len(binary) == 1 else (50, horizon, len(binary)))
    assert torch.equal(tokenizer.decode(tokens), actions)
    assert torch.equal(actions[..., list(binary)], batch[..., list(binary)])
    assert (actions - batch).abs().mean() < 0.01


def test_a_gripper_has_the_two_values_of_the_data(chunks: np.ndarray) -> None:
    closed = chunks[..., 6:] > 0
    two = np.concatenate([np.where(closed, 0.75, 0.25), chunks[..., :6], np.where(closed, 0, 1)], 2).astype(np.float32)
    config = TokenizerConfig(binary=(7, 0))
    tokenizer = ActionTokenizer.fit(two, config)
    assert tokenizer.config.binary_values == ((0.0, 1.0), (0.25, 0.75))
    tokens, actions = tokenizer.forward(torch.from_numpy(two))
    assert torch.equal(actions[..., [0, 7]], torch.from_numpy(two[..., [0, 7]]))
    assert torch.equal(tokens.gripper[..., 0] == 1, torch.from_numpy(closed[..., 0]))
    assert torch.equal(tokens.gripper[..., 1] == 0, torch.from_numpy(closed[..., 0]))  # the upper value of dimension 7
    named = replace(config, binary_values=((0.0, 1.0), (0.25, 0.75)))
    assert ActionTokenizer.fit(two, named).config == tokenizer.config
    with pytest.raises(RsdError, match=r"dimension 0 to be binary and to hold 0 and 1, found 2 \(0\.25, 0\.75\)"):
        ActionTokenizer.fit(two, replace(config, binary_values=((0.0, 1.0), (0.0, 1.0))))


def test_actions_beyond_one_need_their_limit_said(chunks: np.ndarray) -> None:
    radians = chunks * np.float32([3, 3, 3, 3, 3, 3, 1])
    with pytest.raises(RsdError, match=r"within \+-1 \(--tokenizer.limit\), found 3"):
        ActionTokenizer.fit(radians)
    batch = torch.from_numpy(radians)
    for limit in (0.0, 3.5):
        actions = ActionTokenizer.fit(radians, TokenizerConfig(limit=limit)).forward(batch)[1]
        assert (actions - batch).abs().max() < 0.2
        assert actions.abs().max() > 2.5


def test_what_is_beyond_the_reach_is_clipped_and_counted(tokenizer: ActionTokenizer) -> None:
    tokenizer.reset_statistics()
    inside = tokenizer.encode(torch.zeros(3, 8, 7))
    assert tokenizer.statistics.clipped_chunks == 0
    far = torch.zeros(2, 8, 7)
    far[1, :, 0] = 40.0  # a steady action is the first coefficient of its dimension alone
    tokens = tokenizer.encode(far)
    assert torch.equal(tokens.motion[0], inside.motion[0])
    assert (tokens.motion[1, :, 0] == 6).all()  # the code's end
    seen = tokenizer.statistics
    assert (seen.chunks, seen.clipped_chunks, sum(seen.clipped_coefficients)) == (5, 1, 1)
    assert seen.clipped_coefficients[0] == 1
    assert seen.clipped_share == pytest.approx(1 / (5 * 48))
    tokenizer.reset_statistics()
    assert tokenizer.statistics.clipped_share == 0.0


def test_calibration_counts_its_own_chunks(chunks: np.ndarray) -> None:
    seen = ActionTokenizer.fit(chunks).calibration
    assert seen.chunks == len(chunks)
    assert seen.clipped_share < 1e-3


# what is refused


def with_nan(shape: tuple[int, ...]) -> Tensor:
    chunk = torch.zeros(shape)
    chunk.view(-1)[3] = float("nan")
    return chunk


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (torch.zeros(8, 7), "expected"),
        (torch.zeros(1, 7, 7), "expected"),
        (torch.zeros(1, 8, 6), "expected"),
        (with_nan((1, 8, 7)), "NaN or infinity"),
        (torch.full((1, 8, 7), float("inf")), "NaN or infinity"),
    ],
)
def test_odd_chunks_are_refused(tokenizer: ActionTokenizer, chunk: Tensor, message: str) -> None:
    for call in (tokenizer.encode, tokenizer.forward):
        with pytest.raises(RsdError, match=f"action chunk: .*{message}"):
            call(chunk)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda chunks: chunks[:99], "at least 100 chunks, found 99"),
        (lambda chunks: chunks[:, :5], r"chunks: expected \[N, 8, A\], found \[500, 5, 7\]"),
        (lambda chunks: chunks[:, 0], r"chunks: expected \[N, 8, A\]"),
        (lambda chunks: np.where(chunks == chunks[0, 0, 0], np.nan, chunks), "NaN"),
        (lambda chunks: np.zeros_like(chunks), "no motion dimension ever moves"),
        (lambda chunks: chunks[..., :6], r"dimension -1 to be binary and to hold two values, found \d+ \("),
        (lambda chunks: np.where(np.arange(7) < 6, chunks, 0.0), r"two values, found 1 \(0\)"),
    ],
)
def test_fit_refuses(chunks: np.ndarray, damage: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        ActionTokenizer.fit(damage(chunks))


def test_symbols_out_of_range_are_refused(tokenizer: ActionTokenizer, chunks: np.ndarray) -> None:
    tokens = tokenizer.encode(torch.tensor(chunks[:1]))
    tokens.motion[0, 7, 47] = 7
    with pytest.raises(RsdError, match=r"motion tokens: expected numbers from 0 to 6, found 2\.\.7"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("change", "levels", "message"),
    [
        (lambda t: ChunkTokens(t.motion[0], t.gripper), None, r"motion tokens: expected \[B, levels, 48\]"),
        (lambda t: ChunkTokens(t.motion[..., :47], t.gripper), None, "motion tokens: expected"),
        (lambda t: ChunkTokens(t.motion.repeat(1, 2, 1), t.gripper), None, "motion tokens: expected"),
        (lambda t: ChunkTokens(t.motion.float(), t.gripper), None, "integers, found"),
        (lambda t: ChunkTokens(t.motion, t.gripper[:, :3]), None, r"gripper tokens: expected \[2, 8\]"),
        (lambda t: ChunkTokens(t.motion, t.gripper + 2), None, "gripper tokens: expected numbers from 0 to 1"),
        (lambda t: t, 9, "levels: expected an integer from 0 to 8, found 9"),
        (lambda t: t, -1, "levels: expected an integer from 0 to 8, found -1"),
    ],
)
def test_odd_tokens_are_refused(
    tokenizer: ActionTokenizer, chunks: np.ndarray, change: Any, levels: int | None, message: str
) -> None:
    tokens = tokenizer.encode(torch.tensor(chunks[:2]))
    with pytest.raises(RsdError, match=message):
        tokenizer.decode(change(tokens), levels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"horizon": 0}, "horizon: expected an integer from 1 to 64, found 0"),
        ({"horizon": 65}, "horizon: expected an integer from 1 to 64"),
        ({"transform": "wavelet"}, "transform: expected one of dct, identity, pca, found 'wavelet'"),
        ({"normalisation": "none"}, "normalisation: expected one of reach"),
        ({"levels": 10**25}, "levels: expected an integer from 1 to 1024, found 1000"),
        ({"symbols": 8}, "symbols: expected an integer from 3 to 1023 that is odd, found 8"),
        ({"rho": 9.0}, "expected rho of at most 7, the symbols, found 9.0"),
        ({"limit": -1.0}, "limit: expected a number from 0 to"),
        ({"binary_values": ((0.0, 1.0), (0.0, 1.0))}, "1 pairs of binary values, or none, found 2"),
        ({"binary_values": ((1.0, 0.0),)}, "the lower binary value first"),
        ({"binary_values": ((0.0, 100.0),)}, r"within the limit 1, found 100"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        TokenizerConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(binary=(7,)), "distinct dimensions within 7"),
        (TokenizerConfig(binary=(6, -1)), "distinct dimensions within 7"),
        (TokenizerConfig(binary=(0, 1, 2, 3, 4, 5, 6)), "and one left for the motion"),
        (TokenizerConfig(transform="pca"), "at least 192 chunks, found 150"),
    ],
)
def test_fit_refuses_what_the_chunks_cannot_give(chunks: np.ndarray, config: TokenizerConfig, message: str) -> None:
    with pytest.raises(RsdError, match=message):
        ActionTokenizer.fit(chunks[:150], config)
