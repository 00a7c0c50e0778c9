"""Results taken apart into tensors and put together again."""

import pytest
import torch

from rsd.decoding.state import DecodeResult, Draft
from rsd.models.visual_drafter import Memory
from rsd.nested import signature, tensors_of, with_tensors

A, B, C, D = (torch.full((2,), float(i)) for i in range(4))


def test_every_tensor_of_a_result_is_found() -> None:
    assert [id(x) for x in tensors_of(A)] == [id(A)]
    assert [id(x) for x in tensors_of((A, [B, None, 3]))] == [id(A), id(B)]
    assert [id(x) for x in tensors_of(Memory([A, B], [C]))] == [id(A), id(B), id(C)]
    assert [id(x) for x in tensors_of(Draft(A, B, [C, D]))] == [id(A), id(B), id(C), id(D)]


@pytest.mark.parametrize(
    "result",
    [A, (A, [B, None, 3]), Memory([A, B], [C]), (DecodeResult(A, B, draft=Draft(A, B, [C, D]), skipped=(True,)), C)],
    ids=["tensor", "tuple", "named tuple", "dataclass"],
)
def test_other_tensors_take_the_places_of_the_first(result: object) -> None:
    found = with_tensors(result, (tensor + 10 for tensor in tensors_of(result)))
    assert type(found) is type(result)
    pairs = list(zip(tensors_of(result), tensors_of(found), strict=True))
    assert all(torch.equal(new, old + 10) for old, new in pairs)
    back = with_tensors(found, tensors_of(result))
    assert repr(back) == repr(result)  # numbers and None are where they were


def test_what_is_not_looked_through_is_an_error() -> None:
    with pytest.raises(TypeError, match="found dict"):
        list(tensors_of({"a": torch.zeros(1)}))


def test_one_recording_does_for_trees_that_differ_in_the_tensors_contents_alone() -> None:
    def draft(batch: int, levels: int = 1, probs: torch.Tensor | None = None) -> Draft:
        motion = torch.rand(batch, levels, 2)
        return Draft(motion, torch.rand(batch, 2), list(motion.unbind(1)), probs)

    assert signature((draft(1), 3)) == signature((draft(1), 3))
    others = [(draft(2), 3), (draft(1, 2), 3), (draft(1, 1, A), 3), (draft(1), 4), (draft(1), None), draft(1)]
    assert all(signature(other) != signature((draft(1), 3)) for other in others)
    hash(signature((draft(1), 3)))  # it names a recording
