"""The folder of a training: held by one run, its state written when it is told to stop."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from rsd.locks import exclusive
from rsd.types import RsdError

STATE_FILE, CHECKPOINT = "training_state.pt", "checkpoint"
Config = TypeVar("Config")
Result = TypeVar("Result")


@contextlib.contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that work ends where it can be taken up again; a second one ends it at
    once. In another thread than the main one, nothing sets it."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; once more to stop at once, without saving", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_run_a_folder(train: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """A training that has its `config.output` for itself; of the processes of `torchrun` the first one holds it."""

    @functools.wraps(train)
    def alone(config: Config) -> Result:
        output: Path = config.output  # type: ignore[attr-defined]
        with exclusive(output) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
            if (output / CHECKPOINT).exists() and not (output / STATE_FILE).exists():
                raise RsdError(f"{output / CHECKPOINT}: a checkpoint of another run; choose another --output")
            return train(config)

    return alone
