import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from rsd.tokenizer.action_tokenizer import FILE_NAME, ActionTokenizer, ChunkTokens, TokenizerConfig
from rsd.types import RsdError

chunk_arrays = hnp.arrays(np.float32, (8, 7), elements=st.floats(-1.0, 1.0, width=32))


@pytest.fixture(scope="module")
def tokenizers(chunks: np.ndarray) -> list[ActionTokenizer]:
    configs = [
        TokenizerConfig(),
        TokenizerConfig(transform="identity"),
        TokenizerConfig(levels=5, rho=3.0),
        TokenizerConfig(levels=3, rho=7.0),
    ]
    return [ActionTokenizer.fit(chunks, config) for config in configs]


@given(chunk=chunk_arrays)
def test_decode_of_encode_is_forward_bit_for_bit(chunk: np.ndarray, tokenizers: list[ActionTokenizer]) -> None:
    batch = torch.tensor(chunk).unsqueeze(0)
    for tokenizer in tokenizers:
        tokens, seen = tokenizer.forward(batch)
        encoded = tokenizer.encode(batch)
        assert torch.equal(encoded.motion, tokens.motion)
        assert torch.equal(tokenizer.decode(encoded), seen)
        assert seen.abs().max() <= 1.0


@given(chunk=chunk_arrays)
def test_error_of_a_scalar_inside_the_span_is_at_most_half_the_last_step(
    chunk: np.ndarray, tokenizers: list[ActionTokenizer]
) -> None:
    batch = torch.tensor(chunk).unsqueeze(0)
    for tokenizer in tokenizers:
        code = tokenizer.config.rfsq
        coefficients = tokenizer.to_coefficients(batch)
        error = (tokenizer.rfsq.dequantise(tokenizer.encode(batch).motion) - coefficients).abs()
        inside = coefficients.abs() <= code.span() * tokenizer.first_step
        allowed = tokenizer.first_step * (0.5 * code.weight(code.levels) + 1e-5)
        assert (error[inside] <= allowed).all()


def test_error_in_action_units_is_bounded_by_the_last_step(
    tokenizers: list[ActionTokenizer], chunks: np.ndarray
) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        code = tokenizer.config.rfsq
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


@given(chunks=hnp.arrays(np.float32, (5, 8, 7), elements=st.floats(-1.0, 1.0, width=32)))
def test_encode_does_not_depend_on_the_batch(chunks: np.ndarray, tokenizers: list[ActionTokenizer]) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        together = tokenizer.encode(batch)
        for index in range(len(batch)):
            alone = tokenizer.encode(batch[index : index + 1])
            assert torch.equal(alone.motion[0], together.motion[index])
            assert torch.equal(alone.gripper[0], together.gripper[index])


def test_gripper_is_exact(tokenizer: ActionTokenizer) -> None:
    gripper = torch.tensor([-1.0, -0.2, -1.0, 1.0, 0.3, 1.0, 1.0, -1.0])
    chunk = torch.zeros(1, 8, 7)
    chunk[..., -1] = gripper
    for levels in (0, 1, 8):
        assert torch.equal(tokenizer.decode(tokenizer.encode(chunk), levels)[0, :, -1], gripper.sign())


def test_a_constant_dimension_is_kept_and_harmless(chunks: np.ndarray) -> None:
    constant = chunks.copy()
    constant[..., 2] = 0.25
    tokenizer = ActionTokenizer.fit(constant)
    decoded = tokenizer.decode(tokenizer.encode(torch.tensor(constant)))
    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded[..., 2], torch.tensor(0.25), atol=1e-6)


def test_save_and_load_change_nothing(tokenizers: list[ActionTokenizer], chunks: np.ndarray, tmp_path: Path) -> None:
    batch = torch.tensor(chunks)
    for tokenizer in tokenizers:
        tokenizer.save(tmp_path)
        loaded = ActionTokenizer.load(tmp_path)
        assert loaded.config == tokenizer.config
        assert loaded.first_step == tokenizer.first_step
        assert torch.equal(loaded.low, tokenizer.low)
        assert torch.equal(loaded.high, tokenizer.high)
        before, after = tokenizer.forward(batch), loaded.forward(batch)
        assert torch.equal(before[0].motion, after[0].motion)
        assert torch.equal(before[1], after[1])


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
        (lambda chunks: chunks[:, :5], "expected chunks"),
        (lambda chunks: chunks[:, 0], "expected chunks"),
        (lambda chunks: np.where(chunks == chunks[0, 0, 0], np.nan, chunks), "NaN"),
        (lambda chunks: np.zeros_like(chunks), "no motion dimension ever moves"),
    ],
)
def test_fit_refuses(chunks: np.ndarray, damage: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    with pytest.raises(RsdError, match=message):
        ActionTokenizer.fit(damage(chunks))


def test_symbols_out_of_range_are_refused(tokenizer: ActionTokenizer, chunks: np.ndarray) -> None:
    tokens = tokenizer.encode(torch.tensor(chunks[:1]))
    tokens.motion[0, 7, 47] = 7
    with pytest.raises(RsdError, match=r"symbols in 0\.\.6"):
        tokenizer.decode(tokens)


def edited(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda content: json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(format_version=2), "expected tokenizer format 1, found 2"),
        (lambda content: json.dumps(content)[:60], "not valid JSON"),
        (lambda content: "", "not valid JSON"),
        (lambda content: "[1, 2]", "expected tokenizer format 1"),
        (lambda content: json.dumps({k: v for k, v in content.items() if k != "low"}), "missing low"),
        (edited(config={"levels": 8, "colour": 3}), "a field is unknown"),
        (edited(config={"levels": 8, "rho": 9.0}), "RFSQ"),
        (edited(config={"transform": "wavelet"}), "transform"),
        (edited(low=[0.0] * 5), "6 finite range limits"),
        (edited(high=[float("nan")] * 6), "6 finite range limits"),
        (edited(high=[1.0] * 7), "two vectors of one length"),
        (edited(low=["zero"] * 6), "or not a number"),
        (edited(first_step=0.0), "positive finite step"),
        (edited(first_step="fine"), "or not a number"),
    ],
)
def test_odd_files_are_refused(
    tokenizer: ActionTokenizer, tmp_path: Path, text: Callable[[dict[str, Any]], str], message: str
) -> None:
    (tmp_path / FILE_NAME).write_text(text(tokenizer.to_json()))
    with pytest.raises(RsdError, match=message):
        ActionTokenizer.load(tmp_path)


def test_other_missing_or_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RsdError, match="not found"):
        ActionTokenizer.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RsdError, match="not valid JSON"):
        ActionTokenizer.load(tmp_path)
