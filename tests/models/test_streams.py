"""What a call put aside gives back; on a GPU tests/runtime/test_recorded.py looks at what is computed."""

import contextlib

import pytest
import torch

from rsd.models.streams import fork, together


def test_on_a_cpu_calls_are_made_at_once_and_in_order() -> None:
    made: list[int] = []
    device = torch.device("cpu")
    join = fork(lambda: made.append(1), device)
    assert made == [1]
    join()
    with torch.no_grad():
        assert together([lambda: made.append(2) or 2, lambda: made.append(3) or 3], device) == [2, 3]
    assert made == [1, 2, 3]


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
