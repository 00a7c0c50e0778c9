"""A server in a process of its own, for studies that time it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rsd.types import RsdError

START_PATIENCE = 600.0  # seconds until the server listens: it may load 15 GB


@contextmanager
def process_of(main: Callable[..., None], *arguments: Any) -> Iterator[tuple[str, int]]:
    """`main(connection, *arguments)` in a process of its own while the context lasts; it sends its address, which this
    gives with the process's number."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_PATIENCE):
            raise RsdError(f"the server's process did not listen within {START_PATIENCE:g} s")
        assert process.pid is not None
        yield ours.recv(), process.pid
    except EOFError:
        raise RsdError("the server's process ended before it listened; its messages are above") from None
    finally:
        process.terminate()
        process.join()
        ours.close()
