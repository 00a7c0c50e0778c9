"""Messages become observations: which keys, which images, what is resized and what is refused."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsd.targets.remote.request import MAX_SIDE, read_request, resized
from rsd.types import RsdError

SIZE = 32


def content(side: int = SIZE, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    image, wrist = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    message = {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": np.linspace(-1.0, 1.0, 8),
        "prompt": "Open the drawer",
    }
    full = {"image": "observation/image", "state": "observation/state"}
    return {**message, **{full.get(name, name): value for name, value in changes.items()}}


def test_an_image_of_the_policys_size_arrives_as_it_was_sent() -> None:
    message = content()
    request = read_request(message, SIZE, 2)
    assert request.observation is not None
    assert not request.reset
    assert np.array_equal(request.observation.images[0], message["observation/image"])
    assert np.array_equal(request.observation.images[1], message["observation/wrist_image"])
    assert request.observation.state.dtype == np.float32
    assert np.allclose(request.observation.state, message["observation/state"])
    assert request.observation.instruction == "Open the drawer"  # as it was written


@pytest.mark.parametrize(("side", "size"), [(224, 128), (256, 128), (224, 256), (24, 32)])
def test_another_size_is_resized_without_turning_or_shifting(side: int, size: int) -> None:
    rows, columns = np.mgrid[:side, :side] / (side - 1)
    ramp = np.stack([255 * rows, 255 * columns, 128 + 0 * rows], axis=-1).round().astype(np.uint8)
    found = resized("x", ramp, size).astype(float)
    expected_rows, expected_columns = (np.mgrid[:size, :size] + 0.5) * side / size - 0.5
    inner = slice(size // 8, -size // 8)  # a filter that reaches past the edge flattens the ramp there
    assert found.shape == (size, size, 3)
    assert np.abs(found[..., 0] - 255 * expected_rows / (side - 1))[inner, inner].max() < 1.5
    assert np.abs(found[..., 1] - 255 * expected_columns / (side - 1))[inner, inner].max() < 1.5
    assert (found[..., 2] == 128).all()
    again = Image.fromarray(ramp).resize((size, size), Image.Resampling.LANCZOS)
    assert np.array_equal(found, np.asarray(again))


def test_fine_stripes_do_not_alias() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    found = resized("x", stripes, 128)[:, 8:-8]
    assert np.abs(found.astype(float) - 127.5).max() < 20


def test_a_camera_that_the_policy_does_not_look_at_may_be_missing() -> None:
    message = content()
    wrist = message.pop("observation/wrist_image")
    request = read_request(message, SIZE, 1)
    assert request.observation is not None
    assert np.array_equal(request.observation.images[0], message["observation/image"])
    given = read_request({**message, "observation/wrist_image": wrist}, SIZE, 1)
    assert given.observation is not None
    assert np.array_equal(given.observation.images[1], wrist)
    with pytest.raises(RsdError, match="missing observation/wrist_image; found observation/image, observation/state"):
        read_request(message, SIZE, 2)


def test_a_reset_comes_alone_or_with_an_observation() -> None:
    assert read_request({"reset": True}, SIZE, 2).observation is None
    for given, expected in ((True, True), (False, False), (np.bool_(True), True)):
        request = read_request(content(reset=given), SIZE, 2)
        assert (request.reset, request.observation is None) == (expected, False)


def test_a_draft_to_continue_from_comes_with_its_steps() -> None:
    draft = np.linspace(-1, 1, 56, dtype=np.float32).reshape(8, 7)
    request = read_request(content(draft=draft, steps=3), SIZE, 2)
    assert request.draft is not None
    assert (request.draft[0].tolist(), request.draft[1]) == (draft.tolist(), 3)
    assert read_request(content(), SIZE, 2).draft is None


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([1], "expected a map with the keys observation/image"),
        ({}, "missing observation/image, observation/wrist_image, observation/state, prompt; found none"),
        ({"reset": False}, "missing observation/image"),
        (content(restart=True), "found 'restart' besides"),
        (content(reset=1), "reset: expected true or false, found 1"),
        (content(prompt=b"x"), "prompt: expected text, found bytes"),
        (content(draft=np.zeros((8, 6), np.float32), steps=2), r"draft: expected \[H, 7\]"),
        (content(draft=np.zeros((8, 7), np.float32)), "steps: expected"),
        (content(steps=2), "draft: expected"),
        (content(prompt=" "), "instruction: expected text, found an empty string"),
        (content(state=np.zeros(7)), r"state: expected \[8\], found \[7\]"),
        (content(state=np.full(8, np.nan)), "expected finite numbers"),
        (content(state=np.full(8, 1e300)), "expected finite numbers"),
        (content(state="home"), "observation/state: expected real numbers, found <U4"),
        (content(state=["a"] * 8), "observation/state: expected real numbers, found <U1"),
        (content(state=[0.0] * 7 + [[1.0]]), "observation/state: expected numbers, found list"),
        (content(state=np.ones(8, dtype=bool)), "observation/state: expected real numbers, found bool"),
        (content(image=np.zeros((SIZE, SIZE, 3))), r"expected uint8 \[S, S, 3\].*found float64 \[32, 32, 3\]"),
        (content(image=np.zeros((3, SIZE, SIZE), np.uint8)), r"found uint8 \[3, 32, 32\]"),
        (content(image=[[1]]), "found list"),
        (content(image=np.zeros((48, 64, 3), np.uint8)), "expected a square image.*found 48 x 64; crop or pad it"),
        (content(side=23), "expected 32 x 32 pixels, or from 24 to 2048 to be resized, found 23 x 23"),
        (content(side=MAX_SIDE + 1), "found 2049 x 2049"),
    ],
)
def test_what_makes_no_sense_is_refused(message: Any, error: str) -> None:
    with pytest.raises(RsdError, match=error):
        read_request(message, SIZE, 2)
