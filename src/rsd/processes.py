"""What every worker process begins with, and the signals that end a run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait

from rsd.output import warn_in_one_line


def begin_worker() -> None:
    """It ends with its parent, even by SIGKILL: nothing goes on computing, or waits, for nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    warn_in_one_line()


@contextlib.contextmanager
def on_signals(handler: Callable[..., object], *numbers: signal.Signals) -> Iterator[None]:
    """Meanwhile these signals call the handler. Outside the main thread, which alone gets them, nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
