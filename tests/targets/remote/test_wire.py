"""The wire format is openpi-client's, byte for byte, and nothing that is no data gets through it."""

import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rsd.targets.remote.wire import Limits, pack, unpack
from rsd.types import RsdError

CONTENT = {
    "observation/image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "observation/state": np.array([0.5, -1.25]),
    "count": np.int64(5),
    "prompt": "a",
    "reset": True,
}
# openpi_client.msgpack_numpy.packb(CONTENT) of openpi-client 0.1.2, msgpack 1.2.4, numpy 1.26.4
PUBLISHED = bytes.fromhex(
    "85b16f62736572766174696f6e2f696d61676584c40b5f5f6e6461727261795f5fc3c40464617461c40c000102030405060708090a0bc40564"
    "74797065a37c7531c405736861706593020203b16f62736572766174696f6e2f737461746584c40b5f5f6e6461727261795f5fc3c404646174"
    "61c410000000000000e03f000000000000f4bfc4056474797065a33c6638c40573686170659102a5636f756e7483c40d5f5f6e7067656e6572"
    "69635f5fc3c4046461746105c4056474797065a33c6938a670726f6d7074a161a57265736574c3"
)


def test_messages_are_those_of_the_published_client() -> None:
    assert pack(CONTENT) == PUBLISHED
    found = unpack(PUBLISHED)
    assert found.keys() == CONTENT.keys()
    for key, value in CONTENT.items():
        assert np.array_equal(found[key], value)
        assert type(found[key]) is type(value)
        assert np.asarray(found[key]).dtype == np.asarray(value).dtype


@given(arrays.arrays(st.sampled_from(["<f4", "<f8", "|u1", "<i8", "|b1"]), arrays.array_shapes(max_side=4)))
def test_arrays_come_back_bit_for_bit(array: np.ndarray) -> None:
    found = unpack(pack({"x": [array.T, 1.5]}))["x"]
    assert found[0].dtype == array.dtype
    assert found[0].shape == array.T.shape
    assert found[0].tobytes() == array.T.tobytes()
    assert found[1] == 1.5


@pytest.mark.parametrize(
    "message",
    [
        b"",
        PUBLISHED[:-1],
        PUBLISHED + b"x",
        pickle.dumps({"x": 1}),
        msgpack.packb({b"__ndarray__": True, b"data": pickle.dumps([1]), b"dtype": "|O", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"12345678", b"dtype": "<f4", b"shape": [3]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "no", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": "1234", b"dtype": "<f4", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [-1, 3]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [True, 3]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [2**62, 8]}),
        msgpack.packb({b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": 3}),
        # what numpy itself reads as types: SyntaxError, TypeError, fields, an object
        *(
            msgpack.packb({b"__ndarray__": True, b"data": bytes(12), b"dtype": dtype, b"shape": [3]})
            for dtype in ("f4,(", "(2,)f4", "f4,f4", "f" * 60_000, "<f3", "", ["f4"], {"names": ["a"]}, 4)
        ),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),  # OverflowError
        msgpack.packb({b"__npgeneric__": True, b"data": [1.0] * 50, b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": "nan", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x91" * 100_000,  # lists in lists
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        msgpack.packb({1: 2}),
    ],
)
def test_anything_else_is_an_error(message: bytes) -> None:
    with pytest.raises(RsdError, match="expected msgpack with arrays as openpi-client packs them"):
        unpack(message)


SMALL = Limits(text=100, array=100, elements=20)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"prompt": "x" * 101}, "101 exceeds max_str_len"),
        ({"x" * 101: 1}, "101 exceeds max_str_len"),
        ({"image": np.zeros(101, np.uint8)}, "101 exceeds max_bin_len"),
        ({"prompt": b"x" * 101}, "101 exceeds max_bin_len"),
        ({"state": [0] * 21}, "21 exceeds max_array_len"),
        ({str(number): 1 for number in range(21)}, "21 exceeds max_map_len"),
        ({"state": [[1] * 6] * 3}, "more than 20 elements"),
        ({"state": [{"a": 1}] * 11}, "more than 20 elements"),
    ],
)
def test_what_is_larger_than_its_field_is_refused_before_it_is_built(content: dict, error: str) -> None:
    assert unpack(pack(content)).keys() == content.keys()
    with pytest.raises(RsdError, match=error):
        unpack(pack(content), SMALL)


def test_a_refusal_repeats_little_of_what_was_sent() -> None:
    for content in ({b"__ndarray__": True, b"data": b"", b"dtype": "q" * 50_000, b"shape": [1]}, {b"x" * 60_000: 1}):
        message = msgpack.packb(content) + b"x" * 50_000
        with pytest.raises(RsdError) as error:
            unpack(message)
        assert len(str(error.value)) < 300


def test_what_is_no_number_is_not_sent() -> None:
    for value in (np.array([None]), np.array(["a"]), object()):
        with pytest.raises(TypeError, match="expected numbers, texts, lists, maps and arrays of numbers, found"):
            pack({"x": value})
