"""Results taken apart into tensors and put together again."""

import pytest
import torch
from rsd.decoding.steps import Decoded, Proposal

from rsd.models.light_draft import Memory
from rsd.nested import tensors_of, with_tensors

A, B, C, D = (torch.full((2,), float(i)) for i in range(4))


def test_every_tensor_of_a_result_is_found() -> None:
    assert [id(x) for x in tensors_of(A)] == [id(A)]
    assert [id(x) for x in tensors_of((A, [B, None, 3]))] == [id(A), id(B)]
    assert [id(x) for x in tensors_of(Memory([A, B], [C]))] == [id(A), id(B), id(C)]
    assert [id(x) for x in tensors_of(Proposal(A, B, C, D, forced=True))] == [id(A), id(B), id(C), id(D)]


@pytest.mark.parametrize(
    "result",
    [A, (A, [B, None, 3]), Memory([A, B], [C]), (Decoded(A, B, proposal=Proposal(A, B, C, D, forced=True)), C)],
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
