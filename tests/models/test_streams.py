"""What a call put aside gives back; on a GPU tests/decoding/test_recorded.py looks at what is computed."""

import contextlib

import pytest
import torch

from rsd.decoding.steps import Proposal
from rsd.models.light_draft import Memory
from rsd.models.streams import fork, tensors_of, together


def test_every_tensor_of_a_result_is_found() -> None:
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    assert [id(x) for x in tensors_of(a)] == [id(a)]
    assert [id(x) for x in tensors_of((a, [b, None, 3]))] == [id(a), id(b)]
    assert [id(x) for x in tensors_of(Memory([a, b], [c]))] == [id(a), id(b), id(c)]
    assert [id(x) for x in tensors_of(Proposal(a, b, c, d, forced=True))] == [id(a), id(b), id(c), id(d)]


def test_on_a_cpu_calls_are_made_at_once_and_in_order() -> None:
    made: list[int] = []
    device = torch.device("cpu")
    join = fork(lambda: made.append(1), device)
    assert made == [1]
    join()
    with torch.no_grad():
        assert together([lambda: made.append(2) or 2, lambda: made.append(3) or 3], device) == [2, 3]
    assert made == [1, 2, 3]


def test_what_is_not_looked_through_is_an_error() -> None:
    with pytest.raises(TypeError, match="found dict"):
        list(tensors_of({"a": torch.zeros(1)}))


def test_a_joined_result_is_kept_for_the_stream_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: "Stream") -> None: ...

    reader, kept = Stream(), list[tuple[int, object]]()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: reader)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((id(tensor), stream)))
    a, b = torch.zeros(1), torch.zeros(2)
    assert fork(lambda: (a, [b]), torch.device("cuda"))() == (a, [b])
    assert kept == [(id(a), reader), (id(b), reader)]
