"""Numbers of other types than the package's own: as they are where that is exact, one line where it is not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rsd.chunks import checked_chunk
from rsd.conventions import state_vector
from rsd.decoding.calibration import fingertip_deviation
from rsd.policy import RsdPolicy
from rsd.tokenizer.action_tokenizer import ActionTokenizer, ChunkTokens
from rsd.types import ActionChunk, ChunkStats, Observation, RsdError

MakeObservation = Callable[..., Observation]
INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", INTEGER_TYPES, ids=str)
def test_tokens_of_any_integer_type_decode_alike(
    tokenizer: ActionTokenizer, chunks: np.ndarray, dtype: torch.dtype
) -> None:
    """A digit is its symbol less half the symbols: unsigned bytes wrapped, which moved actions by up to 1.98."""
    tokens, expected = tokenizer.forward(torch.tensor(chunks))
    other = ChunkTokens(tokens.motion.to(dtype), tokens.gripper.to(dtype))
    assert torch.equal(tokenizer.decode(other), expected)
    value = tokenizer.rfsq.dequantise(tokens.motion)
    assert torch.equal(tokenizer.rfsq.dequantise(other.motion), value)
    for level in (1, 3):
        symbols = tokens.motion[:, level - 1]
        assert torch.equal(tokenizer.rfsq.value(symbols.to(dtype), level), tokenizer.rfsq.value(symbols, level))
    arrays = ChunkTokens(*(part.numpy() for part in other))  # type: ignore[arg-type]
    assert torch.equal(tokenizer.decode(arrays), expected)


def test_chunks_of_any_real_type_encode_alike(tokenizer: ActionTokenizer, chunks: np.ndarray) -> None:
    expected = tokenizer.encode(torch.tensor(chunks))
    for given in (chunks, chunks.astype(np.float64), chunks.astype(">f4"), torch.tensor(chunks).double()):
        found = tokenizer.encode(given)  # type: ignore[arg-type]
        assert torch.equal(found.motion, expected.motion)
        assert torch.equal(found.gripper, expected.gripper)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.complex64], ids=str)
def test_tokens_of_other_types_are_refused(tokenizer: ActionTokenizer, chunks: np.ndarray, dtype: torch.dtype) -> None:
    motion, gripper = tokenizer.encode(torch.tensor(chunks[:2]))
    for tokens in (ChunkTokens(motion.to(dtype), gripper), ChunkTokens(motion, gripper.to(dtype))):
        with pytest.raises(RsdError, match=rf"tokens: expected .* integers, found {dtype}"):
            tokenizer.decode(tokens)
    for call in (tokenizer.rfsq.dequantise, tokenizer.rfsq.check, lambda symbols: tokenizer.rfsq.value(symbols, 1)):
        with pytest.raises(RsdError, match=rf"tokens: expected .* integers, found {dtype}"):
            call(motion.to(dtype))
    with pytest.raises(RsdError, match="gripper tokens: expected"):
        tokenizer.to_actions(torch.zeros(2, tokenizer.scalars), gripper.to(dtype))


@pytest.mark.parametrize("odd", [torch.zeros(1, 8, 7, dtype=torch.bool), torch.zeros(1, 8, 7) * 1j, [[0.0]], "chunk"])
def test_chunks_of_other_types_are_refused(tokenizer: ActionTokenizer, odd: object) -> None:
    for call in (tokenizer.encode, tokenizer.forward, tokenizer.to_coefficients, tokenizer.gripper_symbols):
        with pytest.raises(RsdError, match="action chunk: expected a tensor or an array of real numbers"):
            call(odd)  # type: ignore[arg-type]
    for call in (tokenizer.to_normalised, tokenizer.rfsq.quantise):
        with pytest.raises(RsdError, match="expected a tensor or an array of real numbers"):
            call(odd)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [np.arange(8), np.arange(8.0), np.arange(8, dtype=">f8"), list(range(8))], ids=repr)
def test_a_state_of_another_real_type_is_cast(
    policy: RsdPolicy, make_observation: MakeObservation, state: object
) -> None:
    """float64 is NumPy's default, and was a RuntimeError of the first matrix product."""
    seen = make_observation()
    given = Observation(seen.images, state, seen.instruction)  # type: ignore[arg-type]
    assert given.state.dtype == np.float32
    expected = policy.predict(Observation(seen.images, np.arange(8, dtype=np.float32), seen.instruction)).actions
    policy.reset()
    np.testing.assert_array_equal(policy.predict(given).actions, expected)


ODD_NUMBERS = {
    "bool": np.ones(8, bool),
    "complex": np.ones(8, complex),
    "text": np.array(list("12345678")),
    "objects": np.array([None] * 8),
    "beyond float32": np.full(8, 1e300),
    "ragged": [[1.0], [1.0, 2.0]],
}


@pytest.mark.parametrize("name", ODD_NUMBERS)
def test_numbers_that_are_not_real_are_refused(make_observation: MakeObservation, name: str) -> None:
    odd, seen = ODD_NUMBERS[name], make_observation()
    with pytest.raises(RsdError, match=r"observation state: expected .*numbers, found"):
        Observation(seen.images, odd, seen.instruction)  # type: ignore[arg-type]
    if isinstance(odd, np.ndarray):
        chunk = np.resize(odd, (8, 7))
        with pytest.raises(RsdError, match=r"policy: actions.*, found"):
            checked_chunk(ActionChunk(chunk, ChunkStats("mine")))
        if name != "beyond float32":
            with pytest.raises(RsdError, match="chunk: expected real numbers, found"):
                fingertip_deviation(chunk, np.zeros((8, 7)))
    if name == "complex":
        with pytest.raises(RsdError, match="position: expected real numbers, found complex128"):
            state_vector(np.ones(3, complex), np.array([0.0, 0.0, 0.0, 1.0]), np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [[0]]}, "observation images: expected a NumPy array, found list"),
        ({"images": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)}, "expected a NumPy array, found Tensor"),
        ({"instruction": b"pick up the bowl"}, "observation instruction: expected text, found b'pick up the bowl'"),
        ({"instruction": None}, "observation instruction: expected text, found None"),
    ],
)
def test_other_observations_cannot_be_made(make_observation: MakeObservation, change: dict, message: str) -> None:
    with pytest.raises(RsdError, match=message):
        Observation(**{**vars(make_observation()), **change})


def test_what_is_no_observation_or_no_chunk_is_said(policy: RsdPolicy, make_observation: MakeObservation) -> None:
    for odd, kind in ((vars(make_observation()), "dict"), (None, "NoneType"), ([make_observation()], "list")):
        with pytest.raises(RsdError, match=f"predict: expected an Observation, found {kind}; make one"):
            policy.predict(odd)  # type: ignore[arg-type]
    for odd, kind in ((np.zeros((8, 7)), "ndarray"), (ActionChunk([[0.0] * 7], ChunkStats("mine")), "list")):  # type: ignore[arg-type]
        with pytest.raises(RsdError, match=f"expected an ActionChunk of a NumPy array, found {kind}; return rsd.types"):
            checked_chunk(odd)  # type: ignore[arg-type]
